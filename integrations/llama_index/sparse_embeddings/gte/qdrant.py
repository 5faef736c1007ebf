"""Sparse GTE vectors for LlamaIndex's Qdrant store."""

from __future__ import annotations

from collections.abc import Callable

from gte_rag.vectors import SparseMatrix
from llama_index.embeddings.gte.base import GTEEmbedding
from llama_index.sparse_embeddings.gte.base import checked

# Token ids of each text, and their weights.
SparseVectors = tuple[list[list[int]], list[list[float]]]


def qdrant_sparse_functions(embed_model: GTEEmbedding | None = None) -> dict[str, Callable[[list[str]], SparseVectors]]:
    """Return `sparse_doc_fn` and `sparse_query_fn` for `QdrantVectorStore`.

    A node's dense and sparse vector cost one forward pass, because the store hands over the text that the index has embedded.

    ```python
    embed_model = GTEEmbedding()
    store = QdrantVectorStore("cities", client=client, enable_hybrid=True, **qdrant_sparse_functions(embed_model))
    ```

    Args:
        embed_model: The index's dense side, see `GTEEmbedding.share`; None is the bundled model on its own.

    Raises:
        TypeError: `embed_model` is something else.
        ValueError: The model gives no sparse vectors.
    """
    dense_side = checked(embed_model)

    def of_documents(texts: list[str]) -> SparseVectors:
        return _lists(dense_side.share().sparse(texts))

    def of_queries(texts: list[str]) -> SparseVectors:
        return _lists(dense_side.share().sparse(texts, queries=True))

    return {"sparse_doc_fn": of_documents, "sparse_query_fn": of_queries}


def _lists(matrix: SparseMatrix) -> SparseVectors:
    return [row.indices.tolist() for row in matrix], [row.values.tolist() for row in matrix]
