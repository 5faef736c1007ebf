"""Value types for what the encoder returns, and the one-string form in which a sparse vector is stored.

The types check themselves once, when they are made, so that nothing downstream has to. They hold NumPy arrays only:
this module needs neither torch nor a model.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST_STEP = 65535

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

_LARGEST_ID = int(np.iinfo(np.int32).max)


def _check_weights(indices: NDArray[Any], values: NDArray[Any]) -> None:
    if indices.ndim != 1 or indices.shape != values.shape:
        raise ValueError(
            f"indices have shape {indices.shape} and values {values.shape}; both must be one-dimensional and equally long"
        )
    if indices.dtype != np.int32 or values.dtype != np.float32:
        raise ValueError(f"indices are {indices.dtype} and values {values.dtype}; they must be int32 and float32")
    if not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError("sparse weights must be finite and greater than 0; leave out tokens without weight")
    if indices.size and indices.min() < 0:
        raise ValueError(f"token id {int(indices.min())} is negative; ids start at 0")


@dataclass(frozen=True, eq=False)
class SparseVector:
    """Learned token weights of one text, keyed by token id.

    Attributes:
        indices: Token ids, int32, shape (nnz,), strictly ascending.
        values: Weights, float32, shape (nnz,), finite and greater than 0.
    """

    indices: IntArray
    values: FloatArray

    def __post_init__(self) -> None:
        """Check shapes, dtypes, the sign of the weights and the order of the ids."""
        _check_weights(self.indices, self.values)
        if self.indices.size > 1 and np.any(np.diff(self.indices) <= 0):
            raise ValueError("token ids must be strictly ascending, each at most once")

    def __len__(self) -> int:
        """Return the number of tokens with a weight."""
        return int(self.indices.size)

    def __eq__(self, other: object) -> bool:
        """Return whether `other` holds exactly the same ids and weights."""
        if not isinstance(other, SparseVector):
            return NotImplemented
        return np.array_equal(self.indices, other.indices) and np.array_equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]  # arrays inside: comparable, not hashable

    def dot(self, other: SparseVector) -> float:
        """Return the sparse score: the sum of the products over shared token ids."""
        _, mine, theirs = np.intersect1d(self.indices, other.indices, assume_unique=True, return_indices=True)
        return float(self.values[mine] @ other.values[theirs]) if mine.size else 0.0

    def to_dict(self) -> dict[int, float]:
        """Return ``{token id: weight}`` with plain Python numbers."""
        return dict(zip(self.indices.tolist(), self.values.tolist(), strict=True))

    @classmethod
    def from_dict(cls, weights: Mapping[int, float]) -> SparseVector:
        """Build a vector from ``{token id: weight}``; weights of exactly 0 are left out.

        Raises:
            TypeError: An id is not a whole number.
            ValueError: A weight is negative or not finite, or an id does not lie between 0 and 2,147,483,647.
        """
        for index in weights:
            if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
                raise TypeError(f"token id {index!r} is {type(index).__name__}; ids are whole numbers")
            if not 0 <= index <= _LARGEST_ID:
                raise ValueError(f"token id {index} is out of range; ids lie between 0 and {_LARGEST_ID}")
        kept = sorted((index, value) for index, value in weights.items() if value != 0)
        return cls(
            np.array([index for index, _ in kept], dtype=np.int32),
            np.array([value for _, value in kept], dtype=np.float32),
        )


@dataclass(frozen=True, eq=False)
class SparseMatrix(Sequence[SparseVector]):
    """Sparse vectors of several texts in compressed sparse row (CSR) form; row i belongs to text i.

    Attributes:
        indptr: int64, shape (n + 1,): row i lies at ``indptr[i]:indptr[i + 1]``.
        indices: Token ids, int32, shape (nnz,), strictly ascending within a row.
        values: Weights, float32, shape (nnz,), finite and greater than 0.
        shape: (number of texts, vocabulary size).
    """

    indptr: NDArray[np.int64]
    indices: IntArray
    values: FloatArray
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Check that the arrays form a valid CSR matrix of the given shape."""
        _check_weights(self.indices, self.values)
        rows, columns = self.shape
        if self.indptr.dtype != np.int64 or self.indptr.shape != (rows + 1,):
            raise ValueError(f"indptr is {self.indptr.dtype} {self.indptr.shape}; it must be int64 ({rows + 1},)")
        if self.indptr[0] != 0 or self.indptr[-1] != self.indices.size or np.any(np.diff(self.indptr) < 0):
            raise ValueError("indptr must rise from 0 to the number of stored weights")
        if self.indices.size and self.indices.max() >= columns:
            raise ValueError(f"token id {int(self.indices.max())} is outside a vocabulary of {columns}")
        if self.indices.size > 1:
            ascending = np.diff(self.indices) > 0
            starts = self.indptr[1:-1]
            ascending[starts[(starts > 0) & (starts < self.indices.size)] - 1] = True  # a new row may start lower
            if not np.all(ascending):
                raise ValueError("token ids must be strictly ascending within each row")

    def __len__(self) -> int:
        """Return the number of texts."""
        return self.shape[0]

    def __getitem__(self, index: int) -> SparseVector:  # type: ignore[override]  # rows only, no slices
        """Return the sparse vector of text `index`; negative indices count from the end."""
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"a row index is an int, not {type(index).__name__}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a matrix with {len(self)} rows")
        row = int(index) % len(self)
        part = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
        return SparseVector(self.indices[part], self.values[part])

    def __iter__(self) -> Iterator[SparseVector]:
        """Yield the sparse vector of each text in order."""
        return (self[row] for row in range(len(self)))

    def dot(self, vector: SparseVector) -> FloatArray:
        """Return the sparse score of every row with `vector`: float32, shape (n,)."""
        if not len(vector) or not self.indices.size:
            return np.zeros(len(self), dtype=np.float32)
        place = np.searchsorted(vector.indices, self.indices)
        place[place == len(vector)] = 0
        products = np.where(vector.indices[place] == self.indices, self.values * vector.values[place], np.float32(0))
        scores = np.zeros(len(self), dtype=np.float32)
        filled = np.diff(self.indptr) > 0  # reduceat gives an empty row the next one's first product
        scores[filled] = np.add.reduceat(products, self.indptr[:-1][filled], dtype=np.float64)
        return scores

    def take(self, rows: NDArray[np.integer[Any]]) -> SparseMatrix:
        """Return the given rows, in the given order, as a new matrix."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
        place = np.repeat(self.indptr[:-1][rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return SparseMatrix(indptr, self.indices[place], self.values[place], (len(rows), self.shape[1]))

    @classmethod
    def stack(cls, matrices: Sequence[SparseMatrix], vocab_size: int) -> SparseMatrix:
        """Put matrices of `vocab_size` columns one below the other; none give a matrix of no rows."""
        lengths = [np.diff(matrix.indptr) for matrix in matrices]
        return cls(
            np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *lengths]), dtype=np.int64),
            np.concatenate([np.empty(0, dtype=np.int32), *(matrix.indices for matrix in matrices)]),
            np.concatenate([np.empty(0, dtype=np.float32), *(matrix.values for matrix in matrices)]),
            (sum(map(len, matrices)), vocab_size),
        )

    @classmethod
    def from_vectors(cls, vectors: Sequence[SparseVector], vocab_size: int) -> SparseMatrix:
        """Stack sparse vectors into one matrix with `vocab_size` columns."""
        lengths = np.array([len(vector) for vector in vectors], dtype=np.int64)
        return cls(
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
            np.concatenate([np.empty(0, dtype=np.int32), *(vector.indices for vector in vectors)]),
            np.concatenate([np.empty(0, dtype=np.float32), *(vector.values for vector in vectors)]),
            (len(vectors), vocab_size),
        )


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one call of the encoder returns; row i belongs to text i.

    Attributes:
        dense: Unit vectors, float32, shape (n, dimension), or None when not asked for.
        sparse: Token weights, shape (n, vocabulary size), or None when not asked for.
        truncated: How many texts were longer than the encoder's ``max_length`` and were cut.
    """

    dense: FloatArray | None
    sparse: SparseMatrix | None
    truncated: int = 0

    def __post_init__(self) -> None:
        """Check that dense and sparse vectors belong to the same number of texts."""
        if self.dense is None and self.sparse is None:
            raise ValueError("an encoding holds dense vectors, sparse vectors, or both")
        if self.dense is not None and (self.dense.ndim != 2 or self.dense.dtype != np.float32):
            raise ValueError(f"dense is {self.dense.dtype} {self.dense.shape}; it must be float32 (n, dimension)")
        if self.dense is not None and self.sparse is not None and len(self.dense) != len(self.sparse):
            raise ValueError(f"{len(self.dense)} dense and {len(self.sparse)} sparse vectors; one of each per text")
        if self.dense is not None and not np.all(np.isfinite(self.dense)):
            row = int(np.flatnonzero(~np.isfinite(self.dense).all(axis=1))[0])
            raise ValueError(f"dense vector {row} has values that are not finite; a checkpoint's weights are too large")

    def __len__(self) -> int:
        """Return the number of texts."""
        if self.dense is not None:
            return len(self.dense)
        assert self.sparse is not None  # __post_init__ checked it; this is for the type checker
        return len(self.sparse)


