"""Hybrid retrieval, dense and sparse, as a LlamaIndex retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gte_rag.errors import missing_extra

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
    from llama_index.core.schema import BaseNode, IndexNode, MetadataMode, NodeWithScore, QueryBundle
    from llama_index.core.vector_stores.types import MetadataFilters
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

from gte_rag.chroma import HybridCollection
from gte_rag.retriever import Hit, HybridRetriever
from llama_index.vector_stores.gte.nodes import chroma_filter, metadata_of, node_of


class GTEHybridRetriever(BaseRetriever):
    """Retrieves nodes from a `HybridCollection` by dense and sparse scores together.

    Nodes come back as they were given to `add_nodes`, relationships and nested metadata included. A record that something
    else wrote becomes a `TextNode` with the record's id, text and metadata. The score of a `NodeWithScore` is the fused
    one; its parts are not put into the metadata, which LlamaIndex shows to the language model and hashes to tell nodes
    apart. `gte_rag.retriever.HybridRetriever` returns them.

    ```python
    retriever = GTEHybridRetriever(collection, similarity_top_k=5)
    retriever.add_nodes(SentenceSplitter().get_nodes_from_documents(documents))
    RetrieverQueryEngine.from_args(retriever)
    ```

    Attributes:
        collection: The collection to search; its encoder embeds the queries.
        similarity_top_k: How many nodes to return; may be changed at any time.
    """

    def __init__(
        self,
        collection: HybridCollection,
        *,
        similarity_top_k: int = DEFAULT_SIMILARITY_TOP_K,
        candidates: int = 100,
        mode: str = "rescore",
        fusion: str = "weighted",
        fusion_options: dict[str, float] | None = None,
        dense_weight: float = 1.0,
        sparse_weight: float | None = None,
        filters: MetadataFilters | None = None,
        where: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        """Prepare a retriever; nothing is read yet.

        Args:
            collection: The collection to search.
            similarity_top_k: How many nodes to return; the default is LlamaIndex's.
            candidates: How many records the first stage gives to the second.
            mode: How candidates are found; see `gte_rag.retriever.HybridRetriever`.
            fusion: How the two scores become one; see there.
            fusion_options: Further options of the fusion; see there.
            dense_weight: Weight of the dense score.
            sparse_weight: Weight of the sparse score; None is the fusion's own.
            filters: LlamaIndex filters on metadata: comparisons, IN, NIN, CONTAINS, ANY and ALL, combined by AND and OR.
            where: The same as a Chroma filter; give one of the two.
            where_document: Chroma filter on the text.
            callback_manager: LlamaIndex's callbacks.
            object_map: Objects behind index nodes, by index id.
            objects: The same as a list of nodes that carry their objects.
            verbose: Print the steps of recursive retrieval.

        Raises:
            ValueError: An option is out of range, or a filter cannot be expressed in Chroma.
        """
        if filters is not None and where is not None:
            raise ValueError("filters and where are both given; give one of them")
        self.collection = collection
        self.similarity_top_k = similarity_top_k
        self._where = where if filters is None else chroma_filter(filters)
        self._where_document = where_document
        self._retriever = HybridRetriever(
            collection,
            k=similarity_top_k,
            candidates=candidates,
            mode=mode,
            fusion=fusion,
            fusion_options=fusion_options,
            dense_weight=dense_weight,
            sparse_weight=sparse_weight,
        )
        super().__init__(callback_manager=callback_manager, object_map=object_map, objects=objects, verbose=verbose)

    def add_nodes(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> list[str]:
        """Embed nodes and put them into the collection, in the form LlamaIndex's own Chroma store reads too.

        A node's text is embedded as it is, without its metadata. Metadata values that Chroma holds (strings, numbers,
        booleans, lists of one kind of these) can be filtered on. All others, such as nested dicts, cannot, but they come
        back in the form LlamaIndex gives them in JSON.

        Args:
            nodes: Nodes or documents; one whose id is in the collection replaces that record.
            show_progress: Whether to show a progress bar.

        Returns:
            The ids, in the order of `nodes`.

        Raises:
            ValueError: Two nodes have the same id, or Chroma refuses a metadata key.
        """
        ids = [node.node_id for node in nodes]
        texts = [node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]
        self.collection.upsert(ids, texts, metadatas=[metadata_of(node) for node in nodes], show_progress=show_progress)
        return ids

    def delete_ref_doc(self, ref_doc_id: str) -> None:
        """Delete the nodes that were cut from a document.

        Args:
            ref_doc_id: The id of the document; without nodes of it nothing happens.
        """
        self.collection.delete(where={"ref_doc_id": ref_doc_id})

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _nodes(self._retriever.search(query_bundle.query_str, **self._options()))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _nodes(await self._retriever.asearch(query_bundle.query_str, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {"k": self.similarity_top_k, "where": self._where, "where_document": self._where_document}


def _nodes(hits: Sequence[Hit]) -> list[NodeWithScore]:
    return [NodeWithScore(node=node_of(hit.id, hit.text, hit.metadata), score=hit.score) for hit in hits]
