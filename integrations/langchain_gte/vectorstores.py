"""A LangChain vector store on Chroma that has hybrid search, a drop-in for `langchain_chroma.Chroma`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import chromadb
import numpy as np
from chromadb.api import ClientAPI
from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT, Settings
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from pydantic import ConfigDict

from gte_rag.chroma import HybridCollection
from gte_rag.neighbours import neighbours
from gte_rag.records import RESERVED_KEY, Record
from gte_rag.retriever import HybridRetriever
from gte_rag.vectors import FloatArray
from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.retrievers import FOUND_KEYS

_DEFAULT_NAME = "langchain"  # langchain_chroma's, so that replacing the class name finds the same collection
_DEFAULT_K = 4  # LangChain's
_FETCH_K = 20  # LangChain's
_SERVER_PORT = 8000  # Chroma's
Filter = Mapping[str, Any]


class GTEChroma(VectorStore):
    """Documents with dense and sparse vectors in one Chroma collection.

    Options that `langchain_chroma.Chroma` has too have the same names, so replacing the class name is enough:

    ```python
    store = GTEChroma.from_documents(documents, GTEEmbeddings(), persist_directory="./db")
    store.as_retriever(search_type="hybrid", search_kwargs={"k": 5, "filter": {"language": "en"}})
    ```

    What differs: `hybrid_search` works on every Chroma, not only in the cloud; adding an id again replaces the document with
    all of its metadata; any number of documents can be added at once; the distance is always the cosine. A collection is
    tied to the model of its embeddings and refuses another one. One that `langchain_chroma` filled with vectors of the same
    model opens with ``adopt=True``.

    Every method has an async twin that runs in a thread while the event loop goes on.
    """

    def __init__(
        self,
        collection_name: str = _DEFAULT_NAME,
        embedding_function: Embeddings | None = None,
        persist_directory: str | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        ssl: bool = False,
        headers: dict[str, str] | None = None,
        tenant: str | None = None,
        database: str | None = None,
        client_settings: Settings | None = None,
        client: ClientAPI | None = None,
        collection_metadata: Mapping[str, Any] | None = None,
        collection_configuration: Mapping[str, Any] | None = None,
        relevance_score_fn: Callable[[float], float] | None = None,
        create_collection_if_not_exists: bool = True,
        adopt: bool = False,
    ) -> None:
        """Open the collection, or create it.

        Without `persist_directory`, `host` and `client` the collection is in memory, where stores of the same process and
        `collection_name` share it, as with `langchain_chroma`.

        Args:
            collection_name: Name of the collection, as Chroma allows it.
            embedding_function: A `GTEEmbeddings`; its encoder makes the dense and the sparse vectors.
            persist_directory: Folder of a local database.
            host: Host name of a Chroma server.
            port: Its port; None is 8000.
            ssl: Whether to connect to it by SSL.
            headers: HTTP headers to send to it.
            tenant: Chroma's tenant; None is the default one.
            database: Chroma's database; None is the default one.
            client_settings: Chroma's settings.
            client: A ready-made Chroma client instead of all these.
            collection_metadata: Accepted with ``"hnsw:space": "cosine"`` only, which holds anyway.
            collection_configuration: Accepted as ``{"hnsw": {"space": "cosine"}}`` only, which holds anyway.
            relevance_score_fn: Gives the relevance, 0 to 1, for a cosine distance; None cuts ``1 - distance`` to that range.
            create_collection_if_not_exists: False: the collection must exist.
            adopt: Open a collection that another program filled with dense vectors of this very model; see
                `HybridCollection`.

        Raises:
            CollectionMismatchError: The collection was made by another model, dimension or distance.
            TypeError: `embedding_function` is no `GTEEmbeddings`.
            ValueError: Options contradict each other or ask for another distance than the cosine.
        """
        if not isinstance(embedding_function, GTEEmbeddings):
            raise TypeError(
                f"embedding_function is {type(embedding_function).__name__}; give a langchain_gte.GTEEmbeddings, whose model "
                "makes the sparse vectors too. For other embeddings there is langchain_chroma.Chroma"
            )
        if embedding_function.dimension not in (None, embedding_function.encoder.dimension):
            raise ValueError(
                f"embedding_function gives {embedding_function.dimension} dimensions and its encoder "
                f"{embedding_function.encoder.dimension}; load the encoder with that dimension instead"
            )
        _check_distance(collection_metadata, collection_configuration)
        places = {"client": client, "persist_directory": persist_directory, "host": host}
        if len(given := [name for name, value in places.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are given; one of them says where the collection is")
        self._embeddings = embedding_function
        self._client = client or _open(
            persist_directory,
            host,
            port=_SERVER_PORT if port is None else port,
            ssl=ssl,
            headers=headers,
            settings=client_settings or Settings(),
            tenant=tenant or DEFAULT_TENANT,
            database=database or DEFAULT_DATABASE,
        )
        if not create_collection_if_not_exists:
            self._client.get_collection(collection_name, embedding_function=None)  # refuses a name that does not exist
        self._relevance_score_fn = relevance_score_fn
        self._collection = HybridCollection(
            self._client, collection_name, encoder=embedding_function.encoder, adopt=adopt
        )

    @property
    def collection(self) -> HybridCollection:
        """The collection, for everything that LangChain has no word for, such as calibration or `backfill`."""
        return self._collection

    @property
    def embeddings(self) -> GTEEmbeddings:
        """The embeddings in use."""
        return self._embeddings

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> GTEChroma:
        """Open or create a collection, add texts to it and return the store; `from_documents` does so with documents.

        Args:
            texts: As for `add_texts`.
            embedding: The `embedding_function` of the class.
            metadatas: As for `add_texts`.
            ids: As for `add_texts`.
            **options: The other options of the class.
        """
        store = cls(embedding_function=embedding, **options)
        store.add_texts(texts, metadatas, ids)
        return store

    def add_texts(  # type: ignore[override]  # no **kwargs: a misspelt option must not go unnoticed
        self,
        texts: Iterable[str],
        metadatas: Sequence[Mapping[str, Any] | None] | None = None,
        ids: Sequence[str | None] | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[str]:
        """Embed texts and put them into the collection; `add_documents` does so with documents.

        Args:
            texts: The texts, any number.
            metadatas: For each text its metadata or None.
            ids: For each text its id, or None for a new random one. An id that is in the collection has its text, vectors and
                metadata replaced.
            batch_size: Accepted without effect: LangChain's indexing passes it on.

        Returns:
            The ids, in the order of `texts`.

        Raises:
            ValueError: Lengths differ, an id is given twice, or Chroma cannot hold a metadata value. Nothing is written then.
        """
        texts = list(texts)
        ids = [None] * len(texts) if ids is None else ids
        named = [str(uuid.uuid4()) if name is None else name for name in ids]
        if metadatas is not None:  # documents may come from a retriever that has put scores there
            metadatas = [
                metadata and {key: value for key, value in metadata.items() if key not in FOUND_KEYS}
                for metadata in metadatas
            ]
        self._collection.upsert(named, texts, metadatas=metadatas)
        return named

    def update_document(self, document_id: str, document: Document) -> None:
        """Replace a document, or add it."""
        self.update_documents([document_id], [document])

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Replace documents, or add them."""
        self.add_documents(documents, ids=ids)

    def delete(  # type: ignore[override]
        self, ids: list[str] | None = None, *, where: Filter | None = None, where_document: Filter | None = None
    ) -> bool:
        """Delete documents by id, by filter, or by both together; ids that do not exist are no error.

        Returns:
            True.

        Raises:
            ValueError: Neither ids nor a filter is given; `reset_collection` deletes everything.
        """
        if ids is None and where is None and where_document is None:
            raise ValueError("delete needs ids or a filter; reset_collection() deletes everything")
        self._collection.delete(
            None if ids is None else list(dict.fromkeys(ids)), where=where, where_document=where_document
        )
        return True

    def delete_collection(self) -> None:
        """Delete the collection; the store is of no use afterwards."""
        self._client.delete_collection(self._collection.name)

    def reset_collection(self) -> None:
        """Delete all documents by deleting the collection and making it anew."""
        self.delete_collection()
        self._collection = HybridCollection(self._client, self._collection.name, encoder=self._embeddings.encoder)

    def get(
        self,
        ids: str | list[str] | None = None,
        where: Filter | None = None,
        limit: int | None = None,
        offset: int | None = None,
        where_document: Filter | None = None,
        include: list[str] | None = None,
    ) -> dict[str, Any]:
        """Return what Chroma's own `get` returns, without the sparse vectors that are kept in the metadata."""
        filters: dict[str, Any] = {"where": where, "where_document": where_document, "limit": limit, "offset": offset}
        if include is not None:
            filters["include"] = include
        found: dict[str, Any] = dict(self._collection.collection.get(ids, **filters))
        if found["metadatas"] is not None:
            found["metadatas"] = [
                {key: value for key, value in (metadata or {}).items() if key != RESERVED_KEY}
                for metadata in found["metadatas"]
            ]
        return found

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents of those ids that exist, in the order of `ids`."""
        return [_document(record) for record in self._collection.get(list(dict.fromkeys(ids)))]

    def similarity_search(  # type: ignore[override]
        self, query: str, k: int = _DEFAULT_K, filter: Filter | None = None, *, where_document: Filter | None = None
    ) -> list[Document]:
        """Return the documents whose dense vectors are nearest to the query's, nearest first.

        Args:
            query: The question or search words.
            k: How many documents to return.
            filter: Chroma's filter on metadata, for example ``{"year": {"$gte": 2020}}``.
            where_document: Chroma's filter on texts, for example ``{"$contains": "Beijing"}``.

        Raises:
            ValueError: `k` is less than 1, or Chroma refuses a filter.
        """
        return [found for found, _ in self.similarity_search_with_score(query, k, filter, where_document)]

    def similarity_search_with_score(
        self, query: str, k: int = _DEFAULT_K, filter: Filter | None = None, where_document: Filter | None = None
    ) -> list[tuple[Document, float]]:
        """Return what `similarity_search` returns, each with its cosine distance: 0 (nearest) to 2."""
        return self.similarity_search_by_vector_with_relevance_scores(
            self._embeddings.embed_query(query), k, filter, where_document
        )

    def similarity_search_by_vector(  # type: ignore[override]
        self,
        embedding: list[float],
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
    ) -> list[Document]:
        """Return the documents whose dense vectors are nearest to a vector; otherwise like `similarity_search`."""
        return [
            found
            for found, _ in self.similarity_search_by_vector_with_relevance_scores(embedding, k, filter, where_document)
        ]

    def similarity_search_by_vector_with_relevance_scores(
        self,
        embedding: list[float],
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
    ) -> list[tuple[Document, float]]:
        """Return documents and their cosine distances; the name, which says otherwise, is langchain_chroma's."""
        found = neighbours(self._collection, embedding, k, where=filter, where_document=where_document)
        return [(_document(neighbour.record), 1 - neighbour.cosine) for neighbour in found]

    def similarity_search_with_vectors(
        self, query: str, k: int = _DEFAULT_K, filter: Filter | None = None, where_document: Filter | None = None
    ) -> list[tuple[Document, FloatArray]]:
        """Return what `similarity_search` returns, each with its dense vector: float32, shape (dimension,)."""
        vector = self._embeddings.embed_query(query)
        found = neighbours(self._collection, vector, k, where=filter, where_document=where_document)
        return [(_document(neighbour.record), neighbour.vector) for neighbour in found]

    def max_marginal_relevance_search(  # type: ignore[override]
        self,
        query: str,
        k: int = _DEFAULT_K,
        fetch_k: int = _FETCH_K,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        where_document: Filter | None = None,
    ) -> list[Document]:
        """Return documents that are near to the query and far from each other, in the order in which they are chosen.

        Args:
            query: The question or search words.
            k: How many documents to return.
            fetch_k: How many of the nearest documents to choose from.
            lambda_mult: 0 for the most diverse choice to 1 for the nearest documents.
            filter: As for `similarity_search`.
            where_document: As for `similarity_search`.
        """
        return self.max_marginal_relevance_search_by_vector(
            self._embeddings.embed_query(query), k, fetch_k, lambda_mult, filter, where_document
        )

    def max_marginal_relevance_search_by_vector(  # type: ignore[override]
        self,
        embedding: list[float],
        k: int = _DEFAULT_K,
        fetch_k: int = _FETCH_K,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        where_document: Filter | None = None,
    ) -> list[Document]:
        """Return documents that are near to a vector and far from each other; see `max_marginal_relevance_search`."""
        found = neighbours(self._collection, embedding, max(k, fetch_k), where=filter, where_document=where_document)
        if not found:
            return []
        chosen = maximal_marginal_relevance(
            np.asarray(embedding, dtype=np.float32),
            [item.vector.tolist() for item in found],
            lambda_mult=lambda_mult,
            k=k,
        )
        return [_document(found[index].record) for index in chosen]

    def hybrid_search(
        self,
        query: str,
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[Document]:
        """Return the best documents by dense and sparse score together, best first.

        Args:
            query: The question or search words.
            k: How many documents to return.
            filter: As for `similarity_search`.
            where_document: As for `similarity_search`.
            **options: `mode`, `candidates`, `fusion`, `fusion_options`, `dense_weight`, `sparse_weight` of `HybridRetriever`.

        Raises:
            ValueError: An option is out of range, or Chroma refuses a filter.
        """
        return [found for found, _ in self.hybrid_search_with_score(query, k, filter, where_document, **options)]

    def hybrid_search_with_score(
        self,
        query: str,
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[tuple[Document, float]]:
        """Return what `hybrid_search` returns, each with its score, the higher the better."""
        hits = HybridRetriever(self._collection, k=k, **options).search(
            query, where=filter, where_document=where_document
        )
        return [(Document(page_content=hit.text, id=hit.id, metadata=hit.metadata), hit.score) for hit in hits]

    async def ahybrid_search(
        self,
        query: str,
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[Document]:
        """Do what `hybrid_search` does in a thread."""
        return await asyncio.to_thread(self.hybrid_search, query, k, filter, where_document, **options)

    async def ahybrid_search_with_score(
        self,
        query: str,
        k: int = _DEFAULT_K,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[tuple[Document, float]]:
        """Do what `hybrid_search_with_score` does in a thread."""
        return await asyncio.to_thread(self.hybrid_search_with_score, query, k, filter, where_document, **options)

    def search(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Return documents by ``"hybrid"``, ``"similarity"``, ``"mmr"`` or ``"similarity_score_threshold"`` search."""
        if search_type == "hybrid":
            return self.hybrid_search(query, **kwargs)
        return super().search(query, search_type, **kwargs)

    async def asearch(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Do what `search` does in a thread."""
        if search_type == "hybrid":
            return await self.ahybrid_search(query, **kwargs)
        return await super().asearch(query, search_type, **kwargs)

    def as_retriever(self, **kwargs: Any) -> GTEChromaRetriever:  # noqa: ANN401
        """Return a retriever over the store.

        Args:
            **kwargs: `search_type`: ``"hybrid"``, ``"similarity"`` (the default), ``"mmr"`` or
                ``"similarity_score_threshold"``; `search_kwargs`: arguments of that search, for ``"hybrid"`` those of
                `hybrid_search`; and what every LangChain retriever accepts.
        """
        tags = kwargs.pop("tags", None) or self._get_retriever_tags()
        return GTEChromaRetriever(vectorstore=self, tags=tags, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return self._relevance_score_fn or _relevance


class GTEChromaRetriever(VectorStoreRetriever):
    """A retriever over `GTEChroma` with the search type ``"hybrid"`` besides LangChain's own."""

    # LangChain's own class ignores unknown options; as_retriever(k=5) must not go unnoticed.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    allowed_search_types: ClassVar[Collection[str]] = (*VectorStoreRetriever.allowed_search_types, "hybrid")

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[Document]:
        return self.vectorstore.search(query, self.search_type, **(self.search_kwargs | kwargs))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[Document]:
        return await self.vectorstore.asearch(query, self.search_type, **(self.search_kwargs | kwargs))


def _document(record: Record) -> Document:
    return Document(page_content=record.text, id=record.id, metadata=dict(record.metadata))


def _relevance(distance: float) -> float:
    """Return the cosine, cut to the range 0 to 1 that LangChain demands of a relevance."""
    return min(1.0, max(0.0, 1.0 - distance))


def _open(
    folder: str | None,
    host: str | None,
    *,
    port: int,
    ssl: bool,
    headers: dict[str, str] | None,
    settings: Settings,
    tenant: str,
    database: str,
) -> ClientAPI:
    if folder is not None:
        return chromadb.PersistentClient(folder, settings=settings, tenant=tenant, database=database)
    if host is not None:
        return chromadb.HttpClient(
            host, port, ssl=ssl, headers=headers, settings=settings, tenant=tenant, database=database
        )
    return chromadb.Client(settings=settings, tenant=tenant, database=database)


def _check_distance(metadata: Mapping[str, Any] | None, configuration: Mapping[str, Any] | None) -> None:
    """Refuse options for a new collection that would not take effect."""
    for name, given, accepted in (
        ("collection_metadata", metadata, {"hnsw:space": "cosine"}),
        ("collection_configuration", configuration, {"hnsw": {"space": "cosine"}}),
    ):
        if given and dict(given) != accepted:
            raise ValueError(
                f"{name} is {dict(given)!r}; only {accepted!r} is accepted, which holds anyway. For other settings create the "
                "empty collection with Chroma itself and pass its client"
            )
