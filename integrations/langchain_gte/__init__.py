"""GTE embeddings, hybrid retrieval and reranking for LangChain."""

from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.reranker import GTERerank
from langchain_gte.retrievers import GTEHybridRetriever

__all__ = ["GTEEmbeddings", "GTEHybridRetriever", "GTERerank"]
