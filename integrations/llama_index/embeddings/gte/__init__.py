"""GTE embeddings for LlamaIndex."""

from llama_index.embeddings.gte.base import GTEEmbedding

__all__ = ["GTEEmbedding"]
