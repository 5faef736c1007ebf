"""Hybrid retrieval with GTE models for LlamaIndex."""

from llama_index.retrievers.gte.base import GTEHybridRetriever

__all__ = ["GTEHybridRetriever"]
