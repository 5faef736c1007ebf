"""Collections that others fill, several threads and processes at work on one, processes that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import pytest

from gte_rag import CollectionMismatchError, HybridCollection, HybridRetriever
from gte_rag.records import RESERVED_KEY
from gte_rag.retriever import MODES
from stub_encoder import StubEncoder, open_collection

chromadb = pytest.importorskip("chromadb")

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

    from gte_rag import GTEEncoder

TEXTS = {"bread": "bread needs flour and water", "stone": "a stone in the river", "cloud": "a cloud over the river"}


@pytest.fixture
def stub() -> StubEncoder:
    return StubEncoder()


def fill_like_a_stranger(
    client: ClientAPI, name: str, stub: StubEncoder, space: str = "cosine", scale: float = 1.0
) -> Any:
    """Make a collection as another program does: dense vectors and metadata, no trace of gte-rag."""
    collection = client.create_collection(
        name,
        embedding_function=None,
        metadata={"owner": "stranger"},
        configuration=cast(Any, {"hnsw": {"space": space}}),
    )
    vectors = scale * np.stack([stub.dense(text) for text in TEXTS.values()])
    collection.add(
        ids=list(TEXTS),
        documents=list(TEXTS.values()),
        embeddings=vectors,
        metadatas=[{"n": n} for n in range(len(TEXTS))],
    )
    return collection


def adopt(client: ClientAPI, name: str, stub: StubEncoder) -> HybridCollection:
    return HybridCollection(client, name, encoder=cast("GTEEncoder", stub), adopt=True)


@pytest.mark.parametrize("space", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("mode", MODES)
def test_a_strangers_collection_is_searched_in_every_mode_and_distance(
    chroma_client: ClientAPI, stub: StubEncoder, space: str, mode: str
) -> None:
    theirs = fill_like_a_stranger(chroma_client, "theirs", stub, space)
    before = theirs.get(include=["metadatas", "embeddings"])
    ours = adopt(chroma_client, "theirs", stub)
    hits = HybridRetriever(ours, mode=mode).search("flour bread")
    assert hits[0].id == "bread"
    assert hits[0].dense_score == pytest.approx(float(stub.dense("flour bread") @ stub.dense(TEXTS["bread"])), abs=1e-5)
    assert hits[0].sparse_score == pytest.approx(0.18, rel=1e-3)
    after = theirs.get(include=["metadatas", "embeddings"])
    assert after["metadatas"] == before["metadatas"]
    assert chroma_client.get_collection("theirs").metadata == {"owner": "stranger"}


def test_backfill_stores_sparse_vectors_and_nothing_else(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    theirs = fill_like_a_stranger(chroma_client, "theirs", stub)
    before = theirs.get(include=["documents", "embeddings"])
    ours = adopt(chroma_client, "theirs", stub)
    assert ours.backfill() == 3
    assert ours.backfill() == 0
    after = theirs.get(include=["documents", "embeddings", "metadatas"])
    assert after["documents"] == before["documents"]
    np.testing.assert_array_equal(after["embeddings"], before["embeddings"])
    assert all(RESERVED_KEY in metadata and "n" in metadata for metadata in after["metadatas"])
    stub.document_calls.clear()
    again = open_collection(chroma_client, "theirs", stub)  # it is one of ours now
    assert HybridRetriever(again).search("river stone")[0].id == "stone"
    assert stub.document_calls == []


def test_a_strangers_collection_of_another_model_is_refused(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    collection = chroma_client.create_collection(
        "theirs", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    vectors = np.random.default_rng(0).standard_normal((3, stub.dimension)).astype(np.float32)
    collection.add(ids=list(TEXTS), documents=list(TEXTS.values()), embeddings=vectors)
    with pytest.raises(CollectionMismatchError, match="filled by another model than 'stub': the median cosine"):
        adopt(chroma_client, "theirs", stub)


def test_a_strangers_collection_that_cannot_be_used_is_refused(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    fill_like_a_stranger(chroma_client, "long", stub, "l2", scale=3.0)
    with pytest.raises(CollectionMismatchError, match="'l2' with vectors that are not of unit length"):
        adopt(chroma_client, "long", stub)
    with pytest.raises(CollectionMismatchError, match=r"dimension 32; this encoder gives 16.*dimension=32"):
        adopt(chroma_client, "long", StubEncoder(dimension=16))
    bare = chroma_client.create_collection("bare", embedding_function=None, configuration={"hnsw": {"space": "cosine"}})
    bare.add(ids=["x"], embeddings=stub.dense("x")[None])
    with pytest.raises(CollectionMismatchError, match="stores no texts"):
        adopt(chroma_client, "bare", stub)


def test_without_adopt_the_refusal_says_how(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    fill_like_a_stranger(chroma_client, "theirs", stub)
    with pytest.raises(CollectionMismatchError, match="open it with adopt=True"):
        open_collection(chroma_client, "theirs", stub)


@pytest.mark.parametrize("persistent", [False, True], ids=["memory", "disk"])
def test_eight_threads_read_and_write_one_collection(tmp_path: Path, stub: StubEncoder, persistent: bool) -> None:
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = (
        chromadb.PersistentClient(str(tmp_path), settings=settings)
        if persistent
        else chromadb.EphemeralClient(settings=settings)
    )
    collection = open_collection(client, f"threads-{uuid4().hex}", stub)
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            retriever = HybridRetriever(collection, k=3, mode=MODES[worker % len(MODES)])
            for step in range(12):
                names = [f"w{worker}-{number}" for number in range(step % 4, step % 4 + 3)]
                collection.upsert(names, [f"worker{worker} word{name} step{step}" for name in names])
                for hit in retriever.search(f"worker{worker}"):
                    assert hit.text.split()[0].startswith("worker")
                if step % 5 == 4:
                    collection.delete([names[0]])
        except BaseException as error:  # reported in the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    records = collection.get()
    assert set(collection.lexical_index().ids()) == {record.id for record in records}
    for record in records[:8]:
        best = HybridRetriever(collection, k=1, mode="sparse").search(record.text)[0]
        assert best.text == record.text


_OTHER_PROCESS = """
import sys, chromadb
from stub_encoder import StubEncoder, open_collection
from gte_rag import HybridRetriever
host, port, name = sys.argv[1:]
client = chromadb.HttpClient(host, int(port), settings=chromadb.Settings(anonymized_telemetry=False))
collection = open_collection(client, name, StubEncoder())
print("ready", flush=True)
for line in sys.stdin:
    command, _, rest = line.strip().partition(" ")
    if command == "upsert":
        key, _, text = rest.partition(" ")
        collection.upsert([key], [text])
        print("done", flush=True)
    else:
        print(" ".join(hit.id for hit in HybridRetriever(collection, mode="sparse").search(rest)), flush=True)
