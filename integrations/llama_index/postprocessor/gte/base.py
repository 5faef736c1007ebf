"""A GTE reranker as a LlamaIndex node postprocessor."""

from __future__ import annotations

from typing import Any

from gte_rag.errors import missing_extra
from gte_rag.interface import TextReranker
from gte_rag.reranker import GTEReranker

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
    from llama_index_instrumentation import get_dispatcher
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

_dispatcher = get_dispatcher(__name__)


class GTERerank(BaseNodePostprocessor):
    """Sorts retrieved nodes by how well they answer the query, and keeps the best.

    The score of a node becomes the reranker's logit. The nodes given are left as they are: what comes back are new
    `NodeWithScore` objects around the same nodes.

    ```python
    index.as_query_engine(similarity_top_k=20, node_postprocessors=[GTERerank("Alibaba-NLP/gte-multilingual-reranker-base")])
    ```
    """

    model: str = Field(description="A folder or the id of a GTE reranker.")
    top_n: int = Field(description="How many nodes to return; may be changed at any time.", ge=1)
    metadata_mode: MetadataMode = Field(description="Which metadata the reranker reads before a node's text.")
    keep_retrieval_score: bool = Field(description="Put the retriever's score into the metadata as retrieval_score.")

    _reranker: TextReranker = PrivateAttr()

    def __init__(
        self,
        model: str | None = None,
        *,
        top_n: int = 2,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        keep_retrieval_score: bool = False,
        device: str | None = None,
        precision: str = "auto",
        max_length: int = 8192,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        callback_manager: CallbackManager | None = None,
        reranker: TextReranker | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: A folder, a Hugging Face id such as ``"Alibaba-NLP/gte-multilingual-reranker-base"``, or a ModelScope id.
            top_n: How many nodes to return; the default is that of LlamaIndex's own rerankers.
            metadata_mode: Which metadata the reranker reads before a node's text: by default what an embedding model reads, as
                LlamaIndex's own rerankers do.
            keep_retrieval_score: Put the retriever's score into the metadata as ``retrieval_score``, for which the node is
                copied.
            device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if there is one.
            precision: ``"auto"`` or a precision that `GTEReranker.from_pretrained` accepts.
            max_length: Longest pair of query and node in tokens; longer ones are cut, with a warning.
            cache_folder: Where downloads are kept; None is the hub's own cache.
            revision: Branch, tag or commit of an id.
            local_files_only: Use what was downloaded before and never the network.
            callback_manager: LlamaIndex's callbacks.
            reranker: A ready-made reranker, to share one, or a client of `gte_rag.remote`. It replaces the options about the
                model.

        Raises:
            CheckpointError: The model cannot be loaded, or is no reranker.
            ValueError: An option is out of range, neither or both of `model` and `reranker` are given, or an option about the
                model is given beside `reranker`.
        """
        if (model is None) == (reranker is None):
            raise ValueError("give either model, the name of a reranker, or reranker, a gte_rag.GTEReranker")
        if reranker is None:
            assert model is not None
            reranker = GTEReranker.from_pretrained(
                model,
                device=device,
                precision=precision,
                max_length=max_length,
                revision=revision,
                cache_dir=cache_folder,
                local_files_only=local_files_only,
            )
        elif not isinstance(reranker, TextReranker):
            raise TypeError(
                f"reranker is {type(reranker).__name__}; give a gte_rag.GTEReranker, or a reranker of gte_rag.remote"
            )
        elif (device, precision, max_length, cache_folder, revision, local_files_only) != (
            *(None, "auto", 8192),
            *(None, None, False),
        ):
            raise ValueError(
                "reranker is given beside device, precision, max_length, cache_folder, revision or local_files_only, which it "
                "has decided already; leave out one or the other"
            )
        fields: dict[str, Any] = {
            "model": reranker.name,
            "top_n": top_n,
            "metadata_mode": metadata_mode,
            "keep_retrieval_score": keep_retrieval_score,
            "callback_manager": callback_manager or CallbackManager([]),
        }
        super().__init__(**fields)
        self._reranker = reranker

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores this class."""
        return "GTERerank"

    @property
    def reranker(self) -> TextReranker:
        """The reranker in use, to be shared."""
        return self._reranker

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("reranking needs a query; give query_str or query_bundle")
        _dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=self.top_n, model_name=self.model),
        )
        payload: dict[Any, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            texts = [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]
            results = self._reranker.rerank(query_bundle.query_str, texts, top_k=self.top_n)
            best = [self._scored(nodes[result.index], result.score) for result in results]
            event.on_end(payload={EventPayload.NODES: best})
        _dispatcher.event(ReRankEndEvent(nodes=best))
        return best

    def _scored(self, node: NodeWithScore, score: float) -> NodeWithScore:
        if not self.keep_retrieval_score:
            return NodeWithScore(node=node.node, score=score)
        copy = node.node.model_copy()
        copy.metadata = {**copy.metadata, "retrieval_score": node.score}
        return NodeWithScore(node=copy, score=score)
