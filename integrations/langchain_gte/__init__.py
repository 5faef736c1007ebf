"""GTE embeddings, a vector store with hybrid search, hybrid retrieval and reranking for LangChain."""

from gte_rag.errors import missing_extra

try:
    from langchain_gte.embeddings import GTEEmbeddings
    from langchain_gte.reranker import GTERerank
    from langchain_gte.retrievers import GTEHybridRetriever
    from langchain_gte.vectorstores import GTEChroma
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "langchain_core":
        raise
    raise missing_extra("langchain-core", "langchain") from error

__all__ = ["GTEChroma", "GTEEmbeddings", "GTEHybridRetriever", "GTERerank"]