"""


def test_two_processes_share_a_server_and_see_each_others_writes(
    chroma_server: tuple[str, int], stub: StubEncoder
) -> None:
    host, port = chroma_server
    client = chromadb.HttpClient(host, port, settings=chromadb.Settings(anonymized_telemetry=False))
    name = f"shared-{uuid4().hex}"
    ours = HybridRetriever(open_collection(client, name, stub), mode="sparse")
    ours.collection.upsert(["a", "b"], ["bread", "stone"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER_PROCESS, host, str(port), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def tell(line: str) -> str:
            other.stdin.write(line + "\n")  # type: ignore[union-attr]
            other.stdin.flush()  # type: ignore[union-attr]
            return other.stdout.readline().strip()  # type: ignore[union-attr]

        assert other.stdout.readline().strip() == "ready"
        assert [hit.id for hit in ours.search("bread")] == ["a"]
        assert tell("search bread") == "a"
        assert tell("upsert b bread and water") == "done"  # the number of records stays the same
        assert {hit.id for hit in ours.search("bread")} == {"a", "b"}
        ours.collection.upsert(["c"], ["stone"])
        assert tell("search stone") == "c"
        ours.collection.delete(["c"])
        assert tell("search stone") == ""
        other.stdin.close()


@pytest.mark.parametrize("foreign", ["stamped replacement", "addition"])
def test_a_write_of_another_process_in_the_middle_of_ours_is_noticed(
    chroma_client: ClientAPI, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    ours = HybridRetriever(open_collection(chroma_client, "raced", stub), mode="sparse")
    ours.collection.upsert(["a", "b"], ["bread", "stone"])
    assert [hit.id for hit in ours.search("bread")] == ["a"]
    raw = ours.collection.collection
    upsert = raw.upsert

    def raced(**options: Any) -> None:
        upsert(**options)
        other = "b" if foreign == "stamped replacement" else "d"
        upsert(ids=[other], documents=["bread"], embeddings=stub.dense("bread")[None])
        if foreign == "stamped replacement":
            raw.modify(metadata={**(raw.metadata or {}), "gte_rag:stamp": "of the other process"})

    monkeypatch.setattr(raw, "upsert", raced)
    ours.collection.upsert(["c"], ["bread"])
    found = {hit.id for hit in ours.search("bread")}
    assert found == ({"a", "b", "c"} if foreign == "stamped replacement" else {"a", "c", "d"})


def test_a_write_asks_for_the_collections_metadata_once(
    chroma_client: ClientAPI, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time is a request to a server. Only a lexical index in use needs to know the state before, too."""
    collection = open_collection(chroma_client, "asked", stub)
    asked: list[str] = []
    get_collection = chroma_client.get_collection

    def counted(name: str, **options: Any) -> Any:
        asked.append(name)
        return get_collection(name, **options)

    monkeypatch.setattr(chroma_client, "get_collection", counted)
    collection.upsert(["a"], ["bread"])
    collection.delete(["a"])
    assert asked == ["asked"] * 2
    collection.lexical_index()
    asked.clear()
    collection.upsert(["a"], ["bread"])
    assert asked == ["asked"] * 2


