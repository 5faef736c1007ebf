"""A vector store with dense, sparse and hybrid search on Chroma for LlamaIndex."""

from gte_rag.errors import missing_extra

try:
    from llama_index.vector_stores.gte.base import GTEChromaVectorStore
except ModuleNotFoundError as error:
    if error.name not in ("llama_index.core", "llama_index"):
        raise
    raise missing_extra("llama-index-core", "llama-index") from error

__all__ = ["GTEChromaVectorStore"]
