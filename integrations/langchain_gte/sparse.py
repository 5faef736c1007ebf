"""What the sparse adapters of all stores have in common: the dense side that they share model and passes with."""

from __future__ import annotations

from gte_rag.vectors import SparseMatrix, SparseVector
from langchain_gte.embeddings import GTEEmbeddings


class SparseSide:
    """Token weights that come from the same forward pass as the vectors of a `GTEEmbeddings`."""

    def __init__(self, embeddings: GTEEmbeddings | None = None) -> None:
        """Share model and passes with dense embeddings.

        Args:
            embeddings: The dense side of the same store, see `GTEEmbeddings.share`; None is the bundled model on its own.

        Raises:
            TypeError: `embeddings` is something else.
            ValueError: The model gives no sparse vectors.
        """
        if embeddings is None:
            embeddings = GTEEmbeddings()
        if not isinstance(embeddings, GTEEmbeddings):
            raise TypeError(f"embeddings is {type(embeddings).__name__}; give the store's GTEEmbeddings")
        embeddings.share()
        self._embeddings = embeddings

    def _of_documents(self, texts: list[str]) -> SparseMatrix:
        return self._embeddings.share().sparse(texts)

    def _of_query(self, text: str) -> SparseVector:
        return self._embeddings.share().sparse([text], queries=True)[0]
