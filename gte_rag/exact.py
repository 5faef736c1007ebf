"""Exact search in memory by both scores: what a collection finds, without one, for judging vectors on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gte_rag.fusion import Calibration, Fusion, fusion_named, measure
from gte_rag.lexical import SparseIndex
from gte_rag.vectors import Encoding, FloatArray, SparseMatrix, SparseVector

_BLOCK = 2**24  # scores computed at a time: 64 MB


class Found(NamedTuple):
    """One query's candidates: rows of passages, both scores, and which list each row is in."""

    rows: NDArray[np.int64]
    dense: FloatArray
    sparse: FloatArray
    in_dense: NDArray[np.bool_]
    in_sparse: NDArray[np.bool_]


class ExactSearch:
    """Encoded passages, searched exactly by both scores."""

    def __init__(self, dense: FloatArray | None, sparse: SparseMatrix | None) -> None:
        self.dense = dense
        self.sparse = sparse

    def __len__(self) -> int:
        return len(self.dense) if self.dense is not None else len(self.sparse or ())

    @cached_property
    def _index(self) -> SparseIndex:
        assert self.sparse is not None
        index = SparseIndex(self.sparse.shape[1])
        index.upsert([str(row) for row in range(len(self.sparse))], self.sparse)
        return index

    def lexical(self, query: SparseVector, depth: int) -> tuple[NDArray[np.int64], FloatArray]:
        """Return the rows with the best sparse scores above 0 and these scores, best first."""
        found = self._index.search(query, depth)
        return np.array([int(row) for row, _ in found], dtype=np.int64), np.array(
            [s for _, s in found], dtype=np.float32
        )

    def found(
        self,
        scores: FloatArray,
        nearest: NDArray[np.int64],
        lexical: NDArray[np.int64],
        query: SparseVector,
    ) -> Found:
        """Return the union of two lists, the nearest first, with both scores of each."""
        assert self.sparse is not None
        rows = np.concatenate([nearest, lexical[~np.isin(lexical, nearest)]])
        in_dense = np.arange(len(rows)) < len(nearest)
        return Found(rows, scores[rows], self.sparse.take(rows).dot(query), in_dense, np.isin(rows, lexical))


def weighted_fusions(
    weights: Mapping[str, tuple[float, float]], calibration: Calibration | None, modes: Sequence[str]
) -> dict[str, Callable[..., FloatArray]]:
    """Return each fusion with its weights: two arrays of scores in, one out; ``without`` leaves a side out."""
    if not modes:
        return {}

    def weighted(fusion: Fusion, dense_weight: float, sparse_weight: float) -> Callable[..., FloatArray]:
        def fuse(dense: FloatArray, sparse: FloatArray, *, without: str = "") -> FloatArray:
            return fusion(
                dense,
                sparse,
                dense_weight=0.0 if without == "dense" else dense_weight,
                sparse_weight=0.0 if without == "sparse" else sparse_weight,
            )

        return fuse

    return {name: weighted(fusion_named(name, calibration=calibration), *pair) for name, pair in weights.items()}


def fused(
    found: Found, mode: str, fusion: str, fuse: Callable[..., FloatArray]
) -> tuple[NDArray[np.int64], FloatArray]:
    """Return the rows a mode considers and their fused scores, best first; of equal ones the nearer dense vector first."""
    if mode == "rescore":
        rows = found.rows[found.in_dense]
        scores = fuse(found.dense[found.in_dense], found.sparse[found.in_dense])
    elif mode == "union":
        rows, scores = found.rows, fuse(found.dense, found.sparse)
    elif fusion in ("weighted", "calibrated"):
        rows = found.rows
        scores = fuse(np.where(found.in_dense, found.dense, 0), np.where(found.in_sparse, found.sparse, 0))
    else:  # normalised within each list; what is not in it gets nothing from it
        rows, scores = found.rows, np.zeros(len(found.rows), dtype=np.float32)
        for without, listed in (("sparse", found.in_dense), ("dense", found.in_sparse)):
            scores[listed] += fuse(found.dense[listed], found.sparse[listed], without=without)
    order = np.argsort(-scores, kind="stable")
    return rows[order], scores[order]


def calibrate(
    corpus: ExactSearch, pseudo: Encoding | None, picked: Sequence[int], candidates: int, dimension: int
) -> Calibration | None:
    """Measure the scales of both scores with the openings of the picked passages, as `HybridRetriever.calibrate` does."""
    if pseudo is None or pseudo.dense is None or pseudo.sparse is None:
        return None
    assert corpus.sparse is not None
    if len(corpus) < 2:
        raise ValueError(f"the set has {len(corpus)} passage; the fusion 'calibrated' needs at least 2")
    dense, sparse = [], []
    for place, scores in enumerate(score_rows(cut(pseudo.dense, dimension), corpus.dense)):
        nearest = best_rows(scores, candidates)
        nearest = nearest[nearest != picked[place]]
        dense.append(scores[nearest])
        sparse.append(corpus.sparse.take(nearest).dot(pseudo.sparse[place]))
    return measure(dense, sparse)


def cut(vectors: FloatArray, dimension: int) -> FloatArray:
    """Return the vectors cut to their first `dimension` numbers and normalised: float32, shape (n, dimension)."""
    if dimension == vectors.shape[1]:
        return vectors
    shorter = vectors[:, :dimension]
    lengths = np.maximum(np.linalg.norm(shorter, axis=1, keepdims=True), np.float32(1e-12))
    unit: FloatArray = shorter / lengths
    return unit


def best_rows(scores: FloatArray, k: int) -> NDArray[np.int64]:
    """Return the places of the `k` highest scores, best first; of equal ones the earlier first."""
    rows = np.arange(len(scores))
    if k < len(scores):
        rows = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    return rows[np.argsort(-scores[rows], kind="stable")[:k]]


def score_rows(queries: FloatArray, documents: FloatArray | None) -> Iterator[FloatArray]:
    """Yield the scores of one query after the other with all passages: float32, shape (n,)."""
    assert documents is not None
    step = max(1, _BLOCK // max(len(documents), 1))
    for start in range(0, len(queries), step):
        yield from queries[start : start + step] @ documents.T
