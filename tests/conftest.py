"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

# A test that needs the network is a mistake: fail at once instead of waiting for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")

from checkpoints import build, find_variant
from gte_rag import GTEEncoder, GTEReranker

if TYPE_CHECKING:
    from chromadb.api import ClientAPI


@pytest.fixture(scope="session")
def encoder() -> GTEEncoder:
    """The bundled encoder, loaded once."""
    return GTEEncoder.from_pretrained()


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random reranker in the original layout."""
    return build(find_variant("multilingual-reranker"), tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="session")
def reranker(reranker_folder: Path) -> GTEReranker:
    """The small random reranker, loaded once."""
    return GTEReranker.from_pretrained(reranker_folder, device="cpu", precision="float32")


@pytest.fixture
def chroma_client() -> Iterator[ClientAPI]:
    """An empty in-memory Chroma; every test has a database of its own."""
    chromadb = pytest.importorskip("chromadb")
    settings = chromadb.Settings(anonymized_telemetry=False)
    admin = chromadb.AdminClient(settings)
    database = f"test-{uuid4().hex}"
    admin.create_database(database)
    client = chromadb.EphemeralClient(settings=settings, database=database)
    yield client
    for (
        collection
    ) in client.list_collections():  # chroma-core/chroma#7594: lists in metadata outlive a dropped collection
        ids = collection.get(include=[])["ids"]
        if ids:
            collection.delete(ids)
    admin.delete_database(database)