def pack_sparse(vector: SparseVector) -> str:
    """Write a sparse vector as one ASCII string: base64 of the steps from id to id (uint16), then the weights (float16).

    A step over 65,535 is taken in several, whose entries have weight 0. About 5.3 characters a token. A weight above 65,504
    is stored as 65,504 and one below 6e-8 is left out: the range of float16. Real weights lie between 0.01 and 10.
    """
    lengths = np.array([0, len(vector)], dtype=np.int64)
    return pack_sparse_rows(SparseMatrix(lengths, vector.indices, vector.values, (1, _LARGEST_ID + 1)))[0]


def pack_sparse_rows(matrix: SparseMatrix) -> list[str]:
    """Write every row of a matrix as `pack_sparse` writes a vector."""
    weights = np.minimum(matrix.values, np.float32(65504)).astype("<f2")
    kept = weights > 0
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept, dtype=np.int64)])[matrix.indptr]
    ids, weights = matrix.indices[kept], weights[kept]
    gaps = np.diff(ids, prepend=np.int32(0))
    starts = bounds[:-1][np.diff(bounds) > 0]
    gaps[starts] = ids[starts]  # a row's first step is its first id
    large, rest = np.divmod(gaps, _LARGEST_STEP)
    places = np.cumsum(large + 1, dtype=np.int64)  # of the real entries among the steps, plus one
    steps = np.full(int(places[-1]) if places.size else 0, _LARGEST_STEP, dtype="<u2")
    steps[places - 1] = rest
    stored = np.zeros(steps.size, dtype="<f2")
    stored[places - 1] = weights
    ends = np.concatenate([np.zeros(1, dtype=np.int64), places])[bounds].tolist()
    return [
        base64.b64encode(steps[start:end].tobytes() + stored[start:end].tobytes()).decode("ascii")
        for start, end in itertools.pairwise(ends)
    ]


