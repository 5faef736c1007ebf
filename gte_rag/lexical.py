"""Exact search over sparse vectors, in memory: what Chroma does for dense vectors and local Chroma lacks for sparse ones.

An inverted index: for each token the rows that hold it and their weights (a posting list). A query adds up the posting lists
of its tokens, term at a time, so every score is exact and the cost grows with the length of these lists only. NumPy
is enough for this: `numpy.add.at` runs through 100,000 records of 100 weights in less than a millisecond.

Records lie in a few immutable segments, as in a log-structured merge tree (O'Neil et al., 1996): a write adds a small
segment, and segments are merged when the newer ones together have grown as large as an older one. So each is larger
than all the newer ones together, there are at most log2(n) + 1, and a record is moved about log2(n) times in its life. A
deleted or replaced record is a cleared bit in its segment's mask until the segment is rewritten. A writer puts a whole new
tuple of segments in place of the old one; readers take that tuple once and need no lock.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import threading
import time
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gte_rag.vectors import FloatArray, IntArray, SparseMatrix, SparseVector

_FORMAT = "gte_rag sparse index 1"
_DTYPES = {"tokens": "int32", "starts": "int64", "rows": "int32", "weights": "float32", "ids": "uint8", "ends": "int64"}
# Rows sorted at a time: posting lists of one segment are made by sorting, and small sorts stay in the processor's cache.
_SEGMENT_ROWS = 4096
# Share of deleted rows at which a segment is rewritten without them.
_DEAD_SHARE = 0.25
# Scores looked at together when the best are sought: see `_best`.
_BLOCK = 64
# Age in seconds at which a file that an interrupted `save` left behind is removed.
_LEFTOVER_AGE_S = 3600.0


@dataclass(frozen=True, eq=False)
class _Segment:
    """Posting lists of some records; only made, never changed.

    Attributes:
        ids: Id of each row.
        places: Row of each id.
        tokens: The token ids that occur, int32, shape (t,), strictly ascending.
        starts: int64, shape (t + 1,): the posting list of ``tokens[i]`` lies at ``starts[i]:starts[i + 1]``.
        rows: Row of each weight, int32, shape (nnz,), strictly ascending within a posting list.
        weights: float32, shape (nnz,).
        alive: Which rows count, bool, shape (rows,).
        live: How many of them do.
    """

    ids: list[str]
    places: dict[str, int]
    tokens: IntArray
    starts: NDArray[np.int64]
    rows: IntArray
    weights: FloatArray
    alive: NDArray[np.bool_]
    live: int

    def find(self, record_id: str) -> int | None:
        """Return the row of an id, None when the id is unknown or deleted."""
        row = self.places.get(record_id)
        return row if row is not None and self.alive[row] else None

    def add_scores(self, query: SparseVector, scores: FloatArray) -> None:
        """Add the product of every weight with the query's weight of its token to `scores`, float32, shape (rows,)."""
        if not self.tokens.size:
            return
        slots = np.minimum(np.searchsorted(self.tokens, query.indices), self.tokens.size - 1)
        known = self.tokens[slots] == query.indices
        slots = slots[known]
        for start, stop, weight in zip(
            self.starts[slots].tolist(), self.starts[slots + 1].tolist(), query.values[known], strict=True
        ):
            np.add.at(scores, self.rows[start:stop], self.weights[start:stop] * weight)
        if self.live < len(self.ids):
            scores[~self.alive] = 0


