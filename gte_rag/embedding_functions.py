"""Embedding functions for Chroma itself: dense for any Chroma, sparse for Chroma Cloud.

Importing this module registers both, so that Chroma can rebuild them from a collection's stored configuration. Chroma
does so several times a call; all instances of equal options share one encoder, loaded when the first text comes.
"""

from __future__ import annotations

from typing import Any

from gte_rag.errors import missing_extra
from gte_rag.shared import shared_encoder

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space, SparseEmbeddingFunction
    from chromadb.base_types import SparseVector as ChromaSparseVector
    from chromadb.utils.embedding_functions import register_embedding_function, register_sparse_embedding_function
except ImportError as error:
    raise missing_extra("chromadb", "chroma") from error

_OPTIONS = ("model_name", "dimension", "device", "precision")


class _Options:
    """The options of both functions and their stored form."""

    def __init__(
        self,
        model_name: str = "gte-mini",
        *,
        dimension: int | None = None,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Set what to load; nothing is loaded yet.

        Args:
            model_name: ``"gte-mini"``, a folder, or a Hugging Face id.
            dimension: Length of the dense vectors; None is the longest.
            device: A torch device; None takes a GPU if there is one.
            precision: As for `GTEEncoder.from_pretrained`.
        """
        self._config: dict[str, Any] = {
            "model_name": model_name,
            "dimension": dimension,
            "device": device,
            "precision": precision,
        }
        self._shared = shared_encoder(model_name, dimension=dimension, device=device, precision=precision)

    def get_config(self) -> dict[str, Any]:
        """Return the options as Chroma stores them."""
        return dict(self._config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Refuse a stored configuration with unknown options."""
        unknown = sorted(set(config) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown options {', '.join(unknown)}; known: {', '.join(_OPTIONS)}")

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse to change the model or the dimension of a collection that exists."""
        for option in ("model_name", "dimension"):
            if old_config.get(option) != new_config.get(option):
                raise ValueError(
                    f"the collection was made with {option}={old_config.get(option)!r}, not {new_config.get(option)!r}; "
                    "its vectors would not fit. Make a new collection"
                )


@register_embedding_function
class GTEEmbeddingFunction(_Options, EmbeddingFunction[Documents]):
    """Dense GTE vectors, for the `embedding_function` of a Chroma collection."""

    def __call__(self, input: Documents) -> Embeddings:
        """Return a unit vector, float32, for each document."""
        return self._dense(input, queries=False)

    def embed_query(self, input: Documents) -> Embeddings:
        """Return a unit vector, float32, for each query, with the checkpoint's query prompt if it has one."""
        return self._dense(input, queries=True)

    def _dense(self, texts: Documents, *, queries: bool) -> Embeddings:
        return list(self._shared.dense(texts, queries=queries))

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma knows this function."""
        return "gte_rag"

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> GTEEmbeddingFunction:
        """Rebuild the function from its stored options."""
        GTEEmbeddingFunction.validate_config(config)
        return GTEEmbeddingFunction(**config)

    def default_space(self) -> Space:
        """Return the distance that fits: cosine."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """Return the distances that rank unit vectors alike."""
        return ["cosine", "l2", "ip"]


@register_sparse_embedding_function
class GTESparseEmbeddingFunction(_Options, SparseEmbeddingFunction[Documents]):
    """Sparse GTE vectors for a schema of Chroma Cloud; a local Chroma stores none (use `HybridCollection` there)."""

    def __call__(self, input: Documents) -> list[ChromaSparseVector]:
        """Return the token weights of each document, by token id."""
        return self._sparse(input, queries=False)

    def embed_query(self, input: Documents) -> list[ChromaSparseVector]:
        """Return the token weights of each query, by token id."""
        return self._sparse(input, queries=True)

    def _sparse(self, texts: Documents, *, queries: bool) -> list[ChromaSparseVector]:
        sparse = self._shared.sparse(texts, queries=queries)
        return [ChromaSparseVector(indices=row.indices.tolist(), values=row.values.tolist()) for row in sparse]

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma knows this function."""
        return "gte_rag_sparse"

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> GTESparseEmbeddingFunction:
        """Rebuild the function from its stored options."""
        GTESparseEmbeddingFunction.validate_config(config)
        return GTESparseEmbeddingFunction(**config)
