"""A vector store with dense, sparse and hybrid search on Chroma for LlamaIndex."""

from llama_index.vector_stores.gte.base import GTEChromaVectorStore

__all__ = ["GTEChromaVectorStore"]
