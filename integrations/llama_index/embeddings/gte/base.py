"""Dense GTE embeddings as a LlamaIndex embedding model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from gte_rag.encoder import GTEEncoder
from gte_rag.errors import CheckpointError, missing_extra
from gte_rag.interface import TextEncoder
from gte_rag.shared import SharedEncoder
from gte_rag.vectors import FloatArray

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.callbacks import CallbackManager
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

# Texts given to the encoder at once. It forms its own batches by tokens, so this sets only how often progress shows.
_EMBED_BATCH_SIZE = 64
# Held while an unpickled model is loaded, so that threads that need it at the same moment load it once.
_LOADING = threading.Lock()


class GTEEmbedding(BaseEmbedding):
    """Dense vectors of a GTE model: always of unit length, the same whatever texts are embedded together.

    Without arguments the bundled ``"gte-mini"`` is used and nothing is downloaded. Options that `HuggingFaceEmbedding` has
    too have the same names. Code from a model repository is never run.

    A pickle (worker processes of an `IngestionPipeline` get one) holds the options, not the weights: the model is loaded
    again at first use and checked to be the same one. Callback manager and rate limiter stay behind.

    ```python
    Settings.embed_model = GTEEmbedding("Alibaba-NLP/gte-multilingual-base", dimension=256)
    ```
    """

    max_length: int = Field(description="Longest text in tokens; longer ones are cut, with a warning.")
    dimension: int | None = Field(description="Length of the vectors; None is the longest the model gives.")
    precision: str = Field(description="Arithmetic of the network.")
    cache_folder: str | None = Field(description="Where downloads are kept; None is Hugging Face's own cache.")
    device: str | None = Field(description="A torch device; None takes a GPU if there is one.")
    revision: str | None = Field(description="Branch, tag or commit of a Hugging Face id.")
    local_files_only: bool = Field(description="Use what was downloaded before and never the network.")
    show_progress_bar: bool = Field(description="Show a progress bar for calls of more than two seconds.")

    _encoder: TextEncoder | None = PrivateAttr(default=None)
    _shared: SharedEncoder | None = PrivateAttr(default=None)
    _fingerprint: str | None = PrivateAttr(default=None)

    def __init__(
        self,
        model_name: str = "gte-mini",
        *,
        max_length: int = 8192,
        dimension: int | None = None,
        precision: str = "auto",
        cache_folder: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        normalize: bool = True,
        trust_remote_code: bool = False,
        show_progress_bar: bool = False,
        embed_batch_size: int = _EMBED_BATCH_SIZE,
        num_workers: int | None = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: Any | None = None,  # noqa: ANN401
        rate_limiter: Any | None = None,  # noqa: ANN401
        encoder: TextEncoder | None = None,
    ) -> None:
        """Load the model.

        Args:
            model_name: ``"gte-mini"``, a folder or a Hugging Face id.
            max_length: Longest text in tokens; longer ones are cut, with a warning.
            dimension: Length of the vectors; None is the longest the model gives.
            precision: ``"auto"`` or a precision `GTEEncoder.from_pretrained` accepts.
            cache_folder: Where downloads are kept; None is Hugging Face's own cache.
            device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if there is one.
            revision: Branch, tag or commit of a Hugging Face id.
            local_files_only: Use what was downloaded before and never the network.
            normalize: Must be True.
            trust_remote_code: Accepted without effect.
            show_progress_bar: Show a progress bar for calls of more than two seconds.
            embed_batch_size: How many texts LlamaIndex hands over at once, 1 to 2048; no effect on the vectors.
            num_workers: How many of these batches LlamaIndex's async calls run at the same time.
            callback_manager: LlamaIndex's callbacks.
            embeddings_cache: A LlamaIndex key-value store that remembers vectors.
            rate_limiter: LlamaIndex's limit on calls.
            encoder: A ready-made encoder, to share one with a `HybridCollection` or another adapter, or a client of
                `gte_rag.remote`. It replaces the options about the model, except `dimension`.

        Raises:
            CheckpointError: The model cannot be loaded.
            ValueError: An option is out of range, or one about the model is given beside `encoder`.
        """
        if not normalize:
            raise ValueError("normalize must be True: GTE vectors are always of unit length; leave it out")
        if encoder is not None:
            if not isinstance(encoder, TextEncoder):
                raise TypeError(
                    f"encoder is {type(encoder).__name__}; give a gte_rag.GTEEncoder, or an encoder of gte_rag.remote"
                )
            given = (model_name, max_length, precision, cache_folder, device, revision, local_files_only)
            if given != ("gte-mini", 8192, "auto", None, None, None, False):
                raise ValueError(
                    "encoder is given beside model_name, max_length, precision, cache_folder, device, revision or "
                    "local_files_only, which it has decided already; leave out one or the other"
                )
            encoder.encode_queries([], sparse=False, dimension=dimension)  # refuses a dimension it cannot give
            model_name = encoder.name
            if isinstance(encoder, GTEEncoder):
                max_length, precision, device = encoder.max_length, encoder.precision, str(encoder.device)
            dimension = encoder.dimension if dimension is None else dimension
        fields: dict[str, Any] = {
            "model_name": model_name,
            "embed_batch_size": embed_batch_size,
            "callback_manager": callback_manager or CallbackManager([]),
            "num_workers": num_workers,
            "embeddings_cache": embeddings_cache,
            "rate_limiter": rate_limiter,
            "max_length": max_length,
            "dimension": dimension,
            "precision": precision,
            "cache_folder": cache_folder,
            "device": device,
            "revision": revision,
            "local_files_only": local_files_only,
            "show_progress_bar": show_progress_bar,
        }
        super().__init__(**fields)
        self._encoder = encoder or self._load()

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores this class."""
        return "GTEEmbedding"

    @property
    def encoder(self) -> TextEncoder:
        """The encoder in use, to be shared: ``HybridCollection(client, name, encoder=embed_model.encoder)``."""
        if self._encoder is not None:
            return self._encoder
        with _LOADING:
            self._encoder = encoder = self._encoder or self._load()
            return encoder

    def share(self) -> SharedEncoder:
        """Return where dense and sparse vectors of a text come from one forward pass; from now on this encodes there too.

        The adapters of `llama_index.sparse_embeddings.gte` call it. Every text embedded from now on is given sparse weights
        as well, which are kept until they are asked for, 4,096 texts or the last call at most.

        Raises:
            ValueError: The model gives no sparse vectors.
        """
        if self._shared is None:
            self._shared = SharedEncoder.wrap(self.encoder, dimension=self.dimension)
        return self._shared

    def _get_query_embedding(self, query: str) -> list[float]:
        if self._shared is not None:
            return _rows(self._shared.dense([query], queries=True, show_progress=self.show_progress_bar))[0]
        return _rows(self.encoder.encode_queries([query], **self._options()).dense)[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        if self._shared is not None:
            return _rows(self._shared.dense(texts, show_progress=self.show_progress_bar))
        return _rows(self.encoder.encode_documents(texts, **self._options()).dense)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields and the model's fingerprint, without the model; of a service its client, without the key."""
        fields = {name: getattr(self, name) for name, field in type(self).model_fields.items() if not field.exclude}
        if self._encoder is not None and not isinstance(self._encoder, GTEEncoder):
            return {"fields": fields, "encoder": self._encoder}
        fingerprint = self._fingerprint if self._encoder is None else self._encoder.fingerprint
        return {"fields": fields, "fingerprint": fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields; the model is loaded when it is first needed."""
        super().__init__(**state["fields"])
        self._encoder = state.get("encoder")
        self._fingerprint = state.get("fingerprint")

    def _options(self) -> dict[str, Any]:
        return {"sparse": False, "dimension": self.dimension, "show_progress": self.show_progress_bar}

    def _load(self) -> GTEEncoder:
        encoder = GTEEncoder.from_pretrained(
            self.model_name,
            device=self.device,
            precision=self.precision,
            dimension=self.dimension,
            max_length=self.max_length,
            revision=self.revision,
            cache_dir=self.cache_folder,
            local_files_only=self.local_files_only,
        )
        if self._fingerprint not in (None, encoder.fingerprint):
            raise CheckpointError(
                f"{self.model_name!r} is another model than when this was pickled: its fingerprint is "
                f"{encoder.fingerprint} and was {self._fingerprint}. Name a revision or a folder that stays"
            )
        return encoder


def _rows(dense: FloatArray | None) -> list[list[float]]:
    assert dense is not None  # every call here asks for dense vectors
    rows: list[list[float]] = dense.tolist()
    return rows