def unpack_sparse(packed: str) -> SparseVector:
    """Read a sparse vector written by `pack_sparse`.

    Raises:
        ValueError: The string was not written by `pack_sparse`, or was damaged.
    """
    return unpack_sparse_rows([packed], _LARGEST_ID + 1)[0]


def is_packed(packed: str, vocab_size: int) -> bool:
    """Return whether a string is a sparse vector that `unpack_sparse_rows` reads."""
    try:
        unpack_sparse_rows([packed], vocab_size)
    except ValueError:
        return False
    return True


def unpack_sparse_rows(packed: Sequence[str], vocab_size: int) -> SparseMatrix:
    """Read several sparse vectors written by `pack_sparse` at once, into a matrix with `vocab_size` columns.

    Raises:
        ValueError: A string was not written by `pack_sparse`, was damaged, or has a token id outside the vocabulary.
    """
    rows: list[bytes] = []
    for string in packed:
        try:
            data = base64.b64decode(string, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not a packed sparse vector: {error}") from error
        if len(data) % 4:
            raise ValueError(f"not a packed sparse vector: {len(data)} bytes, which is no multiple of 4")
        rows.append(data)
    lengths = np.array([len(data) // 4 for data in rows], dtype=np.int64)
    ends = np.cumsum(lengths)
    steps = np.frombuffer(b"".join(data[: len(data) // 2] for data in rows), dtype="<u2")
    values = np.frombuffer(b"".join(data[len(data) // 2 :] for data in rows), dtype="<f2").astype(np.float32)
    sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(steps, dtype=np.int64)])
    ids = sums[1:] - np.repeat(sums[ends - lengths], lengths)  # the sum starts anew in each row
    kept = values != 0
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"not a packed sparse vector: token id {int(ids.max())} is outside a vocabulary of {vocab_size}"
        )
    counts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept, dtype=np.int64)])
    return SparseMatrix(
        np.concatenate([np.zeros(1, dtype=np.int64), counts[ends]]),
        ids[kept].astype(np.int32),
        values[kept],
        (len(rows), vocab_size),
    )
