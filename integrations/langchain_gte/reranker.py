"""A GTE reranker as a LangChain document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gte_rag.errors import missing_extra
from gte_rag.interface import RerankResult, TextReranker
from gte_rag.reranker import GTEReranker

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import ConfigDict, Field, PrivateAttr
except ImportError as error:
    raise missing_extra("langchain-core", "langchain") from error

RERANK_SCORE_KEY = "gte_rerank_score"
# Fields that say which reranker to load; one that is passed ready-made has decided them already.
_LOADING_FIELDS = ("model_name", "cache_folder", "device", "precision", "max_length", "revision", "local_files_only")


class GTERerank(BaseDocumentCompressor):
    """Sorts retrieved documents by how well they answer the query, and keeps the best.

    Each returned `Document` is a copy with the reranker's score in its metadata under ``gte_rerank_score``; the documents given
    are left as they are.

    ```python
    ContextualCompressionRetriever(
        base_retriever=GTEHybridRetriever(collection=collection, k=50),
        base_compressor=GTERerank(model="Alibaba-NLP/gte-multilingual-reranker-base", top_n=5),
    )
    ```

    Attributes:
        model_name: A folder, a Hugging Face id such as ``"Alibaba-NLP/gte-multilingual-reranker-base"``, or a ModelScope id;
            `model` is accepted as well.
        top_n: How many documents to return; None returns all. The default is that of LangChain's own rerankers.
        cache_folder: Where downloads are kept; None is the hub's own cache.
        device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if there is one.
        precision: ``"auto"`` or a precision that `GTEReranker.from_pretrained` accepts.
        max_length: Longest pair of query and document in tokens; longer ones are cut, with a warning.
        revision: Branch, tag or commit of an id.
        local_files_only: Use what was downloaded before and never the network.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    model_name: str = Field(default="", alias="model")
    top_n: int | None = Field(default=3, ge=1)
    cache_folder: str | None = None
    device: str | None = None
    precision: str = "auto"
    max_length: int = 8192
    revision: str | None = None
    local_files_only: bool = False

    _reranker: TextReranker = PrivateAttr()

    # The model is loaded here and not in a validator: pydantic would replace the core's own errors by a ValidationError.
    def __init__(self, *, reranker: TextReranker | None = None, **options: Any) -> None:  # noqa: ANN401
        """Check the options and load the model.

        Args:
            reranker: A ready-made reranker, to share one, or a client of `gte_rag.remote`. It decides everything about the
                model; of the fields only `top_n` may be given beside it.
            **options: The fields above.

        Raises:
            CheckpointError: The model cannot be loaded, or is no reranker.
            ValueError: An option is unknown or out of range, no model is named, or an option is given beside `reranker`.
        """
        super().__init__(**options)
        if reranker is None:
            if not self.model_name:
                raise ValueError(
                    "give model, the name of a reranker such as 'Alibaba-NLP/gte-multilingual-reranker-base', or reranker, a "
                    "gte_rag.GTEReranker"
                )
            self._reranker = GTEReranker.from_pretrained(
                self.model_name,
                device=self.device,
                precision=self.precision,
                max_length=self.max_length,
                revision=self.revision,
                cache_dir=self.cache_folder,
                local_files_only=self.local_files_only,
            )
            return
        if not isinstance(reranker, TextReranker):
            raise TypeError(
                f"reranker is {type(reranker).__name__}; give a gte_rag.GTEReranker, or a reranker of gte_rag.remote"
            )
        if given := [field for field in _LOADING_FIELDS if field in self.model_fields_set]:
            raise ValueError(f"{', '.join(given)}: decided by the reranker that is passed; leave out one or the other")
        self.model_name = reranker.name
        if isinstance(reranker, GTEReranker):
            self.device, self.precision, self.max_length = str(reranker.device), reranker.precision, reranker.max_length
        self._reranker = reranker

    @property
    def reranker(self) -> TextReranker:
        """The reranker in use, to be shared."""
        return self._reranker

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first.

        Args:
            documents: What a retriever found; ``[]`` gives ``[]``.
            query: The query they were found for.
            callbacks: Not used: LangChain has no event for reranking.

        Returns:
            At most `top_n` documents with their score in the metadata.
        """
        texts = [document.page_content for document in documents]
        return _documents(documents, self._reranker.rerank(query, texts, top_k=self.top_n))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return what `compress_documents` returns, computed in a thread while the event loop goes on."""
        texts = [document.page_content for document in documents]
        return _documents(documents, await self._reranker.arerank(query, texts, top_k=self.top_n))


def _documents(documents: Sequence[Document], results: Sequence[RerankResult]) -> list[Document]:
    ranked = []
    for result in results:
        document = documents[result.index]
        metadata = {**document.metadata, RERANK_SCORE_KEY: result.score}
        ranked.append(document.model_copy(update={"metadata": metadata}))
    return ranked
