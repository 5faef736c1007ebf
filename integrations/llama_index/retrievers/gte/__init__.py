"""Hybrid retrieval with GTE models for LlamaIndex."""

from gte_rag.errors import missing_extra

try:
    from llama_index.retrievers.gte.base import GTEHybridRetriever
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index.core"):
        raise
    raise missing_extra("llama-index-core", "llama-index") from error

__all__ = ["GTEHybridRetriever"]
