"""GTE embeddings, a vector store with hybrid search, hybrid retrieval and reranking for LangChain.

The classes for other stores are imported on first use: they need the packages of those stores.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.reranker import GTERerank
from langchain_gte.retrievers import GTEHybridRetriever
from langchain_gte.vectorstores import GTEChroma

if TYPE_CHECKING:
    from langchain_gte.milvus import GTEMilvusSparseEmbeddings
    from langchain_gte.qdrant import GTESparseEmbeddings

__all__ = [
    "GTEChroma",
    "GTEEmbeddings",
    "GTEHybridRetriever",
    "GTEMilvusSparseEmbeddings",
    "GTERerank",
    "GTESparseEmbeddings",
]

_HOMES = {"GTEMilvusSparseEmbeddings": "langchain_gte.milvus", "GTESparseEmbeddings": "langchain_gte.qdrant"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'langchain_gte' has no attribute {name!r}")
