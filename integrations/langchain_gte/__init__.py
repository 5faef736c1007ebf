"""GTE embeddings and hybrid retrieval for LangChain."""

from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.retrievers import GTEHybridRetriever

__all__ = ["GTEEmbeddings", "GTEHybridRetriever"]
