"""Dense, sparse and hybrid search in one Chroma collection, as a LlamaIndex vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gte_rag.errors import missing_extra
from gte_rag.interface import TextEncoder

try:  # before gte_rag.chroma, so that the extra that brings both is named
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
    from llama_index.core.schema import BaseNode, MetadataMode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

import chromadb
from chromadb.api import ClientAPI

from gte_rag.chroma import Candidates, HybridCollection
from gte_rag.encoder import GTEEncoder
from gte_rag.fusion import FUSIONS, fusion_named
from gte_rag.neighbours import neighbours, unit_vector
from gte_rag.records import Record
from gte_rag.vectors import FloatArray, SparseVector
from llama_index.vector_stores.gte.nodes import chroma_filter, embedded_text, joined, metadata_of, node_of

_SERVER_PORT = 8000  # Chroma's
_ALPHA = 0.5  # both sides alike, as LlamaIndex's other hybrid stores have it
_MMR_PREFETCH_FACTOR = 4.0  # that of LlamaIndex's Chroma store
# Embeddings that come with the first nodes are compared with the encoder's own; another precision stays far above this.
_CHECKED_NODES = 4
_SAME_MODEL_COSINE = 0.98
Filter = dict[str, Any]


class GTEChromaVectorStore(BasePydanticVectorStore):
    """Nodes with dense and sparse vectors in one Chroma collection.

    The store has its own encoder, and everything it holds comes from it: a node's text is encoded as LlamaIndex embeds it,
    together with the metadata that is not excluded, dense and sparse in one pass. Give the index the same model:

    ```python
    store = GTEChromaVectorStore("handbook", persist_dir="./db")
    index = VectorStoreIndex.from_vector_store(store, embed_model=GTEEmbedding(encoder=store.encoder))
    index.as_query_engine(vector_store_query_mode="hybrid", alpha=0.6)
    ```

    An index embeds nodes before it hands them over, so nodes inserted through it pass the network twice, once for LlamaIndex
    and once here. ``store.add(nodes)`` with nodes that have no embedding yet costs one pass.

    The query modes:

    - ``DEFAULT``: the `similarity_top_k` nearest nodes by the query's embedding. The similarity is the cosine.
    - ``SPARSE``, ``TEXT_SEARCH``: the `sparse_top_k` (None: `similarity_top_k`) best nodes by the sparse scores of the whole
      collection. Nodes without a token of the query are never returned. The similarity is the sparse score.
    - ``HYBRID``: nodes from both sides, both scores exact for each, fused with the weight `alpha` for the dense and
      1 - `alpha` for the sparse score; an `alpha` of 0 or 1 is that side alone. None is 0.5. Without `hybrid_top_k`,
      `similarity_top_k` nodes are returned, chosen from `candidates` of each side. With it, `hybrid_top_k` nodes are
      returned and `similarity_top_k` is the number taken from the dense side. `sparse_top_k` is the number taken from the
      sparse side, None: as many as from the dense one.
    - ``MMR``: as LlamaIndex's Chroma store has it.

    Other modes are refused. A query's `doc_ids` restrict the search to nodes of these documents; its `node_ids` do not,
    because LlamaIndex fills them in by itself with an incomplete list.

    A pickle holds the fields; it is possible when these say where the collection is.
    """

    stores_text: bool = True
    is_embedding_query: bool = True

    collection_name: str = Field(description="Name of the collection.")
    persist_dir: str | None = Field(description="Folder of a local database.")
    host: str | None = Field(description="Host name of a Chroma server.")
    port: int = Field(description="Its port.")
    ssl: bool = Field(description="Whether to connect to it by SSL.")
    headers: dict[str, str] | None = Field(description="HTTP headers to send to it.", repr=False)
    model_name: str = Field(description="The model: a name, a folder or a Hugging Face id.")
    dimension: int | None = Field(description="Length of the dense vectors; None is the longest the model gives.")
    adopt: bool = Field(description="Whether a collection filled by another program may be opened.")
    candidates: int = Field(description="How many nodes hybrid search takes from each side.")
    fusion: str = Field(description="How hybrid search makes one score of two.")

    _collection: HybridCollection = PrivateAttr()
    _portable: bool = PrivateAttr()
    _checked: bool = PrivateAttr(default=False)

    def __init__(
        self,
        collection_name: str = "llama_index",
        *,
        persist_dir: str | None = None,
        host: str | None = None,
        port: int = _SERVER_PORT,
        ssl: bool = False,
        headers: dict[str, str] | None = None,
        chroma_client: ClientAPI | None = None,
        model_name: str = "gte-mini",
        dimension: int | None = None,
        encoder: TextEncoder | None = None,
        adopt: bool = False,
        candidates: int = 100,
        fusion: str = "relative_score",
        **serialised: Any,  # noqa: ANN401
    ) -> None:
        """Open the collection, or create it.

        Without `persist_dir`, `host` and `chroma_client` the collection is in memory, where stores of the same process and
        `collection_name` share it.

        Args:
            collection_name: Name of the collection, as Chroma allows it.
            persist_dir: Folder of a local database.
            host: Host name of a Chroma server.
            port: Its port.
            ssl: Whether to connect to it by SSL.
            headers: HTTP headers to send to it.
            chroma_client: A ready-made Chroma client instead of all these.
            model_name: ``"gte-mini"``, a folder or a Hugging Face id.
            dimension: Length of the dense vectors; None is the longest the model gives.
            encoder: A ready-made encoder instead of these two.
            adopt: Open a collection that another program, such as LlamaIndex's own Chroma store, filled with dense vectors
                of this very model; see `HybridCollection`. `backfill` of `collection` stores the sparse vectors it lacks.
            candidates: How many nodes hybrid search takes from each side, unless a query says it.
            fusion: ``"relative_score"``, as LlamaIndex's other hybrid stores fuse, or another one of `gte_rag.fusion`;
                ``"calibrated"`` needs ``HybridRetriever(store.collection).calibrate()`` once.
            **serialised: What `to_dict` adds to the fields; other names are refused.

        Raises:
            CollectionMismatchError: The collection was made by another model, dimension or distance.
            TypeError: An option is unknown.
            ValueError: Options contradict each other or are out of range.
        """
        if unknown := serialised.keys() - {"class_name", "stores_text", "is_embedding_query"}:
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        places = {"chroma_client": chroma_client, "persist_dir": persist_dir, "host": host}
        if len(given := [name for name, value in places.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are given; one of them says where the collection is")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; available: {', '.join(map(repr, FUSIONS))}")
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}; it must be at least 1")
        if encoder is None:
            encoder = GTEEncoder.from_pretrained(model_name, dimension=dimension)
        elif (model_name, dimension) != ("gte-mini", None):
            raise ValueError("encoder is given beside model_name or dimension, which it has decided already")
        fields: dict[str, Any] = {
            "collection_name": collection_name,
            "persist_dir": persist_dir,
            "host": host,
            "port": port,
            "ssl": ssl,
            "headers": headers,
            "model_name": encoder.name,
            "dimension": encoder.dimension,
            "adopt": adopt,
            "candidates": candidates,
            "fusion": fusion,
        }
        super().__init__(**fields)
        self._portable = chroma_client is None and (persist_dir is not None or host is not None)
        client = chroma_client
        if client is None and persist_dir is not None:
            client = chromadb.PersistentClient(persist_dir)
        elif client is None and host is not None:
            client = chromadb.HttpClient(host, port, ssl=ssl, headers=headers)
        self._collection = HybridCollection(
            client or chromadb.EphemeralClient(),
            collection_name,
            encoder=encoder,
            adopt=adopt,
            encoded_text=embedded_text,
        )

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores this class."""
        return "GTEChromaVectorStore"

    @property
    def collection(self) -> HybridCollection:
        """The collection, for everything LlamaIndex has no word for, such as calibration or `backfill`."""
        return self._collection

    @property
    def encoder(self) -> TextEncoder:
        """The encoder in use, to be shared with the index: ``GTEEmbedding(encoder=store.encoder)``."""
        return self._collection.encoder

    @property
    def client(self) -> Any:  # noqa: ANN401
        """The Chroma collection itself, as in LlamaIndex's own Chroma store."""
        return self._collection.collection

    def add(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> list[str]:  # type: ignore[override]
        """Encode nodes and put them into the collection.

        Values of the metadata that Chroma holds (strings, numbers, booleans, lists of one kind of these) can be filtered on.
        All others cannot, but they come back with the node in the form LlamaIndex gives them in JSON: a tuple as a list, a
        date as text, NaN and infinity as None.

        Args:
            nodes: Any number; one whose id is in the collection replaces that record. Embeddings they have already must be
                this model's; they are checked, not stored.
            show_progress: Whether to show a progress bar.

        Returns:
            The ids, in the order of `nodes`.

        Raises:
            ValueError: Two nodes have the same id, Chroma refuses a metadata key, or embeddings are another model's.
        """
        self._check_embeddings(nodes)
        ids = [node.node_id for node in nodes]
        texts = [node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]
        self._collection.upsert(ids, texts, metadatas=list(map(metadata_of, nodes)), show_progress=show_progress)
        return ids

    async def async_add(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> list[str]:  # type: ignore[override]
        """Do what `add` does in a thread."""
        return await asyncio.to_thread(self.add, nodes, show_progress=show_progress)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return nodes by id, in this order, by filter, by both together, or all of them; missing ids are left out."""
        ids = None if node_ids is None else list(dict.fromkeys(node_ids))
        return [_node(record) for record in self._collection.get(ids, where=_filter(filters))]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Do what `get_nodes` does in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    def delete(self, ref_doc_id: str) -> None:  # type: ignore[override]
        """Delete the nodes that were cut from a document; without nodes of it nothing happens."""
        self._collection.delete(where={"ref_doc_id": ref_doc_id})

    async def adelete(self, ref_doc_id: str) -> None:  # type: ignore[override]
        """Do what `delete` does in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id)

    def delete_nodes(  # type: ignore[override]
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> None:
        """Delete nodes by id, by filter, or by both together; ids that do not exist are no error.

        Raises:
            ValueError: Neither ids nor a filter is given; `clear` deletes everything.
        """
        where = _filter(filters)
        if node_ids is None and where is None:
            raise ValueError("delete_nodes needs ids or a filter; clear() deletes everything")
        self._collection.delete(None if node_ids is None else list(dict.fromkeys(node_ids)), where=where)

    async def adelete_nodes(  # type: ignore[override]
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> None:
        """Do what `delete_nodes` does in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    def clear(self) -> None:
        """Delete all nodes."""
        self._collection.delete(self._collection.matching_ids())

    async def aclear(self) -> None:
        """Do what `clear` does in a thread."""
        await asyncio.to_thread(self.clear)

    def query(  # type: ignore[override]
        self,
        query: VectorStoreQuery,
        *,
        where: Filter | None = None,
        where_document: Filter | None = None,
        mmr_threshold: float | None = None,
        mmr_prefetch_factor: float = _MMR_PREFETCH_FACTOR,
        mmr_prefetch_k: int | None = None,
    ) -> VectorStoreQueryResult:
        """Return the best nodes for a query, best first; see the class for the modes.

        Through an index the further options are given as ``vector_store_kwargs={...}``.

        Args:
            query: The query. Where a mode needs an embedding and it has none, its text is encoded here.
            where: Chroma's filter on metadata, instead of the query's `filters`.
            where_document: Chroma's filter on texts.
            mmr_threshold: For MMR: 0 for the most diverse choice to 1 for the nearest nodes; None is the query's, or 0.5.
            mmr_prefetch_factor: For MMR: how many nodes to choose from for each node returned.
            mmr_prefetch_k: For MMR: how many nodes to choose from, instead of the factor.

        Raises:
            ValueError: The mode is not available or lacks what it needs, a number is out of range, or a filter cannot be
                expressed in Chroma.
        """
        filters: dict[str, Any] = {"where": _where(query, where), "where_document": where_document}
        if query.mode == VectorStoreQueryMode.DEFAULT:
            return self._dense(query, filters)
        if query.mode in (VectorStoreQueryMode.SPARSE, VectorStoreQueryMode.TEXT_SEARCH):
            return self._sparse(query, filters)
        if query.mode == VectorStoreQueryMode.HYBRID:
            return self._hybrid(query, filters)
        if query.mode == VectorStoreQueryMode.MMR:
            threshold = query.mmr_threshold if mmr_threshold is None else mmr_threshold
            fetched = int(query.similarity_top_k * mmr_prefetch_factor) if mmr_prefetch_k is None else mmr_prefetch_k
            return self._mmr(query, filters, threshold, fetched)
        raise ValueError(
            f"query mode {query.mode.name} is not available; accepted here: DEFAULT, SPARSE, TEXT_SEARCH, HYBRID, MMR"
        )

    async def aquery(self, query: VectorStoreQuery, **options: Any) -> VectorStoreQueryResult:  # noqa: ANN401
        """Do what `query` does in a thread."""
        return await asyncio.to_thread(self.query, query, **options)

    def _dense(self, query: VectorStoreQuery, filters: dict[str, Any]) -> VectorStoreQueryResult:
        found = neighbours(self._collection, self._embedding(query), query.similarity_top_k, **filters)
        return _result([item.record for item in found], [item.cosine for item in found])

    def _sparse(self, query: VectorStoreQuery, filters: dict[str, Any]) -> VectorStoreQueryResult:
        k = query.similarity_top_k if query.sparse_top_k is None else query.sparse_top_k
        scores = dict(self._best_sparse(self._weights(query), k, filters))
        records = self._collection.get(list(scores))
        return _result(records, [scores[record.id] for record in records])

    def _hybrid(self, query: VectorStoreQuery, filters: dict[str, Any]) -> VectorStoreQueryResult:
        alpha = _ALPHA if query.alpha is None else query.alpha
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; give 0 (only sparse) to 1 (only dense)")
        n_dense, k = query.similarity_top_k, query.hybrid_top_k
        if k is None:
            n_dense, k = max(query.similarity_top_k, self.candidates), query.similarity_top_k
        n_sparse = n_dense if query.sparse_top_k is None else query.sparse_top_k
        for name, number in (("similarity_top_k", n_dense), ("sparse_top_k", n_sparse), ("hybrid_top_k", k)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        weights = self._weights(query)
        vector = self._embedding(query)
        sides: list[Candidates] = []
        if alpha > 0:
            sides += self._collection.nearest(vector[None], n_dense, **filters)
        if alpha < 1:
            known = {record.id for side in sides for record in side.records}
            best = self._best_sparse(weights, n_sparse, filters)
            sides.append(self._collection.candidates([name for name, _ in best if name not in known], vector))
        found = sides[0] if len(sides) == 1 else sides[0] + sides[1]
        fuse = fusion_named(self.fusion, calibration=self._collection.calibration)
        scores = fuse(found.dense_scores, found.sparse.dot(weights), dense_weight=alpha, sparse_weight=1 - alpha)
        order = np.argsort(-scores, kind="stable")[:k]
        return _result([found.records[index] for index in order], scores[order].tolist())

    def _mmr(
        self, query: VectorStoreQuery, filters: dict[str, Any], threshold: float | None, fetched: int
    ) -> VectorStoreQueryResult:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"mmr_threshold is {threshold}; give 0 (most diverse) to 1 (nearest)")
        vector = self._embedding(query)
        found = neighbours(self._collection, vector, max(fetched, query.similarity_top_k), **filters)
        _, chosen = get_top_k_mmr_embeddings(
            vector.tolist(),
            [item.vector.tolist() for item in found],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(range(len(found))),
            mmr_threshold=threshold,
        )
        return _result([found[index].record for index in chosen], [found[index].cosine for index in chosen])

    def _best_sparse(self, weights: SparseVector, n: int, filters: dict[str, Any]) -> list[tuple[str, float]]:
        unfiltered = all(value is None for value in filters.values())
        allowed = None if unfiltered else set(self._collection.matching_ids(**filters))
        return self._collection.lexical_index().search(weights, n, allowed=allowed)

    def _embedding(self, query: VectorStoreQuery) -> FloatArray:
        """Return the query's embedding at unit length, computed here if it has none."""
        if query.query_embedding is not None:
            return unit_vector(query.query_embedding, self.encoder.dimension)
        dense = self.encoder.encode_queries([_text(query)], sparse=False).dense
        assert dense is not None
        vector: FloatArray = dense[0]
        return vector

    def _weights(self, query: VectorStoreQuery) -> SparseVector:
        sparse = self.encoder.encode_queries([_text(query)], dense=False).sparse
        assert sparse is not None
        return sparse[0]

    def _check_embeddings(self, nodes: Sequence[BaseNode]) -> None:
        """Refuse nodes embedded by another model: the index would embed its queries by that one too."""
        embedded = [node for node in nodes if node.embedding is not None]
        for node in embedded:
            if len(node.get_embedding()) != self.encoder.dimension:
                raise ValueError(
                    f"node {node.node_id!r} has an embedding of dimension {len(node.get_embedding())}; this store's model "
                    f"gives {self.encoder.dimension}. Give the index embed_model=GTEEmbedding(encoder=store.encoder)"
                )
        if self._checked or not embedded:
            return
        sample = embedded[:_CHECKED_NODES]
        texts = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in sample]
        dense = self.encoder.encode_documents(texts, sparse=False).dense
        assert dense is not None
        given = np.array([node.get_embedding() for node in sample], dtype=np.float32)
        cosines = np.einsum("nd,nd->n", given, dense) / np.maximum(np.linalg.norm(given, axis=1), 1e-12)
        if np.median(cosines) < _SAME_MODEL_COSINE:
            raise ValueError(
                f"node {sample[0].node_id!r} has an embedding that {self.encoder.name!r}, this store's model, does not give "
                f"for its text: the cosine is {cosines[0]:.3f}. Give the index embed_model=GTEEmbedding(encoder=store.encoder)"
            )
        self._checked = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields.

        Raises:
            TypeError: They do not say where the collection is.
        """
        if not self._portable:
            raise TypeError(
                f"the store of {self.collection_name!r} cannot be pickled, because its database is known to this process only; "
                "open it by persist_dir or host"
            )
        return self.to_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the collection again; it refuses another model than the one that made it."""
        restore: Callable[..., None] = self.__init__  # type: ignore[misc]
        restore(**state)


def _where(query: VectorStoreQuery, where: Filter | None) -> Filter | None:
    if query.filters is not None and where is not None:
        raise ValueError("filters and where are both given; give one of them")
    if query.filters is not None:
        where = _filter(query.filters)
    return joined("$and", [where, {"ref_doc_id": {"$in": query.doc_ids}} if query.doc_ids else None])


def _filter(filters: MetadataFilters | None) -> Filter | None:
    return None if filters is None else chroma_filter(filters)


def _text(query: VectorStoreQuery) -> str:
    if query.query_str is None:
        raise ValueError(f"a query in mode {query.mode.name} needs its text; set query_str")
    return query.query_str


def _node(record: Record) -> BaseNode:
    return node_of(record.id, record.text, record.metadata)


def _result(records: Sequence[Record], similarities: Sequence[float]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=list(map(_node, records)), similarities=list(similarities), ids=[record.id for record in records]
    )
