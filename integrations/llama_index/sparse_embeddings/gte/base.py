"""Sparse GTE embeddings as a LlamaIndex sparse embedding model."""

from __future__ import annotations

import asyncio

from gte_rag.errors import missing_extra
from gte_rag.vectors import SparseVector
from llama_index.embeddings.gte.base import GTEEmbedding

try:
    from llama_index.core.base.embeddings.base_sparse import BaseSparseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

# Texts given to the encoder at once, as in GTEEmbedding.
_EMBED_BATCH_SIZE = 64


class GTESparseEmbedding(BaseSparseEmbedding):
    """Token weights of a GTE model, by token id; a text's dense and sparse vector cost one forward pass.

    ```python
    embed_model = GTEEmbedding()
    sparse_embed_model = GTESparseEmbedding(embed_model)
    ```
    """

    _embed_model: GTEEmbedding = PrivateAttr()

    def __init__(
        self,
        embed_model: GTEEmbedding | None = None,
        *,
        embed_batch_size: int = _EMBED_BATCH_SIZE,
        num_workers: int | None = None,
    ) -> None:
        """Share model and passes with a dense embedding model.

        Args:
            embed_model: The dense side, see `GTEEmbedding.share`; None is the bundled model on its own.
            embed_batch_size: How many texts LlamaIndex hands over at once, 1 to 2048; no effect on the vectors.
            num_workers: How many of these batches LlamaIndex's async calls run at the same time.

        Raises:
            TypeError: `embed_model` is something else.
            ValueError: The model gives no sparse vectors, or an option is out of range.
        """
        embed_model = checked(embed_model)
        super().__init__(model_name=embed_model.model_name, embed_batch_size=embed_batch_size, num_workers=num_workers)
        self._embed_model = embed_model

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores this class."""
        return "GTESparseEmbedding"

    def similarity(self, embedding1: dict[int, float], embedding2: dict[int, float]) -> float:
        """Return the sparse score, the sum of the products over shared tokens; LlamaIndex's own would be their cosine."""
        return SparseVector.from_dict(embedding1).dot(SparseVector.from_dict(embedding2))

    def _get_query_embedding(self, query: str) -> dict[int, float]:
        return self._embed_model.share().sparse([query], queries=True)[0].to_dict()

    async def _aget_query_embedding(self, query: str) -> dict[int, float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> dict[int, float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> dict[int, float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[dict[int, float]]:
        return [row.to_dict() for row in self._embed_model.share().sparse(texts)]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[dict[int, float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def checked(embed_model: GTEEmbedding | None) -> GTEEmbedding:
    """Return the dense side that a sparse adapter shares model and passes with; None is the bundled model.

    Raises:
        TypeError: `embed_model` is something else.
        ValueError: The model gives no sparse vectors.
    """
    if embed_model is None:
        embed_model = GTEEmbedding()
    if not isinstance(embed_model, GTEEmbedding):
        raise TypeError(f"embed_model is {type(embed_model).__name__}; give the index's GTEEmbedding")
    embed_model.share()
    return embed_model
