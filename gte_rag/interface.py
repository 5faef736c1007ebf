"""What every encoder and every reranker offers, wherever its model runs.

`gte_rag.encoder` and `gte_rag.reranker` run a model in this process, `gte_rag.remote` asks a service. Adapters and collections
take any of them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_rag.tokenization import check_pairs, check_texts
from gte_rag.vectors import Encoding, FloatArray, SparseVector

PROGRESS_DELAY_S = 2.0  # work that is shorter shows no progress bar


class TextEncoder(ABC):
    """Turns texts into dense vectors and sparse token weights.

    Attributes:
        name: The model's name.
        dimension: Length of the dense vectors when a call does not say otherwise.
    """

    name: str
    dimension: int

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, the width of the sparse vectors."""

    @property
    @abstractmethod
    def has_sparse(self) -> bool:
        """Whether the model gives sparse vectors."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex characters that name the model; vectors of one fingerprint go together."""

    @abstractmethod
    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode search queries.

        Args:
            texts: The queries; ``[]`` gives zero rows.
            dense: Whether to return dense vectors.
            sparse: Whether to return sparse vectors.
            dimension: Length of the dense vectors; None is the encoder's own.
            show_progress: Show a progress bar on stderr once the work has taken two seconds.

        Returns:
            Row i belongs to ``texts[i]`` and does not depend on the other texts.

        Raises:
            TypeError: `texts` is not a list of strings.
            ValueError: A text is not valid Unicode, or `dimension` is out of range, or neither vector is asked for.
            CheckpointError: Sparse vectors are asked for and the model gives none.
        """

    @abstractmethod
    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode documents or passages; arguments, result and errors as for `encode_queries`."""

    @abstractmethod
    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text."""

    async def aencode_queries(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode queries in a worker thread, so that the event loop goes on meanwhile; see `encode_queries`."""
        return await _in_thread(
            self.encode_queries, texts, dense=dense, sparse=sparse, dimension=dimension, show_progress=show_progress
        )

    async def aencode_documents(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode documents in a worker thread, so that the event loop goes on meanwhile; see `encode_queries`."""
        return await _in_thread(
            self.encode_documents, texts, dense=dense, sparse=sparse, dimension=dimension, show_progress=show_progress
        )

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        dense_weight: float = 1.0,
        sparse_weight: float = 0.3,
    ) -> FloatArray:
        """Score query-document pairs: ``dense_weight * cosine + sparse_weight * sparse score``.

        The default weights are those of the model card's example. A component of weight 0 is not computed.

        Args:
            pairs: (query, document) tuples; ``[]`` gives an empty array.
            dense_weight: Weight of the cosine of the dense vectors.
            sparse_weight: Weight of the sparse score, the sum of products of the weights of shared tokens.

        Returns:
            float32, shape (number of pairs,).

        Raises:
            TypeError: `pairs` is not a list of pairs of strings, or a weight is not a number.
            ValueError: A text is not valid Unicode, or a weight is not finite.
            CheckpointError: The sparse score is asked for and the model gives no sparse vectors.
        """
        pairs = check_pairs(pairs)
        for name, weight in (("dense_weight", dense_weight), ("sparse_weight", sparse_weight)):
            if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} is {weight!r}; give a number")
            if not np.isfinite(weight):
                raise ValueError(f"{name} is {weight!r}; give a finite number")
        scores = np.zeros(len(pairs), dtype=np.float32)
        wanted = {"dense": dense_weight != 0, "sparse": sparse_weight != 0}
        if not pairs or not any(wanted.values()):
            return scores
        queries = self.encode_queries([query for query, _ in pairs], **wanted)
        documents = self.encode_documents([document for _, document in pairs], **wanted)
        if queries.dense is not None and documents.dense is not None:
            scores += np.float32(dense_weight) * np.einsum("nd,nd->n", queries.dense, documents.dense)
        if queries.sparse is not None and documents.sparse is not None:
            products = [query.dot(document) for query, document in zip(queries.sparse, documents.sparse, strict=True)]
            scores += np.float32(sparse_weight) * np.array(products, dtype=np.float32)
        return scores

    def token_weights(self, sparse_vector: SparseVector) -> dict[str, float]:
        """Return a sparse vector for people: token strings and weights, highest first.

        Different tokens can have the same string (``▁the`` and ``the``); the larger weight is kept, as in the reference.
        Scores are computed on token ids, where nothing collides.
        """
        weights: dict[str, float] = {}
        strings = self.token_strings(sparse_vector.indices.tolist())
        for string, weight in zip(strings, sparse_vector.values.tolist(), strict=True):
            weights[string] = max(weight, weights.get(string, 0.0))
        return dict(sorted(weights.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class RerankResult:
    """A text and how well it answers the query.

    Attributes:
        index: Position of the text in the caller's list.
        text: The text.
        score: The score, higher is better; `score_pairs` says on what scale.
    """

    index: int
    text: str
    score: float


class TextReranker(ABC):
    """Scores how well texts answer a query.

    Attributes:
        name: The model's name.
    """

    name: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex characters that name the model."""

    @abstractmethod
    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> FloatArray:
        """Score query-text pairs.

        Args:
            pairs: (query, text) tuples; ``[]`` gives an empty array.

        Returns:
            float32, shape (number of pairs,), higher is better.

        Raises:
            TypeError: `pairs` is not a list of pairs of strings.
            ValueError: A text is not valid Unicode.
        """

    def rerank(self, query: str, texts: Sequence[str], *, top_k: int | None = None) -> list[RerankResult]:
        """Sort texts by how well they answer a query.

        Args:
            query: The question or search words.
            texts: The texts; ``[]`` gives ``[]``.
            top_k: How many to return; None returns all.

        Returns:
            The best texts, best first; of equal ones the earlier first.

        Raises:
            TypeError: `query` is not a string, or `texts` is not a list of strings.
            ValueError: A text is not valid Unicode, or `top_k` is less than 1.
        """
        checked = _check_call(query, texts, top_k)
        return _ranked(checked, self.score_pairs([(query, text) for text in checked]), top_k)

    async def arerank(self, query: str, texts: Sequence[str], *, top_k: int | None = None) -> list[RerankResult]:
        """Rerank in a worker thread, so that the event loop goes on meanwhile; see `rerank`."""
        return await asyncio.to_thread(partial(self.rerank, query, texts, top_k=top_k))

    async def ascore_pairs(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Score pairs in a worker thread, so that the event loop goes on meanwhile; see `score_pairs`."""
        return await asyncio.to_thread(self.score_pairs, pairs)


async def _in_thread(function: Callable[..., Encoding], *args: Any, **options: Any) -> Encoding:  # noqa: ANN401
    return await asyncio.to_thread(partial(function, *args, **options))


def _check_call(query: str, texts: Sequence[str], top_k: int | None) -> list[str]:
    if not isinstance(query, str):
        raise TypeError(f"query is {type(query).__name__}; give one string")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)):
            raise TypeError(f"top_k is {top_k!r}; give a whole number or None")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all texts")
    return check_texts(texts)


def _ranked(texts: Sequence[str], scores: NDArray[np.float32], top_k: int | None) -> list[RerankResult]:
    best = np.argsort(-scores, kind="stable")[:top_k]
    return [RerankResult(int(index), texts[index], float(scores[index])) for index in best]