class SparseIndex:
    """Exact top-k by sparse score over records that come, change and go.

    Reading (`search`, `vector`, `ids`, `save`, ...) is safe in any number of threads beside one or more writing ones
    (`upsert`, `delete`): a reader sees each write completely or not at all. About 8 bytes a weight and 150 a record.

    Attributes:
        vocab_size: Number of token ids, 0 up to it.
    """

    def __init__(self, vocab_size: int) -> None:
        """Make an empty index.

        Args:
            vocab_size: Vocabulary size of the model that gives the vectors.

        Raises:
            TypeError: `vocab_size` is not a whole number.
            ValueError: It is less than 1 or over 2,147,483,647.
        """
        limit = int(np.iinfo(np.int32).max)
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size is {vocab_size!r}; give a whole number")
        if not 1 <= vocab_size <= limit:
            raise ValueError(f"vocab_size is {vocab_size}; give the model's vocabulary size, 1 to {limit}")
        self.vocab_size = vocab_size
        self._segments: tuple[_Segment, ...] = ()
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"SparseIndex({len(self)} records, vocab_size={self.vocab_size})"

    def __len__(self) -> int:
        """Return the number of records."""
        return sum(segment.live for segment in self._segments)

    def __contains__(self, record_id: object) -> bool:
        """Return whether there is a record of this id."""
        return isinstance(record_id, str) and any(seg.find(record_id) is not None for seg in self._segments)

    def ids(self) -> list[str]:
        """Return all ids in the order in which their records were last written."""
        return [
            record_id
            for segment in self._segments
            for record_id, alive in zip(segment.ids, segment.alive.tolist(), strict=True)
            if alive
        ]

    def vector(self, record_id: str) -> SparseVector:
        """Return the sparse vector of a record, exactly as it was given.

        Weights are kept by token, not by record, so this reads the whole index: some milliseconds for 100,000 records.

        Raises:
            KeyError: There is no record of this id.
        """
        for segment in self._segments:
            row = segment.find(record_id)
            if row is not None:
                found = np.flatnonzero(segment.rows == row)
                slots = np.searchsorted(segment.starts, found, side="right") - 1
                return SparseVector(segment.tokens[slots], segment.weights[found])
        raise KeyError(record_id)

    def upsert(self, ids: Sequence[str], vectors: SparseMatrix) -> None:
        """Add records, or replace the ones that exist; a replaced record moves to the end of the order.

        Args:
            ids: A unique id for each vector.
            vectors: Their sparse vectors, shape (len(ids), vocab_size). Rows without weights are kept, and never found.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The numbers differ, an id repeats, or the vocabulary is another; nothing is changed then.
        """
        ids = _check_ids(ids)
        if not isinstance(vectors, SparseMatrix):
            raise TypeError(f"vectors is {type(vectors).__name__}; give a SparseMatrix")
        if vectors.shape != (len(ids), self.vocab_size):
            raise ValueError(
                f"vectors have the shape {vectors.shape}; it must be {(len(ids), self.vocab_size)}: "
                "one row per id, one column per token of the index's vocabulary"
            )
        if len(set(ids)) < len(ids):
            seen: set[str] = set()
            repeated = next(record_id for record_id in ids if record_id in seen or seen.add(record_id))  # type: ignore[func-returns-value]
            raise ValueError(f"the id {repeated!r} is given more than once; give each id once")
        new = [
            _segment(ids[start : start + _SEGMENT_ROWS], vectors, start) for start in range(0, len(ids), _SEGMENT_ROWS)
        ]
        with self._writing:
            self._segments = _tidy([*_without(self._segments, ids), *new])

    def delete(self, ids: Sequence[str]) -> None:
        """Delete records; ids that do not exist are passed over.

        Raises:
            TypeError: `ids` is not a sequence of strings.
        """
        ids = _check_ids(ids)
        with self._writing:
            self._segments = _tidy(_without(self._segments, ids))

    def search(self, query: SparseVector, k: int, *, allowed: Container[str] | None = None) -> list[tuple[str, float]]:
        """Return the records with the highest sparse scores: the sum over shared tokens of the products of the weights.

        Scores are added up in float32, token by token in ascending order, so the same records give the same scores
        and the same order whatever the index went through.

        Args:
            query: The query's sparse vector.
            k: Number of records to return at most.
            allowed: Only records whose id is in this set may be returned. A list or an array is made into a set first; a
                container that only answers ``in`` is asked for one id after the other, best first.

        Returns:
            (id, score) of at most `k` records with a score greater than 0, best first; of equal scores the record
            first that was written first.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `k` is less than 1, or the query has a token outside the vocabulary.
        """
        return self.search_batch([query], k, allowed=allowed)[0]

    def search_batch(
        self, queries: Sequence[SparseVector], k: int, *, allowed: Container[str] | None = None
    ) -> list[list[tuple[str, float]]]:
        """Return what `search` returns for each query, all from the same state of the index.

        Args:
            queries: Sparse vectors, a `SparseMatrix` or any other sequence of them.
            k: As for `search`.
            allowed: As for `search`.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `k` is less than 1, or a query has a token outside the vocabulary.
        """
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k is {k!r}; give a whole number")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        self._check_queries(queries)
        allowed = _check_allowed(allowed)
        segments = self._segments
        bounds = np.cumsum([0, *(len(segment.ids) for segment in segments)])
        total = int(bounds[-1])
        # Few allowed ids are looked up; of many, the best rows are asked until k are found, on average k * total / len.
        chosen = None
        if isinstance(allowed, AbstractSet) and len(allowed) ** 2 <= k * total:
            chosen = _rows_of(allowed, segments, bounds)
        results = []
        for query in queries:
            scores = np.zeros(total, dtype=np.float32)
            for segment, start, stop in zip(segments, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                segment.add_scores(query, scores[start:stop])
            if allowed is None:
                rows = _best(scores, k)
                found = _ids_of(rows, segments, bounds)
            elif chosen is not None:
                rows = chosen[_best(scores[chosen], k)]
                found = _ids_of(rows, segments, bounds)
            else:
                rows, found = _best_allowed(scores, k, allowed, segments, bounds)
            results.append(list(zip(found, scores[rows].tolist(), strict=True)))
        return results

    def save(self, path: str | os.PathLike[str], *, stamp: str) -> None:
        """Write the index to one file, replacing what was there in one step.

        The file is a cache, so it is not forced to the disk: after a power failure it may be damaged, and `load` sees that.

        Args:
            path: The file; its folder must exist.
            stamp: What the index was made from, in the caller's words; `load` gives the index back for this stamp only.

        Raises:
            TypeError: `stamp` is not a string.
            OSError: The file cannot be written; what was there is left as it was.
        """
        if not isinstance(stamp, str):
            raise TypeError(f"stamp is {type(stamp).__name__}; give a string")
        segments = [segment for segment in self._segments if segment.live]
        whole = segments[0] if len(segments) == 1 and segments[0].live == len(segments[0].ids) else _merge(segments)
        encoded = [record_id.encode("utf-8", "surrogatepass") for record_id in whole.ids]
        arrays: dict[str, NDArray[Any]] = {
            "tokens": whole.tokens,
            "starts": whole.starts,
            "rows": whole.rows,
            "weights": whole.weights,
            "ids": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        }
        marks = {"format": _FORMAT, "stamp": stamp, "vocab_size": str(self.vocab_size)}
        marks["checksum"] = _checksum(marks, arrays)
        path = Path(path)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with contextlib.suppress(OSError):  # another process may remove it first
                if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                    leftover.unlink()
        draft = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
        try:
            save_file(arrays, draft, metadata=marks)
            os.replace(draft, path)
        except SafetensorError as error:  # how the writer reports a full disk or a missing folder
            raise OSError(f"the sparse index cannot be written to {path}: {error}") from error
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, stamp: str) -> SparseIndex | None:
        """Read an index that `save` wrote.

        Args:
            path: The file.
            stamp: The stamp it must have.

        Returns:
            The index, or None when there is no such file, it has another stamp or format, or it is damaged: whatever
            the reason, the index has to be built again.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                marks = dict(file.metadata() or {})
                if marks.get("format") != _FORMAT or marks.get("stamp") != stamp:
                    return None
                arrays = {name: np.asarray(file.get_tensor(name)) for name in _DTYPES}
            checksum = marks.pop("checksum", None)
            if any(str(array.dtype) != _DTYPES[name] or array.ndim != 1 for name, array in arrays.items()):
                return None
            if checksum != _checksum(marks, arrays):
                return None
            index = cls(int(marks["vocab_size"]))
            data, bounds = arrays["ids"].tobytes(), [0, *arrays["ends"].tolist()]
            ids = [data[start:stop].decode("utf-8", "surrogatepass") for start, stop in pairwise(bounds)]
            if not _fit_together(ids, arrays, index.vocab_size):
                return None
        # TypeError and AttributeError: of types that NumPy lacks.
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
            return None
        if ids:
            index._segments = (_alive(ids, arrays["tokens"], arrays["starts"], arrays["rows"], arrays["weights"]),)
        return index

    def _check_queries(self, queries: Sequence[SparseVector]) -> None:
        if isinstance(queries, SparseVector) or not isinstance(queries, Sequence):
            raise TypeError(f"queries is {type(queries).__name__}; give a sequence of SparseVector")
        for query in queries:
            if not isinstance(query, SparseVector):
                raise TypeError(f"a query is {type(query).__name__}; give a SparseVector")
            if len(query) and query.indices[-1] >= self.vocab_size:
                raise ValueError(
                    f"the query has the token id {int(query.indices[-1])}; this index has a vocabulary of "
                    f"{self.vocab_size}. Encode queries with the model that encoded the records"
                )


def _fit_together(ids: list[str], arrays: Mapping[str, NDArray[Any]], vocab_size: int) -> bool:
    """Whether arrays from a file are posting lists: anyone can write a checksum."""
    tokens, starts, rows, weights = (arrays[name] for name in ("tokens", "starts", "rows", "weights"))
    return bool(
        len(set(ids)) == len(ids)
        and starts.size == tokens.size + 1
        and starts[0] == 0
        and starts[-1] == rows.size == weights.size
        and np.all(starts[1:] > starts[:-1])
        and np.all(tokens[1:] > tokens[:-1])
        and (not tokens.size or (tokens[0] >= 0 and tokens[-1] < vocab_size))
        and (not rows.size or (rows.min() >= 0 and rows.max() < len(ids)))
        and np.all(np.isfinite(weights))
        and np.all(weights > 0)
    )


def _alive(
    ids: list[str], tokens: IntArray, starts: NDArray[np.int64], rows: IntArray, weights: FloatArray
) -> _Segment:
    """Return a segment in which every row counts."""
    places = dict(zip(ids, range(len(ids)), strict=True))
    return _Segment(ids, places, tokens, starts, rows, weights, np.ones(len(ids), dtype=np.bool_), len(ids))


def _segment(ids: list[str], vectors: SparseMatrix, first: int) -> _Segment:
    """Return the posting lists of the rows of `vectors` from `first` on, one for each id."""
    bounds = vectors.indptr[first : first + len(ids) + 1]
    part = slice(int(bounds[0]), int(bounds[-1]))
    indices = vectors.indices[part]
    order = _token_order(indices)
    sorted_indices = indices[order]
    starts = np.flatnonzero(np.diff(sorted_indices, prepend=-1))
    rows = np.repeat(np.arange(len(ids), dtype=np.int32), np.diff(bounds))
    return _alive(
        ids,
        sorted_indices[starts],
        np.append(starts, indices.size).astype(np.int64),
        rows[order],
        vectors.values[part][order],
    )


def _token_order(indices: IntArray) -> NDArray[np.int64]:
    """Return the stable ascending order of token ids; NumPy sorts 16-bit numbers several times faster than wider ones."""
    order: NDArray[np.int64] = np.argsort((indices & 0xFFFF).astype(np.uint16), kind="stable")
    if indices.size and indices.max() > 0xFFFF:
        order = order[np.argsort((indices >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def _without(segments: Iterable[_Segment], ids: Sequence[str]) -> Iterator[_Segment]:
    """Yield the segments, the rows of `ids` marked as deleted."""
    unwanted = frozenset(ids)
    for segment in segments:
        rows = [segment.places[record_id] for record_id in unwanted & segment.places.keys()]
        if rows and segment.alive[rows].any():
            alive = segment.alive.copy()
            alive[rows] = False
            yield replace(segment, alive=alive, live=int(np.count_nonzero(alive)))
        else:
            yield segment


def _tidy(segments: Iterable[_Segment]) -> tuple[_Segment, ...]:
    """Return the same records in segments that are mostly alive, each larger than all the later ones together."""
    tidied = [
        segment if segment.live >= (1 - _DEAD_SHARE) * len(segment.ids) else _merge([segment])
        for segment in segments
        if segment.live
    ]
    first, later = len(tidied), 0
    for place in reversed(range(len(tidied))):
        if tidied[place].live <= later:
            first = place
        later += tidied[place].live
    if first < len(tidied):
        tidied[first:] = [_merge(tidied[first:])]
    return tuple(tidied)


def _merge(segments: Sequence[_Segment]) -> _Segment:
    """Return one segment with the live rows of several, in order.

    The posting lists are sorted already, so each part of the new lists is copied to where it belongs: no sorting.
    """
    parts = [_live_postings(segment) for segment in segments]
    tokens = np.unique(np.concatenate([np.empty(0, dtype=np.int32), *(part[0] for part in parts)]))
    slots = [np.searchsorted(tokens, part[0]) for part in parts]
    lengths = np.zeros(len(tokens), dtype=np.int64)
    for slot, (_, counts, _, _) in zip(slots, parts, strict=True):
        lengths[slot] += counts
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    filled = starts[:-1].copy()
    rows = np.empty(int(starts[-1]), dtype=np.int32)
    weights = np.empty(int(starts[-1]), dtype=np.float32)
    first_row = 0
    for segment, slot, (_, counts, part_rows, part_weights) in zip(segments, slots, parts, strict=True):
        target = np.repeat(filled[slot] - (np.cumsum(counts) - counts), counts)
        target += np.arange(len(part_rows))
        rows[target] = part_rows + np.int32(first_row)
        weights[target] = part_weights
        filled[slot] += counts
        first_row += segment.live
    ids = [
        record_id for segment in segments for record_id, alive in zip(segment.ids, segment.alive, strict=True) if alive
    ]
    return _alive(ids, tokens, starts, rows, weights)


def _live_postings(segment: _Segment) -> tuple[IntArray, NDArray[np.int64], IntArray, FloatArray]:
    """Return tokens, lengths of their posting lists, rows (numbered without the dead ones) and weights."""
    lengths = np.diff(segment.starts)
    if segment.live == len(segment.ids):
        return segment.tokens, lengths, segment.rows, segment.weights
    kept = segment.alive[segment.rows]
    lengths = np.add.reduceat(kept, segment.starts[:-1], dtype=np.int64) if lengths.size else lengths
    numbers = (np.cumsum(segment.alive) - 1).astype(np.int32)
    used = lengths > 0
    return segment.tokens[used], lengths[used], numbers[segment.rows[kept]], segment.weights[kept]


def _best(scores: FloatArray, k: int) -> NDArray[np.int64]:
    """Return the places of the `k` highest scores above 0, highest first, of equal ones the first place first.

    The k-th highest of the block maxima is no higher than the k-th highest score, because each of k blocks has one that
    high: only scores from there on need sorting. Finding it takes a fraction of the time of a partition of all scores,
    which is for a `k` that is large beside the number of blocks.
    """
    floor = np.float32(0)
    if scores.size > k * _BLOCK:
        heights = np.maximum.reduceat(scores, np.arange(0, scores.size, _BLOCK))
        floor = np.partition(heights, -k)[-k]
    elif scores.size > k:
        floor = np.partition(scores, -k)[-k]
    places = np.flatnonzero(scores >= floor if floor > 0 else scores)
    return places[np.argsort(-scores[places], kind="stable")[:k]]


def _best_allowed(
    scores: FloatArray, k: int, allowed: Container[str], segments: Sequence[_Segment], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Return rows and ids of the `k` best that are allowed, asking from the best row on."""
    share = min(1.0, len(allowed) / len(scores)) if isinstance(allowed, AbstractSet) and len(scores) else 1.0
    asked = int(2 * k / share)
    while True:
        rows = _best(scores, asked)
        ids = _ids_of(rows, segments, bounds)
        kept = [place for place, record_id in enumerate(ids) if record_id in allowed][:k]
        if len(kept) == k or len(rows) < asked:
            return rows[kept], [ids[place] for place in kept]
        asked *= 8


