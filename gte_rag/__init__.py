"""GTE multilingual embeddings, dense and sparse in one pass, and hybrid retrieval on a local Chroma.

The names below are imported on first use, so that ``import gte_rag`` is fast and works without the optional packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gte_rag.chroma import HybridCollection
    from gte_rag.encoder import GTEEncoder
    from gte_rag.errors import (
        BulkError,
        CheckpointError,
        CollectionMismatchError,
        DamagedCollectionError,
        MissingExtraError,
        RemoteError,
    )
    from gte_rag.explanation import Explanation, TokenMatch, explain, explain_hit
    from gte_rag.interface import RerankResult
    from gte_rag.records import Record
    from gte_rag.remote import DashScopeEncoder, DashScopeReranker, OpenAIEncoder
    from gte_rag.reranker import GTEReranker
    from gte_rag.reranking import RerankedHit, RerankingRetriever
    from gte_rag.retriever import Hit, HybridRetriever
    from gte_rag.vectors import Encoding, SparseMatrix, SparseVector

__version__ = "0.1.0"

__all__ = [
    "BulkError",
    "CheckpointError",
    "CollectionMismatchError",
    "DamagedCollectionError",
    "DashScopeEncoder",
    "DashScopeReranker",
    "Encoding",
    "Explanation",
    "GTEEncoder",
    "GTEReranker",
    "Hit",
    "HybridCollection",
    "HybridRetriever",
    "MissingExtraError",
    "OpenAIEncoder",
    "Record",
    "RemoteError",
    "RerankResult",
    "RerankedHit",
    "RerankingRetriever",
    "SparseMatrix",
    "SparseVector",
    "TokenMatch",
    "__version__",
    "explain",
    "explain_hit",
]

_HOMES = {
    "errors": (
        "BulkError",
        "CheckpointError",
        "CollectionMismatchError",
        "DamagedCollectionError",
        "MissingExtraError",
        "RemoteError",
    ),
    "interface": ("RerankResult",),
    "vectors": ("Encoding", "SparseMatrix", "SparseVector"),
    "remote": ("DashScopeEncoder", "DashScopeReranker", "OpenAIEncoder"),
    "encoder": ("GTEEncoder",),
    "records": ("Record",),
    "chroma": ("HybridCollection",),
    "retriever": ("Hit", "HybridRetriever"),
    "explanation": ("Explanation", "TokenMatch", "explain", "explain_hit"),
    "reranker": ("GTEReranker",),
    "reranking": ("RerankedHit", "RerankingRetriever"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gte_rag.{module}"), name)
    raise AttributeError(f"module 'gte_rag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
