"""Sparse GTE vectors for LlamaIndex's Milvus store."""

from __future__ import annotations

import asyncio

from gte_rag.errors import missing_extra
from llama_index.embeddings.gte.base import GTEEmbedding
from llama_index.sparse_embeddings.gte.base import checked

try:
    from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
except ImportError as error:
    raise missing_extra("llama-index-vector-stores-milvus", "llama-index-milvus") from error


class GTEMilvusSparseEmbedding(BaseSparseEmbeddingFunction):
    """Token weights of a GTE model, for `MilvusVectorStore`.

    The store hands over a node's text without its metadata. A node without metadata costs one forward pass for its dense and
    sparse vector; of one with metadata the index embeds another text, so that there are two.

    ```python
    embed_model = GTEEmbedding()
    store = MilvusVectorStore(
        "./milvus.db", dim=256, enable_sparse=True, sparse_embedding_function=GTEMilvusSparseEmbedding(embed_model)
    )
    ```
    """

    def __init__(self, embed_model: GTEEmbedding | None = None) -> None:
        """Share model and passes with a dense embedding model.

        Args:
            embed_model: The index's dense side, see `GTEEmbedding.share`; None is the bundled model on its own.

        Raises:
            TypeError: `embed_model` is something else.
            ValueError: The model gives no sparse vectors.
        """
        self._embed_model = checked(embed_model)

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        """Return the token weights of each query, by token id."""
        return [row.to_dict() for row in self._embed_model.share().sparse(queries, queries=True)]

    async def async_encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        """Return what `encode_queries` returns, computed in a thread while the event loop goes on."""
        return await asyncio.to_thread(self.encode_queries, queries)

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        """Return the token weights of each document, by token id."""
        return [row.to_dict() for row in self._embed_model.share().sparse(documents)]

    async def async_encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        """Return what `encode_documents` returns, computed in a thread while the event loop goes on."""
        return await asyncio.to_thread(self.encode_documents, documents)
