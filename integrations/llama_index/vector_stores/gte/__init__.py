"""A vector store with dense, sparse and hybrid search on Chroma for LlamaIndex."""

from gte_rag.errors import missing_extra

try:
    from llama_index.vector_stores.gte.base import GTEChromaVectorStore
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index.core"):
        raise
    raise missing_extra("llama-index-core", "llama-index") from error

__all__ = ["GTEChromaVectorStore"]
