"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest

# A test that needs the network is a mistake: fail at once instead of waiting for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small products on busy cores: several threads wait for each other far longer than one computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")
# Ray on the loopback interface only, and silent; it reads these when it is first imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from checkpoints import build, find_variant
from gte_rag import Encoding, GTEEncoder, GTEReranker, SparseMatrix

if TYPE_CHECKING:
    from chromadb.api import ClientAPI


@pytest.fixture(scope="session")
def encoder() -> GTEEncoder:
    """The bundled encoder in float32, whatever `auto` is here, loaded once."""
    return GTEEncoder.from_pretrained(precision="float32")


@pytest.fixture
def bundled_once(encoder: GTEEncoder, encoded: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is made of vectors: the bundled model is not loaded again, and no text is encoded a second time."""
    load = GTEEncoder.from_pretrained.__func__  # type: ignore[attr-defined]
    encode = encoder._encode_window

    def from_pretrained(name: Any = "gte-mini", **options: Any) -> GTEEncoder:
        usual = {"device": None, "dimension": None, "precision": "auto", "max_length": 8192, "revision": None}
        usual |= {"cache_dir": None, "local_files_only": options.get("local_files_only")}
        if name == "gte-mini" and options.get("dimension") == encoder.dimension:
            options = {**options, "dimension": None}
        same = name == "gte-mini" and all(usual.get(option, ...) == value for option, value in options.items())
        return encoder if same else load(GTEEncoder, name, **options)

    def encode_window(
        window: list[str], token_ids: list[list[int]], truncated: int, asked: Any, report: Any
    ) -> Encoding:
        keys = [(tuple(ids), asked) for ids in token_ids]
        new = {key: row for row, key in enumerate(keys) if key not in encoded}
        if new:
            rows = list(new.values())
            found = encode([window[row] for row in rows], [token_ids[row] for row in rows], 0, asked, lambda _: None)
            for position, key in enumerate(new):
                dense = None if found.dense is None else found.dense[position]
                encoded[key] = (dense, None if found.sparse is None else found.sparse[position])
        report(len(window))
        pairs = [encoded[key] for key in keys]
        return Encoding(
            np.stack([dense for dense, _ in pairs]) if asked.dense else None,
            SparseMatrix.from_vectors([sparse for _, sparse in pairs], encoder.vocab_size) if asked.sparse else None,
            truncated,
        )

    monkeypatch.setattr(GTEEncoder, "from_pretrained", from_pretrained)
    monkeypatch.setattr(encoder, "_encode_window", encode_window)


@pytest.fixture(scope="session")
def encoded() -> dict[Any, Any]:
    """What the shared encoder has encoded for `bundled_once`."""
    return {}


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random reranker in the original layout."""
    return build(find_variant("multilingual-reranker"), tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="session")
def reranker(reranker_folder: Path) -> GTEReranker:
    """The small random reranker, loaded once."""
    return GTEReranker.from_pretrained(reranker_folder, device="cpu", precision="float32")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of every forward pass from now on."""
    counted: list[int] = []
    original = GTEEncoder._encode

    def counting(self: GTEEncoder, texts: Any, *args: Any) -> Any:
        counted.append(len(texts))
        return original(self, texts, *args)

    monkeypatch.setattr(GTEEncoder, "_encode", counting)
    return counted


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


@contextmanager
def served(command: str, *arguments: str, folder: Path) -> Iterator[int]:
    """Run a server of this environment on a free port of loopback until the block ends; yield the port."""
    beside = shutil.which(command, path=str(Path(sys.executable).parent))
    executable = beside or shutil.which(command)
    assert executable is not None, f"its package is installed, but the command {command!r} was not found"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"  # a file: the server stops answering once nobody empties a pipe
    call = [executable, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(call, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A Chroma server on loopback: host and port."""
    folder = tmp_path_factory.mktemp("server")
    with served("chroma", "run", "--path", str(folder / "data"), folder=folder) as port:
        yield "127.0.0.1", port


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Milvus Lite served to any number of processes on loopback: its address."""
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    folder = tmp_path_factory.mktemp("milvus")
    with served("milvus-lite", "server", "--data-dir", str(folder / "data"), folder=folder) as port:
        yield f"http://127.0.0.1:{port}"
