"""Hybrid retrieval: dense search in Chroma, exact sparse scores, one fused ranking."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gte_rag.chroma import Candidates, HybridCollection
from gte_rag.explanation import TokenMatch, token_matches
from gte_rag.fusion import FUSIONS, Calibration, default_sparse_weight, fusion_named, measure, opening
from gte_rag.records import MetadataValue
from gte_rag.tokenization import check_texts
from gte_rag.tuning import ScoredQuery, Trial, Tuning, tune
from gte_rag.vectors import FloatArray, SparseMatrix, SparseVector

MODES = ("rescore", "union", "dense", "sparse")


@dataclass(frozen=True)
class Hit:
    """A retrieved text and why it was retrieved.

    Attributes:
        id: Id of the record.
        text: Its text.
        metadata: Its metadata.
        score: What hits are sorted by: the fused score, or the dense or sparse one in the mode of that name.
        dense_score: Cosine of the dense vectors, -1 to 1.
        sparse_score: Sum over shared tokens of the products of their weights, 0 or more.
        matches: The shared tokens, the one that adds most first.
    """

    id: str
    text: str
    metadata: dict[str, MetadataValue]
    score: float
    dense_score: float
    sparse_score: float
    matches: tuple[TokenMatch, ...]


class HybridRetriever:
    """Find texts by meaning and by words.

    A query is encoded once. The mode says which records are considered; both scores of each are exact.

    - ``"rescore"``: the `candidates` nearest dense vectors, ranked by the fused score. The fastest hybrid.
    - ``"union"``: these and the `candidates` best sparse scores of the whole collection, ranked by the fused score.
      Finds texts that only their words give away.
    - ``"dense"``: the nearest dense vectors.
    - ``"sparse"``: the best sparse scores of the whole collection; only texts that share a token with the query.

    Attributes:
        collection: The collection that is searched.
        k: Number of hits returned.
        candidates: Number of records taken from dense and, in mode ``"union"``, from sparse search.
        mode: ``"rescore"``, ``"union"``, ``"dense"`` or ``"sparse"``.
        fusion: How the two scores become one; see `gte_rag.fusion`. ``"calibrated"`` needs `calibrate` once.
        fusion_options: Further options of the fusion: ``{"k": 60}`` for ``"reciprocal_rank"``.
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side.
    """

    def __init__(
        self,
        collection: HybridCollection,
        *,
        k: int = 10,
        candidates: int = 100,
        mode: str = "rescore",
        fusion: str = "weighted",
        fusion_options: Mapping[str, float] | None = None,
        dense_weight: float = 1.0,
        sparse_weight: float | None = None,
    ) -> None:
        """Set how to search; see the attributes.

        A `sparse_weight` of None is 0.3 for ``"weighted"``, as in the model card's example, and 1.0 for the fusions that
        bring both scores to one scale.

        Raises:
            TypeError: `collection` is no `HybridCollection`, or a number is not a number.
            ValueError: A value is out of range, or a mode or fusion is not available.
        """
        if not isinstance(collection, HybridCollection):
            raise TypeError(f"collection is {type(collection).__name__}; give a HybridCollection")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; available: {', '.join(map(repr, MODES))}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; available: {', '.join(map(repr, FUSIONS))}")
        if fusion != "calibrated" or fusion_options:
            fusion_named(fusion, options=fusion_options)  # refuses unknown options
        self.collection = collection
        self.k = check_count("k", k)
        self.candidates = check_count("candidates", candidates)
        self.mode = mode
        self.fusion = fusion
        self.fusion_options = dict(fusion_options or {})
        self.dense_weight = _check_weight("dense_weight", dense_weight)
        if sparse_weight is None:
            sparse_weight = default_sparse_weight(fusion)
        self.sparse_weight = _check_weight("sparse_weight", sparse_weight)
        self._calibration: Calibration | None = None

    def search(
        self,
        query: str,
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """Return the best hits for a query, best first.

        Args:
            query: The question or search words.
            k: Number of hits; None is the retriever's own. More than `candidates` raises the candidates to `k`.
            where: Chroma's filter on metadata, for example ``{"year": {"$gte": 2020}}``.
            where_document: Chroma's filter on texts, for example ``{"$contains": "Beijing"}``.

        Raises:
            TypeError: `query` is not a string.
            ValueError: `k` is out of range, the fusion lacks its calibration, or Chroma refuses a filter.
        """
        if not isinstance(query, str):
            raise TypeError(f"query is {type(query).__name__}; give one string")
        return self.search_batch([query], k=k, where=where, where_document=where_document)[0]

    def search_batch(
        self,
        queries: Sequence[str],
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[list[Hit]]:
        """Return the best hits for each of several queries; arguments and errors as for `search`.

        The queries are encoded together and sent to Chroma together.
        """
        queries = check_texts(queries)
        k = self.k if k is None else check_count("k", k)
        if not queries:
            return []
        dense, sparse = self._encode(queries)
        found = self._candidates(dense, sparse, k, where, where_document)
        return [self._rank(query, candidates, k) for query, candidates in zip(sparse, found, strict=True)]

    async def asearch(
        self,
        query: str,
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """Search in a worker thread, so that the event loop goes on meanwhile; see `search`."""
        return await asyncio.to_thread(self.search, query, k=k, where=where, where_document=where_document)

    async def asearch_batch(
        self,
        queries: Sequence[str],
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[list[Hit]]:
        """Search several queries in a worker thread; see `search_batch`."""
        return await asyncio.to_thread(self.search_batch, queries, k=k, where=where, where_document=where_document)

    def calibrate(self, *, queries: int = 64) -> Calibration:
        """Measure the scales of both scores on the collection and store them with it; needs no labels.

        The openings of evenly spaced texts serve as queries. Afterwards ``fusion="calibrated"`` compares scores in standard
        deviations, so that a weight means the same for every model and collection. Measure again after the collection has
        changed much.

        Args:
            queries: How many texts to sample.

        Raises:
            ValueError: The collection has fewer than two records.
        """
        records = self.collection.sample(check_count("queries", queries))
        if len(records) < 2:
            raise ValueError(f"the collection has {len(records)} records; calibration needs at least 2")
        dense, sparse = self._encode([opening(record.text) for record in records])
        found = self.collection.nearest(dense, self.candidates)
        scores = [
            _scores(query, candidates.take([i for i, other in enumerate(candidates.records) if other.id != record.id]))
            for record, query, candidates in zip(records, sparse, found, strict=True)
        ]
        calibration = measure(
            [dense_scores for dense_scores, _ in scores], [sparse_scores for _, sparse_scores in scores]
        )
        self.collection.calibration = self._calibration = calibration
        return calibration

    def tune(
        self, queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, float]], *, apply: bool = True
    ) -> Tuning:
        """Choose fusion and weights by nDCG@10 on labelled queries, and say what that gains on held-out ones.

        Args:
            queries: Query texts by query id.
            qrels: For each query id the relevant records: ``{record id: grade}``, grade 1 or more.
            apply: Use the choice from now on, unless it gains nothing on the held-out queries.

        Returns:
            The choice, with nDCG before and after on the held-out queries.

        Raises:
            ValueError: There are too few labelled queries to hold some out, or the mode ranks by one score only.
        """
        if self.mode in ("dense", "sparse"):
            raise ValueError(
                f"mode {self.mode!r} ranks by one score only; tune a retriever of mode 'rescore' or 'union'"
            )
        names = sorted(queries)
        dense, sparse = self._encode([queries[name] for name in names])
        found = self._candidates(dense, sparse, self.candidates, None, None)
        scored = [
            ScoredQuery(name, [record.id for record in candidates.records], *_scores(query, candidates))
            for name, query, candidates in zip(names, sparse, found, strict=True)
        ]
        baseline = Trial(self.fusion, self.dense_weight, self.sparse_weight, self.fusion_options)
        tuning = tune(scored, qrels, calibration=self._stored_calibration(), baseline=baseline)
        if apply:
            self.fusion, self.fusion_options = tuning.fusion, dict(tuning.options)
            self.dense_weight, self.sparse_weight = tuning.dense_weight, tuning.sparse_weight
        return tuning

    def _encode(self, queries: Sequence[str]) -> tuple[FloatArray, SparseMatrix]:
        encoding = self.collection.encoder.encode_queries(queries)
        assert encoding.dense is not None
        assert encoding.sparse is not None
        return encoding.dense, encoding.sparse

    def _candidates(
        self,
        dense: FloatArray,
        sparse: SparseMatrix,
        k: int,
        where: Mapping[str, Any] | None,
        where_document: Mapping[str, Any] | None,
    ) -> list[Candidates]:
        """Return for each query the records that the mode considers."""
        n = max(k, self.candidates) if self.mode in ("rescore", "union") else k
        nearest: list[Candidates] | None = None
        if self.mode != "sparse":
            nearest = self.collection.nearest(dense, n, where=where, where_document=where_document)
        if nearest is not None and self.mode != "union":
            return nearest
        index = self.collection.lexical_index()
        unfiltered = where is None and where_document is None
        allowed = None if unfiltered else set(self.collection.matching_ids(where, where_document))
        found: list[Candidates] = []
        for row, (vector, query) in enumerate(zip(dense, sparse, strict=True)):
            known = set() if nearest is None else {record.id for record in nearest[row].records}
            best = [record_id for record_id, _ in index.search(query, n, allowed=allowed) if record_id not in known]
            lexical = self.collection.candidates(best, vector)
            found.append(lexical if nearest is None else nearest[row] + lexical)
        return found

    def _rank(self, query: SparseVector, candidates: Candidates, k: int) -> list[Hit]:
        dense_scores, sparse_scores = _scores(query, candidates)
        scores = self._fuse(dense_scores, sparse_scores)
        best = np.argsort(-scores, kind="stable")[:k]  # of equal scores the nearer dense vector first
        return [
            Hit(
                id=candidates.records[index].id,
                text=candidates.records[index].text,
                metadata=candidates.records[index].metadata,
                score=float(scores[index]),
                dense_score=float(dense_scores[index]),
                sparse_score=float(sparse_scores[index]),
                matches=token_matches(self.collection.encoder, query, candidates.sparse[index]),
            )
            for index in best
            if self.mode != "sparse" or sparse_scores[index] > 0
        ]

    def _fuse(self, dense: FloatArray, sparse: FloatArray) -> FloatArray:
        if self.mode == "dense":
            return dense
        if self.mode == "sparse":
            return sparse
        calibration = self._stored_calibration() if self.fusion == "calibrated" else None
        if self.fusion == "calibrated" and calibration is None:
            raise ValueError(
                f"collection {self.collection.name!r} has no calibration yet; call HybridRetriever(collection).calibrate() "
                "once, or choose another fusion"
            )
        fuse = fusion_named(self.fusion, options=self.fusion_options, calibration=calibration)
        return fuse(dense, sparse, dense_weight=self.dense_weight, sparse_weight=self.sparse_weight)

    def _stored_calibration(self) -> Calibration | None:
        if self._calibration is None:
            self._calibration = self.collection.calibration
        return self._calibration


def _scores(query: SparseVector, candidates: Candidates) -> tuple[FloatArray, FloatArray]:
    """Return the dense and the sparse scores of candidates: float32, shape (n,) each."""
    return candidates.dense_scores, candidates.sparse.dot(query)


def check_count(name: str, value: int) -> int:
    """Return a number of records asked for, or refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; give a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def _check_weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; give a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}; it must be finite and not negative")
    return float(value)