def _index_until_killed(folder: str, edition: int, done: Any) -> None:
    client = chromadb.PersistentClient(folder, settings=chromadb.Settings(anonymized_telemetry=False))
    collection = open_collection(client, "killed", StubEncoder())
    for start in range(0, 1000, 20):
        names = [f"d{number}" for number in range(start, start + 20)]
        collection.upsert(names, [f"{name} edition{edition}" for name in names], metadatas=[{"edition": edition}] * 20)
        done.send(start + 20)


def _check_after_kill(folder: str, edition: int, reported: int, result: Any) -> None:
    client = chromadb.PersistentClient(folder, settings=chromadb.Settings(anonymized_telemetry=False))
    stub = StubEncoder()
    collection = open_collection(client, "killed", stub)
    records = {record.id: record for record in collection.get()}
    lost = [n for n in range(reported) if f"edition{edition}" not in records[f"d{n}"].text]
    mixed = [name for name, record in records.items() if f"edition{record.metadata['edition']}" not in record.text]
    stub.document_calls.clear()
    index = collection.lexical_index()
    result.send({"lost": lost, "mixed": mixed, "stale": stub.document_calls, "same": set(index.ids()) == set(records)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_process_loses_nothing_it_reported_and_leaves_nothing_inconsistent(tmp_path: Path) -> None:
    """A few rounds; benchmarks/durability.py runs hundreds."""
    spawn = multiprocessing.get_context("forkserver")  # imports once, before any Chroma client has threads
    spawn.set_forkserver_preload(["chromadb", "stub_encoder", "gte_rag.retriever"])
    for edition in range(3):
        receive, send = spawn.Pipe(duplex=False)
        child = spawn.Process(target=_index_until_killed, args=(str(tmp_path), edition, send))
        child.start()
        send.close()
        reported = receive.recv()  # it has begun
        time.sleep(0.15 * edition)
        os.kill(cast(int, child.pid), signal.SIGKILL)
        child.join()
        while True:
            try:
                reported = receive.recv()
            except EOFError:
                break
        receive, send = spawn.Pipe(duplex=False)
        checker = spawn.Process(target=_check_after_kill, args=(str(tmp_path), edition, reported, send))
        checker.start()
        found = receive.recv()
        checker.join()
        assert found == {"lost": [], "mixed": [], "stale": [], "same": True}, json.dumps(found)


@pytest.mark.parametrize("mode", ["rescore", "union", "dense"])
def test_a_filter_finds_every_match_among_many_equal_texts(
    chroma_client: ClientAPI, stub: StubEncoder, mode: str
) -> None:
    """Chroma's approximate search loses records here: of equal vectors it keeps few neighbours."""
    collection = open_collection(chroma_client, "equal", stub)
    collection.upsert(
        [f"d{n}" for n in range(3000)],
        ["the same footer on every page"] * 3000,
        metadatas=[{"few": n % 250 == 0} for n in range(3000)],
    )
    hits = HybridRetriever(collection, k=20, mode=mode).search("footer", where={"few": True})
    assert {hit.id for hit in hits} == {f"d{n}" for n in range(0, 3000, 250)}
