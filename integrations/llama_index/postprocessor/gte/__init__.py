"""GTE reranking for LlamaIndex."""

from llama_index.postprocessor.gte.base import GTERerank

__all__ = ["GTERerank"]
