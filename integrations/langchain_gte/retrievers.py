"""Hybrid retrieval, dense and sparse, as a LangChain retriever."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr

from gte_rag.chroma import HybridCollection
from gte_rag.retriever import Hit, HybridRetriever
from langchain_gte.reranker import RERANK_SCORE_KEY

_SCORE_KEYS = ("gte_score", "gte_dense_score", "gte_sparse_score")


class GTEHybridRetriever(BaseRetriever):
    """Retrieves documents from a `HybridCollection` by dense and sparse scores together.

    Each `Document` has the record's text, id and metadata. Three keys of its metadata are always the retriever's and never
    come from the record: ``gte_score`` (what the results are ordered by), ``gte_dense_score`` (cosine) and
    ``gte_sparse_score``. `add_documents` leaves them and the reranker's ``gte_rerank_score`` out, so that retrieved documents
    can be stored again.

    ```python
    retriever = GTEHybridRetriever(collection=collection, k=5)
    retriever.invoke("a question", k=3, where={"language": "en"})
    ```

    Attributes:
        collection: The collection to search; its encoder embeds the queries.
        k: How many documents to return.
        candidates: How many documents the first stage gives to the second.
        mode: How candidates are found; see `gte_rag.retriever.HybridRetriever`.
        fusion: How the two scores become one; see there.
        dense_weight: Weight of the dense score.
        sparse_weight: Weight of the sparse score.
        where: Chroma filter on metadata.
        where_document: Chroma filter on the text.
    """

    # BaseRetriever ignores unknown options; a misspelt one must not go unnoticed.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    collection: HybridCollection = Field(frozen=True)
    k: int = 10
    candidates: int = Field(default=100, frozen=True)
    mode: str = Field(default="rescore", frozen=True)
    fusion: str = Field(default="weighted", frozen=True)
    dense_weight: float = Field(default=1.0, frozen=True)
    sparse_weight: float = Field(default=0.3, frozen=True)
    where: dict[str, Any] | None = None
    where_document: dict[str, Any] | None = None

    _retriever: HybridRetriever = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:  # noqa: ANN401
        """Build the core's retriever, which checks the options."""
        self._retriever = HybridRetriever(
            self.collection,
            k=self.k,
            candidates=self.candidates,
            mode=self.mode,
            fusion=self.fusion,
            dense_weight=self.dense_weight,
            sparse_weight=self.sparse_weight,
        )

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        *,
        collection: HybridCollection,
        **options: Any,  # noqa: ANN401
    ) -> GTEHybridRetriever:
        """Add documents to a collection and return a retriever over it.

        Args:
            documents: As for `add_documents`.
            collection: Where to put them; what it holds already stays.
            **options: The other fields of the class.

        Returns:
            The retriever; it searches everything in the collection.
        """
        retriever = cls(collection=collection, **options)
        retriever.add_documents(documents)
        return retriever

    def add_documents(self, documents: Sequence[Document]) -> list[str]:
        """Embed documents and put them into the collection.

        Args:
            documents: A document whose id is in the collection replaces text, vectors and metadata of that record; one
                without id gets a new random id.

        Returns:
            The ids, in the order of `documents`.

        Raises:
            ValueError: Metadata has a value that Chroma cannot hold, or two documents have the same id.
        """
        ids = [document.id or str(uuid.uuid4()) for document in documents]
        metadatas = [
            {key: value for key, value in document.metadata.items() if key not in (*_SCORE_KEYS, RERANK_SCORE_KEY)}
            for document in documents
        ]
        self.collection.upsert(ids, [document.page_content for document in documents], metadatas=metadatas)
        return ids

    async def aadd_documents(self, documents: Sequence[Document]) -> list[str]:
        """Do what `add_documents` does in a thread, while the event loop goes on."""
        return await asyncio.to_thread(self.add_documents, documents)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        where: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
    ) -> list[Document]:
        """Search; an option given to the call replaces the field of that name."""
        return _documents(self._retriever.search(query, **self._options(k, where, where_document)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        where: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
    ) -> list[Document]:
        """Search without blocking the event loop; an option given to the call replaces the field of that name."""
        return _documents(await self._retriever.asearch(query, **self._options(k, where, where_document)))

    def _options(
        self, k: int | None, where: dict[str, Any] | None, where_document: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "k": self.k if k is None else k,
            "where": self.where if where is None else where,
            "where_document": self.where_document if where_document is None else where_document,
        }


def _documents(hits: Sequence[Hit]) -> list[Document]:
    return [
        Document(
            page_content=hit.text,
            id=hit.id,
            metadata={
                **hit.metadata,
                **dict(zip(_SCORE_KEYS, (hit.score, hit.dense_score, hit.sparse_score), strict=True)),
            },
        )
        for hit in hits
    ]
