"""Dense GTE embeddings as a LangChain `Embeddings` class, a drop-in for `HuggingFaceEmbeddings`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gte_rag.encoder import GTEEncoder
from gte_rag.errors import CheckpointError, missing_extra
from gte_rag.interface import TextEncoder
from gte_rag.shared import SharedEncoder
from gte_rag.vectors import FloatArray

try:
    from langchain_core.embeddings import Embeddings
    from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
except ImportError as error:
    raise missing_extra("langchain-core", "langchain") from error

# What HuggingFaceEmbeddings' model_kwargs call it -> the field here; None: accepted, without effect.
_MODEL_KWARGS: dict[str, str | None] = {
    "device": "device",
    "revision": "revision",
    "local_files_only": "local_files_only",
    "truncate_dim": "dimension",
    "trust_remote_code": None,
}
_ENCODE_KWARGS = ("normalize_embeddings", "batch_size", "show_progress_bar")
# Fields that say which encoder to load; one that is passed ready-made has decided them already.
_LOADING_FIELDS = ("model_name", "cache_folder", "device", "precision", "max_length", "revision", "local_files_only")


class GTEEmbeddings(BaseModel, Embeddings):
    """Dense vectors of a GTE model: always of unit length, the same whatever texts are embedded together.

    Without arguments the bundled ``"gte-mini"`` is used and nothing is downloaded. An option that
    `langchain_huggingface.HuggingFaceEmbeddings` has too has the same name here, so replacing the class name is enough:

    ```python
    GTEEmbeddings(
        model_name="Alibaba-NLP/gte-multilingual-base",
        model_kwargs={"device": "cpu", "trust_remote_code": True},
        encode_kwargs={"normalize_embeddings": True, "batch_size": 8},
    )
    ```

    Three things differ: code from a model repository is never run, with or without `trust_remote_code`; texts are embedded
    as they are, newlines included; and an option that is not understood is refused by name.

    A pickle holds the options, not the weights: unpickling loads the model again and checks that it is the same one.

    Attributes:
        model_name: ``"gte-mini"``, a folder or a Hugging Face id; `model` is accepted as well.
        cache_folder: Where downloads are kept; None is Hugging Face's own cache.
        model_kwargs: `device`, `revision`, `local_files_only` as below; `truncate_dim`, the `dimension` below, with vectors
            of unit length after the cut; `trust_remote_code`, accepted without effect.
        encode_kwargs: `show_progress_bar`, which comes before `show_progress`; `normalize_embeddings`, which must be True;
            `batch_size`, accepted without effect, because batches are formed by their number of tokens.
        query_encode_kwargs: The same for queries; when empty, `encode_kwargs` holds for them too.
        multi_process: Must be False.
        show_progress: Whether to show a progress bar for work of more than two seconds.
        dimension: Length of the vectors; None is the longest the model gives.
        precision: ``"auto"`` or a precision `GTEEncoder.from_pretrained` accepts.
        max_length: Longest text in tokens; longer ones are cut, with a warning.
        device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if there is one.
        revision: Branch, tag or commit of a Hugging Face id.
        local_files_only: Use what was downloaded before and never the network.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    model_name: str = Field(default="gte-mini", alias="model")
    cache_folder: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    query_encode_kwargs: dict[str, Any] = Field(default_factory=dict)
    multi_process: bool = False
    show_progress: bool = False
    dimension: int | None = None
    precision: str = "auto"
    max_length: int = 8192
    device: str | None = None
    revision: str | None = None
    local_files_only: bool = False

    _encoder: TextEncoder = PrivateAttr()
    _shared: SharedEncoder | None = PrivateAttr(default=None)

    # The model is loaded here and not in a validator: pydantic would replace the core's own errors by a ValidationError.
    def __init__(self, *, encoder: TextEncoder | None = None, **options: Any) -> None:  # noqa: ANN401
        """Check the options and load the model.

        Args:
            encoder: A ready-made encoder, to share one with a `HybridCollection` or another adapter, or a client of
                `gte_rag.remote`. It decides everything about the model; of the fields only `dimension` and those about
                progress may be given beside it.
            **options: The fields above.

        Raises:
            CheckpointError: The model cannot be loaded.
            ValueError: An option is unknown, out of range, given twice, or given beside `encoder`.
        """
        super().__init__(**options)
        if encoder is None:
            self._encoder = self._load()
            return
        if not isinstance(encoder, TextEncoder):
            raise TypeError(
                f"encoder is {type(encoder).__name__}; give a gte_rag.GTEEncoder, or an encoder of gte_rag.remote"
            )
        if given := [field for field in _LOADING_FIELDS if field in self.model_fields_set]:
            raise ValueError(f"{', '.join(given)}: decided by the encoder that is passed; leave out one or the other")
        encoder.encode_queries([], sparse=False, dimension=self.dimension)  # refuses a dimension it cannot give
        self.model_name = encoder.name
        if isinstance(encoder, GTEEncoder):
            self.device, self.precision, self.max_length = str(encoder.device), encoder.precision, encoder.max_length
        self.dimension = encoder.dimension if self.dimension is None else self.dimension
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """The encoder in use, to be shared: ``HybridCollection(client, name, encoder=embeddings.encoder)``."""
        return self._encoder

    def share(self) -> SharedEncoder:
        """Return where dense and sparse vectors of a text come from one forward pass; from now on this encodes there too.

        `GTESparseEmbeddings` and `GTEMilvusSparseEmbeddings` call it. Every text embedded from now on is given sparse weights
        as well, which are kept until they are asked for, 4,096 texts or the last call at most.

        Raises:
            ValueError: The model gives no sparse vectors.
        """
        if self._shared is None:
            self._shared = SharedEncoder.wrap(self._encoder, dimension=self.dimension)
        return self._shared

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vector of each document.

        Args:
            texts: The documents; ``[]`` gives ``[]``.

        Returns:
            One list of `dimension` floats, of unit length, per document.

        Raises:
            TypeError: `texts` is not a list of strings.
        """
        if self._shared is not None:
            return _rows(self._shared.dense(texts, show_progress=self._shows_progress(self.encode_kwargs)))
        return _rows(self._encoder.encode_documents(texts, **self._options(self.encode_kwargs)).dense)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query: `dimension` floats, of unit length."""
        if self._shared is not None:
            progress = self._shows_progress(self._for_queries)
            return _rows(self._shared.dense([text], queries=True, show_progress=progress))[0]
        return _rows(self._encoder.encode_queries([text], **self._options(self._for_queries)).dense)[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return what `embed_documents` returns, computed in a thread while the event loop goes on."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """Return what `embed_query` returns, computed in a thread while the event loop goes on."""
        return await asyncio.to_thread(self.embed_query, text)

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields and the model's fingerprint, without the model; of a service its client, without the key."""
        state = {**super().__getstate__(), "__pydantic_private__": None}
        if isinstance(self._encoder, GTEEncoder):
            return {**state, "fingerprint": self._encoder.fingerprint}
        return {**state, "encoder": self._encoder}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore the fields and load the model again.

        Raises:
            CheckpointError: The model of this name is another one than when the pickle was made.
        """
        super().__setstate__({key: value for key, value in state.items() if key not in ("fingerprint", "encoder")})
        self._shared = None
        if "encoder" in state:
            self._encoder = state["encoder"]
            return
        self._encoder = encoder = self._load()
        if encoder.fingerprint != state["fingerprint"]:
            raise CheckpointError(
                f"{self.model_name!r} is another model than when this was pickled: its fingerprint is "
                f"{encoder.fingerprint} and was {state['fingerprint']}. Name a revision or a folder that stays"
            )

    @property
    def _for_queries(self) -> dict[str, Any]:
        return self.query_encode_kwargs or self.encode_kwargs

    def _options(self, encode_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "sparse": False,
            "dimension": self.dimension,
            "show_progress": self._shows_progress(encode_kwargs),
        }

    def _shows_progress(self, encode_kwargs: Mapping[str, Any]) -> bool:
        return bool(encode_kwargs.get("show_progress_bar", self.show_progress))

    def _load(self) -> GTEEncoder:
        return GTEEncoder.from_pretrained(
            self.model_name,
            device=self.device,
            precision=self.precision,
            dimension=self.dimension,
            max_length=self.max_length,
            revision=self.revision,
            cache_dir=self.cache_folder,
            local_files_only=self.local_files_only,
        )

    @model_validator(mode="before")
    @classmethod
    def _spread_model_kwargs(cls, options: Any) -> Any:  # noqa: ANN401
        model_kwargs = options.get("model_kwargs") if isinstance(options, dict) else None
        if not isinstance(model_kwargs, Mapping):
            return options
        spread = dict(options)
        for name, value in model_kwargs.items():
            if name not in _MODEL_KWARGS:
                raise ValueError(f"model_kwargs has {name!r}; understood here: {', '.join(_MODEL_KWARGS)}")
            field = _MODEL_KWARGS[name]
            if field is not None and spread.setdefault(field, value) != value:
                raise ValueError(
                    f"{field} is {spread[field]!r} and model_kwargs[{name!r}] is {value!r}; give one of them"
                )
        return spread

    @field_validator("encode_kwargs", "query_encode_kwargs")
    @classmethod
    def _check_encode_kwargs(cls, encode_kwargs: dict[str, Any]) -> dict[str, Any]:
        if unknown := [name for name in encode_kwargs if name not in _ENCODE_KWARGS]:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} not understood; accepted here: {', '.join(_ENCODE_KWARGS)}"
            )
        if encode_kwargs.get("normalize_embeddings", True) is not True:
            raise ValueError("normalize_embeddings must be True: GTE vectors are always of unit length; leave it out")
        return encode_kwargs

    @field_validator("multi_process")
    @classmethod
    def _check_multi_process(cls, multi_process: bool) -> bool:
        if multi_process:
            raise ValueError("multi_process must be False: run one process per device and give each its `device`")
        return multi_process


def _rows(dense: FloatArray | None) -> list[list[float]]:
    assert dense is not None  # every call here asks for dense vectors
    rows: list[list[float]] = dense.tolist()
    return rows
