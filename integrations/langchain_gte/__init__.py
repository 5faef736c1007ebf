"""GTE embeddings, a vector store with hybrid search, hybrid retrieval and reranking for LangChain."""

from langchain_gte.embeddings import GTEEmbeddings
from langchain_gte.reranker import GTERerank
from langchain_gte.retrievers import GTEHybridRetriever
from langchain_gte.vectorstores import GTEChroma

__all__ = ["GTEChroma", "GTEEmbeddings", "GTEHybridRetriever", "GTERerank"]