def _rows_of(ids: AbstractSet[str], segments: Sequence[_Segment], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of those ids that exist, ascending; deleted rows among them have the score 0."""
    rows = [
        start + segment.places[record_id]
        for segment, start in zip(segments, bounds.tolist(), strict=False)
        for record_id in ids & segment.places.keys()
    ]
    return np.sort(np.array(rows, dtype=np.int64))


def _ids_of(rows: NDArray[np.int64], segments: Sequence[_Segment], bounds: NDArray[np.int64]) -> list[str]:
    """Return the ids of rows."""
    owners = np.searchsorted(bounds, rows, side="right") - 1
    places = rows - bounds[owners]
    return [segments[owner].ids[place] for owner, place in zip(owners.tolist(), places.tolist(), strict=True)]


def _checksum(marks: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return a CRC-32 over everything a file holds: damage shows, at four times the speed of SHA-256."""
    value = zlib.crc32("\n".join(f"{key}={marks[key]}" for key in sorted(marks)).encode("utf-8"))
    for name in _DTYPES:
        value = zlib.crc32(f"{name}:{arrays[name].size}".encode(), value)
        value = zlib.crc32(arrays[name].data, value)
    return f"{value:08x}"


def _check_ids(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"ids is {type(ids).__name__}; give a list of strings")
    for position, record_id in enumerate(ids):
        if not isinstance(record_id, str):
            raise TypeError(f"ids[{position}] is {type(record_id).__name__}; every id must be a string")
    return list(ids)


def _check_allowed(allowed: Container[str] | None) -> Container[str] | None:
    """Return a container that is quick to ask, an `AbstractSet` where its members can be listed."""
    if isinstance(allowed, (str, bytes)):
        raise TypeError(f"allowed is {type(allowed).__name__}; give a set of ids")
    if allowed is None or isinstance(allowed, AbstractSet):
        return allowed
    if isinstance(allowed, np.ndarray):
        return frozenset(allowed.ravel().tolist())
    if isinstance(allowed, Iterable):
        return frozenset(allowed)
    if not isinstance(allowed, Container):
        raise TypeError(f"allowed is {type(allowed).__name__}; give a set of ids")
    return allowed
