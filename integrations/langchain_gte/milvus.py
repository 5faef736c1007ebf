"""Sparse GTE vectors for the sparse fields of `langchain_milvus`."""

from __future__ import annotations

from gte_rag.errors import missing_extra
from langchain_gte.sparse import SparseSide

try:
    from langchain_milvus.utils.sparse import BaseSparseEmbedding
except ImportError as error:
    raise missing_extra("langchain-milvus", "langchain-milvus") from error


class GTEMilvusSparseEmbeddings(SparseSide, BaseSparseEmbedding):
    """Token weights of a GTE model, for `Milvus`: a text's dense and sparse vector cost one forward pass.

    ```python
    embeddings = GTEEmbeddings()
    store = Milvus(
        [embeddings, GTEMilvusSparseEmbeddings(embeddings)],
        vector_field=["dense", "sparse"],
        index_params=[{"metric_type": "IP", "index_type": "AUTOINDEX"}, {"metric_type": "IP", "index_type": "AUTOINDEX"}],
        connection_args={"uri": "./milvus.db"},
    )
    ```
    """

    def embed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        """Return the token weights of each document, by token id."""
        return [row.to_dict() for row in self._of_documents(texts)]

    def embed_query(self, query: str) -> dict[int, float]:
        """Return the token weights of a query, by token id."""
        return self._of_query(query).to_dict()
