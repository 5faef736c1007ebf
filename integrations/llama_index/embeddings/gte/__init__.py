"""GTE embeddings for LlamaIndex."""

from gte_rag.errors import missing_extra

try:
    from llama_index.embeddings.gte.base import GTEEmbedding
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index.core"):
        raise
    raise missing_extra("llama-index-core", "llama-index") from error

__all__ = ["GTEEmbedding"]
