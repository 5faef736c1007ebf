"""Hybrid retrieval: dense search in Chroma, exact sparse scores, one fused ranking."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gte_rag.chroma import Candidate, HybridCollection, MetadataValue
from gte_rag.fusion import weighted
from gte_rag.vectors import SparseVector

MODES = ("rescore",)
FUSIONS = ("weighted",)


@dataclass(frozen=True)
class TokenMatch:
    """A token that query and document share.

    Attributes:
        token: The token as text.
        query_weight: Its weight in the query.
        document_weight: Its weight in the document.
    """

    token: str
    query_weight: float
    document_weight: float

    @property
    def weight(self) -> float:
        """What the token adds to the sparse score."""
        return self.query_weight * self.document_weight


@dataclass(frozen=True)
class Hit:
    """A retrieved text and why it was retrieved.

    Attributes:
        id: Id of the record.
        text: Its text.
        metadata: Its metadata.
        score: The fused score that hits are sorted by.
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

    A query is encoded once. Chroma finds the `candidates` nearest dense vectors; their exact sparse scores are computed
    from the stored sparse vectors; the fused score ranks them.

    Attributes:
        collection: The collection that is searched.
        k: Number of hits returned.
        candidates: Number of records that dense search hands over to sparse scoring.
        mode: ``"rescore"``.
        fusion: ``"weighted"``: ``dense_weight * cosine + sparse_weight * sparse score``.
        dense_weight: Weight of the cosine.
        sparse_weight: Weight of the sparse score.
    """

    def __init__(
        self,
        collection: HybridCollection,
        *,
        k: int = 10,
        candidates: int = 100,
        mode: str = "rescore",
        fusion: str = "weighted",
        dense_weight: float = 1.0,
        sparse_weight: float = 0.3,
    ) -> None:
        """Set how to search.

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
        self.collection = collection
        self.k = _check_count("k", k)
        self.candidates = _check_count("candidates", candidates)
        self.mode = mode
        self.fusion = fusion
        self.dense_weight = _check_weight("dense_weight", dense_weight)
        self.sparse_weight = _check_weight("sparse_weight", sparse_weight)

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
            ValueError: `k` is out of range, or Chroma refuses a filter.
        """
        if not isinstance(query, str):
            raise TypeError(f"query is {type(query).__name__}; give one string")
        k = self.k if k is None else _check_count("k", k)
        encoding = self.collection.encoder.encode_queries([query])
        assert encoding.dense is not None
        assert encoding.sparse is not None
        dense, sparse = encoding.dense[0], encoding.sparse[0]
        candidates = self.collection.nearest(dense, max(k, self.candidates), where=where, where_document=where_document)
        return self._rank(sparse, candidates, k)

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

    def _rank(self, query: SparseVector, candidates: list[Candidate], k: int) -> list[Hit]:
        dense_scores = np.array([candidate.dense_score for candidate in candidates], dtype=np.float64)
        sparse_scores = np.array([query.dot(candidate.sparse) for candidate in candidates], dtype=np.float64)
        scores = weighted(dense_scores, sparse_scores, dense_weight=self.dense_weight, sparse_weight=self.sparse_weight)
        best = np.argsort(-scores, kind="stable")[:k]  # of equal scores the nearer dense vector first
        return [
            Hit(
                id=candidates[index].record.id,
                text=candidates[index].record.text,
                metadata=candidates[index].record.metadata,
                score=float(scores[index]),
                dense_score=float(dense_scores[index]),
                sparse_score=float(sparse_scores[index]),
                matches=self._matches(query, candidates[index].sparse),
            )
            for index in best
        ]

    def _matches(self, query: SparseVector, document: SparseVector) -> tuple[TokenMatch, ...]:
        shared, mine, theirs = np.intersect1d(query.indices, document.indices, assume_unique=True, return_indices=True)
        tokens = self.collection.encoder.token_strings(shared.tolist())
        matches = map(TokenMatch, tokens, query.values[mine].tolist(), document.values[theirs].tolist())
        return tuple(sorted(matches, key=lambda match: -match.weight))


def _check_count(name: str, value: int) -> int:
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
