"""Sparse GTE embeddings for LlamaIndex, and for its Qdrant and Milvus stores."""

from importlib import import_module
from typing import TYPE_CHECKING

from llama_index.sparse_embeddings.gte.base import GTESparseEmbedding
from llama_index.sparse_embeddings.gte.qdrant import qdrant_sparse_functions

if TYPE_CHECKING:
    from llama_index.sparse_embeddings.gte.milvus import GTEMilvusSparseEmbedding

__all__ = ["GTEMilvusSparseEmbedding", "GTESparseEmbedding", "qdrant_sparse_functions"]


def __getattr__(name: str) -> object:
    if name == "GTEMilvusSparseEmbedding":  # on first use: it needs the package of that store
        return import_module("llama_index.sparse_embeddings.gte.milvus").GTEMilvusSparseEmbedding
    raise AttributeError(f"module 'llama_index.sparse_embeddings.gte' has no attribute {name!r}")
