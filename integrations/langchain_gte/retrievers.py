"""Hybrid retrieval, dense and sparse, as a LangChain retriever."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr

from gte_rag.chroma import HybridCollection
from gte_rag.interface import TextEncoder
from gte_rag.retriever import Hit, HybridRetriever
from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.reranker import RERANK_SCORE_KEY

if TYPE_CHECKING:
    from langchain_chroma import Chroma

# Metadata keys of retrieved documents; stores leave them out, so that what was retrieved can be stored again.
SCORE_KEYS = ("gte_score", "gte_dense_score", "gte_sparse_score")
FOUND_KEYS = frozenset({*SCORE_KEYS, RERANK_SCORE_KEY})  # what a search adds to metadata, and nobody stores


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
        fusion_options: Further options of the fusion; see there.
        dense_weight: Weight of the dense score.
        sparse_weight: Weight of the sparse score; None is the fusion's own.
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
    fusion_options: dict[str, float] | None = Field(default=None, frozen=True)
    dense_weight: float = Field(default=1.0, frozen=True)
    sparse_weight: float | None = Field(default=None, frozen=True)
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
            fusion_options=self.fusion_options,
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

    @classmethod
    def from_chroma(
        cls,
        store: Chroma,
        *,
        encoder: TextEncoder | None = None,
        backfill: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> GTEHybridRetriever:
        """Return a retriever over an existing `langchain_chroma.Chroma`, whoever filled it with this model's dense vectors.

        Some of its texts are encoded and compared with its vectors first. Nothing is written, unless `backfill` is set:
        sparse vectors are computed for the candidates of each search, which costs the encoding of up to `candidates` texts.

        Args:
            store: The vector store; any distance that gives the order of the cosine will do, the default one included.
            encoder: The model that made the vectors; None takes that of the store's embeddings, a `GTEEmbeddings`.
            backfill: Store the sparse vectors once and for all, in one more metadata key of each record. Documents, dense
                vectors and other metadata stay as they are.
            **options: The other fields of the class.

        Returns:
            The retriever; documents that are added to the store later are found as well.

        Raises:
            CollectionMismatchError: The vectors come from another model, or have another dimension.
            TypeError: `store` is no `langchain_chroma.Chroma`, or has other embeddings and no encoder is given.
        """
        # The store gives no public way to its client.
        client, collection = getattr(store, "_client", None), getattr(store, "_collection", None)
        if client is None or collection is None:
            raise TypeError(f"store is {type(store).__name__}; give a langchain_chroma.Chroma")
        if encoder is None:
            embeddings = store.embeddings
            if not isinstance(embeddings, GTEEmbeddings):
                raise TypeError(
                    f"the store's embeddings are {type(embeddings).__name__}, which give no sparse vectors; pass the "
                    "GTEEncoder of the same model as encoder=..."
                )
            encoder = embeddings.encoder
        adopted = HybridCollection(client, collection.name, encoder=encoder, adopt=True)
        if backfill:
            adopted.backfill()
        return cls(collection=adopted, **options)

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
            {key: value for key, value in document.metadata.items() if key not in FOUND_KEYS} for document in documents
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
                **dict(zip(SCORE_KEYS, (hit.score, hit.dense_score, hit.sparse_score), strict=True)),
            },
        )
        for hit in hits
    ]
