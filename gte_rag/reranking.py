"""Retrieval in three stages: dense candidates, sparse scores, and a reranker that reads the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_rag.interface import TextReranker
from gte_rag.retriever import Hit, HybridRetriever, check_count


@dataclass(frozen=True)
class RerankedHit(Hit):
    """A retrieved text, why it was retrieved, and what the reranker says.

    Attributes:
        rerank_score: The reranker's logit that hits are sorted by; `score` stays the retriever's.
    """

    rerank_score: float = field(kw_only=True)


class RerankingRetriever:
    """Find candidates by meaning and words, then sort them with a reranker.

    ```python
    retriever = RerankingRetriever(HybridRetriever(collection), GTEReranker.from_pretrained(name), k=5)
    ```

    Attributes:
        retriever: Finds the candidates, in its own mode and with its own weights.
        reranker: Scores them together with the query.
        k: Number of hits returned.
        candidates: Number of hits of the retriever that the reranker reads; its cost is proportional to them.
    """

    def __init__(
        self, retriever: HybridRetriever, reranker: TextReranker, *, k: int = 10, candidates: int = 50
    ) -> None:
        """Set how to search.

        Raises:
            TypeError: `retriever` is no `HybridRetriever`, `reranker` no `TextReranker`, or a number is not a number.
            ValueError: A number is out of range.
        """
        if not isinstance(retriever, HybridRetriever):
            raise TypeError(f"retriever is {type(retriever).__name__}; give a HybridRetriever")
        if not isinstance(reranker, TextReranker):
            raise TypeError(f"reranker is {type(reranker).__name__}; give a GTEReranker")
        self.retriever = retriever
        self.reranker = reranker
        self.k = check_count("k", k)
        self.candidates = check_count("candidates", candidates)

    def search(
        self,
        query: str,
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[RerankedHit]:
        """Return the best hits for a query, best first; arguments and errors as for `HybridRetriever.search`.

        The retriever finds `candidates` hits, or `k` if that is more.
        """
        k = self.k if k is None else check_count("k", k)
        hits = self.retriever.search(query, k=max(k, self.candidates), where=where, where_document=where_document)
        return _reranked(hits, self.reranker.score_pairs([(query, hit.text) for hit in hits]), k)

    async def asearch(
        self,
        query: str,
        *,
        k: int | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[RerankedHit]:
        """Search in worker threads, so that the event loop goes on meanwhile; see `search`."""
        k = self.k if k is None else check_count("k", k)
        hits = await self.retriever.asearch(
            query, k=max(k, self.candidates), where=where, where_document=where_document
        )
        return _reranked(hits, await self.reranker.ascore_pairs([(query, hit.text) for hit in hits]), k)


def _reranked(hits: Sequence[Hit], scores: NDArray[np.float32], k: int) -> list[RerankedHit]:
    best = np.argsort(-scores, kind="stable")[:k]  # of equal scores the retriever's better hit first
    return [
        RerankedHit(
            **{item.name: getattr(hits[index], item.name) for item in fields(Hit)}, rerank_score=float(scores[index])
        )
        for index in best
    ]
