"""Sparse GTE vectors for the hybrid and sparse modes of `langchain_qdrant`."""

from __future__ import annotations

from gte_rag import vectors
from gte_rag.errors import missing_extra
from langchain_gte.sparse import SparseSide

try:
    from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector
except ImportError as error:
    raise missing_extra("langchain-qdrant", "langchain-qdrant") from error


class GTESparseEmbeddings(SparseSide, SparseEmbeddings):
    """Token weights of a GTE model, for `QdrantVectorStore`: a text's dense and sparse vector cost one forward pass.

    ```python
    embeddings = GTEEmbeddings()
    store = QdrantVectorStore.from_texts(
        texts,
        embeddings,
        sparse_embedding=GTESparseEmbeddings(embeddings),
        retrieval_mode=RetrievalMode.HYBRID,
        path="./qdrant",
    )
    ```
    """

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Return the token weights of each document, by token id."""
        return [_stored(row) for row in self._of_documents(texts)]

    def embed_query(self, text: str) -> SparseVector:
        """Return the token weights of a query, by token id."""
        return _stored(self._of_query(text))


def _stored(vector: vectors.SparseVector) -> SparseVector:
    return SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())
