"""A graph torn in every way is noticed and mended, and a whole one is left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("chromadb")

import chromadb
from chromadb.config import Settings

import gte_rag.chroma
import gte_rag.repair
import gte_rag.segments
from gte_rag import CollectionMismatchError, DamagedCollectionError, GTEEncoder, HybridCollection, HybridRetriever
from gte_rag.chroma import REPAIR_KEY
from gte_rag.records import RESERVED_KEY
from gte_rag.repair import RepairReport, find_damage, repair_collection
from gte_rag.segments import (
    DATABASE_FILE,
    FILES,
    HEADER,
    IDS,
    LENGTHS,
    LINKS,
    VECTORS,
    fault,
    find_segment,
    thorough_fault,
    torn_folders,
)
from stub_encoder import StubEncoder, open_collection

NAME = "notes"
RECORDS = 130
# Chroma writes its graph after so many changes: the last 30 records are in its log only.
SYNC = 50
GROUP = 20


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write and repair in groups, as with thousands of records."""
    monkeypatch.setattr(gte_rag.chroma, "GROUP", GROUP)
    monkeypatch.setattr(gte_rag.repair, "GROUP", GROUP)


@pytest.fixture
def stub() -> StubEncoder:
    return StubEncoder(dimension=32)


class Client:
    """A client that is closed at the end of a `with`, so that the next one reads the folder anew."""

    def __init__(self, folder: Path) -> None:
        self._client: Any = chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))

    def __enter__(self) -> Any:
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()


def text_of(number: int) -> str:
    return f"record number{number} of the shelf{number % 7}"


def fill(folder: Path, stub: StubEncoder, name: str = NAME, *, records: int = RECORDS) -> None:
    """Make a collection whose graph is written every 50 changes; some of its records were changed and deleted."""
    with Client(folder) as client:
        collection = new_collection(client, name, stub)
        for start in range(0, records, GROUP):
            numbers = range(start, min(start + GROUP, records))
            collection.upsert(
                [f"r{number}" for number in numbers],
                [text_of(number) for number in numbers],
                metadatas=[{"number": number, "tags": ["a", "b"]} for number in numbers],
            )


def new_collection(client: Any, name: str, stub: StubEncoder) -> HybridCollection:
    client.create_collection(
        name,
        embedding_function=None,
        configuration={"hnsw": {"space": "cosine", "sync_threshold": SYNC, "batch_size": 10}},
    )
    return open_collection(client, name, stub)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole database with two collections, to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    fill(folder, StubEncoder(dimension=32))
    fill(folder, StubEncoder(dimension=32), "others")
    return folder


@pytest.fixture
def db(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "db"))


def graph_of(db: Path, name: str = NAME) -> Path:
    with Client(db) as client:
        return find_segment(db, str(client.get_collection(name, embedding_function=None).id)).folder


def content(db: Path, name: str = NAME) -> dict[str, tuple[Any, ...]]:
    """Everything that is stored of the records, sealed sparse vectors included."""
    with Client(db) as client:
        collection = client.get_collection(name, embedding_function=None)
        found = collection.get(include=["documents", "metadatas", "embeddings"])
        return {
            record_id: (text, metadata, [round(float(value), 5) for value in vector])
            for record_id, text, metadata, vector in zip(
                found["ids"], found["documents"], found["metadatas"], found["embeddings"], strict=True
            )
        }


def repaired(db: Path, stub: StubEncoder, **options: Any) -> RepairReport:
    return repair_collection(db, NAME, encoder=cast(Any, stub), **options)


def check_whole(db: Path, stub: StubEncoder, before: dict[str, tuple[Any, ...]]) -> None:
    """Every record is as it was, and both sides of the search find it; it can be written to and opened again."""
    assert content(db) == before
    with Client(db) as client:
        collection = open_collection(client, NAME, stub)
        assert len(collection) == RECORDS
        assert set(collection.lexical_index().ids()) == set(before)
        stub.document_calls.clear()
        for number in range(0, RECORDS, 9):
            for mode in ("sparse", "union"):
                hits = HybridRetriever(collection, k=1, mode=mode).search(text_of(number))
                assert hits[0].id == f"r{number}"
            nearest = collection.nearest(stub.dense(text_of(number))[None], 1)[0]
            assert nearest.dense_scores[0] == pytest.approx(
                1, abs=1e-5
            )  # a hashed vector may be that of another text, too
        assert stub.document_calls == []  # no sparse vector was computed anew
        collection.upsert([f"new{number}" for number in range(2 * SYNC)], [f"new {n}" for n in range(2 * SYNC)])
    with Client(db) as client:
        assert len(open_collection(client, NAME, stub)) == RECORDS + 2 * SYNC


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files except SQLite's, which Chroma touches whenever it is opened."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(DATABASE_FILE)
    }


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def scramble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (damage, name) for name in FILES for damage in (halve, empty, Path.unlink, scramble)
]
# What sizes and header do not tell.
HIDDEN = {(scramble, VECTORS), (scramble, LENGTHS), (scramble, LINKS), (halve, LINKS)}


@pytest.mark.parametrize(("damage", "name"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_file_is_noticed_and_repair_brings_everything_back(
    damage: Callable[[Path], None], name: str, db: Path, stub: StubEncoder
) -> None:
    before, others = content(db), content(db, "others")
    graph = graph_of(db)
    other_files = {path: data for path, data in snapshot(db).items() if not path.startswith(graph.name)}
    damage(graph / name)
    broken = {file.name: file.read_bytes() for file in graph.iterdir()}
    if (damage, name) not in HIDDEN:
        with Client(db) as client, pytest.raises(DamagedCollectionError, match=f"{name}.*gte-rag repair --db .*{NAME}"):
            open_collection(client, NAME, stub)
    assert find_damage(db, NAME) is not None
    report = repaired(db, stub)
    assert report.damage is not None
    assert report.records == RECORDS
    assert 0 < report.encoded < RECORDS  # the last groups were in the log
    assert report.moved_to is not None
    assert report.moved_to.is_relative_to(db)
    assert {file.name: file.read_bytes() for file in report.moved_to.iterdir()} == broken
    assert {path: data for path, data in snapshot(db).items() if path in other_files} == other_files
    assert content(db, "others") == others
    check_whole(db, stub, before)


def test_a_missing_folder_is_noticed_and_mended(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    shutil.rmtree(graph_of(db))
    assert find_damage(db, NAME) == f"{IDS} is missing"
    assert repaired(db, stub).moved_to is None
    check_whole(db, stub, before)


def test_a_second_damage_is_moved_beside_the_first(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    places = []
    for _ in range(2):
        empty(graph_of(db) / HEADER)
        places.append(repaired(db, stub).moved_to)
    assert len(set(places)) == 2
    assert all(place is not None and place.is_dir() for place in places)
    check_whole(db, stub, before)


def test_a_client_that_was_refused_goes_on_after_the_repair(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    empty(graph_of(db) / HEADER)
    with Client(db) as client:
        with pytest.raises(DamagedCollectionError):
            open_collection(client, NAME, stub)
        repaired(db, stub)
        collection = open_collection(client, NAME, stub)
        assert HybridRetriever(collection, k=1, mode="union").search(text_of(3))[0].id == "r3"
        collection.upsert([f"more{number}" for number in range(SYNC)], [f"more {number}" for number in range(SYNC)])
    after = content(db)
    assert len(after) == RECORDS + SYNC
    assert {record_id: after[record_id] for record_id in before} == before
    assert find_damage(db, NAME) is None


def test_a_client_that_has_read_the_graph_does_not_hand_it_to_the_repair(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    with Client(db) as client:
        assert len(open_collection(client, NAME, stub)) == RECORDS
        empty(graph_of(db) / HEADER)
        assert repaired(db, stub).encoded > 0
    check_whole(db, stub, before)


def test_a_collection_of_fewer_records_than_chroma_writes_at_once_is_whole_after_a_repair(
    tmp_path: Path, stub: StubEncoder
) -> None:
    """Chroma has no reason to write the new graph: it must not be recorded as written either."""
    fill(tmp_path, stub, records=SYNC + 10)
    with Client(tmp_path) as client:
        open_collection(client, NAME, stub).delete([f"r{number}" for number in range(SYNC)])
    before = content(tmp_path)
    empty(graph_of(tmp_path) / HEADER)
    repaired(tmp_path, stub)
    assert find_damage(tmp_path, NAME) is None
    assert content(tmp_path) == before


# What is whole


def test_repair_of_a_whole_collection_says_so_and_changes_nothing(db: Path, stub: StubEncoder) -> None:
    before, files = content(db), snapshot(db)
    assert repaired(db, stub) == RepairReport(NAME, None, RECORDS, 0, None)
    assert stub.document_calls == []
    assert snapshot(db) == files
    assert content(db) == before


@pytest.mark.parametrize("records", [0, 1, 5, SYNC - 1, SYNC, SYNC + 1])
def test_a_new_collection_of_any_size_is_whole(records: int, tmp_path: Path, stub: StubEncoder) -> None:
    fill(tmp_path, stub, records=records)
    assert torn_folders(tmp_path) == []
    with Client(tmp_path) as client:
        assert len(open_collection(client, NAME, stub)) == records
    assert find_damage(tmp_path, NAME) is None


def test_a_collection_that_changes_at_random_never_looks_damaged(tmp_path: Path, stub: StubEncoder) -> None:
    rng = random.Random(1)
    with Client(tmp_path) as client:
        collection = new_collection(client, NAME, stub)
        for _ in range(150):
            ids = [f"r{rng.randrange(200)}" for _ in range(rng.randint(1, 30))]
            if rng.random() < 0.4:
                collection.delete(list(dict.fromkeys(ids)))
            else:
                chosen = list(dict.fromkeys(ids))
                collection.upsert(chosen, [f"{record_id} word{rng.random()}" for record_id in chosen])
            assert torn_folders(tmp_path) == []
            open_collection(client, NAME, stub)
        collection.delete(collection.matching_ids())
        assert torn_folders(tmp_path) == []
    assert find_damage(tmp_path, NAME) is None


def test_a_first_write_of_the_graph_that_was_cut_off_is_no_damage(tmp_path: Path, stub: StubEncoder) -> None:
    """Chroma has recorded no write yet: it starts the graph anew from its log, which is complete."""
    fill(tmp_path / "large", stub)
    fill(tmp_path / "db", stub, records=SYNC - 1)
    db = tmp_path / "db"
    shutil.copy(graph_of(tmp_path / "large") / HEADER, graph_of(db) / HEADER)
    assert torn_folders(db) == [graph_of(db)]
    with Client(db) as client:
        collection = open_collection(client, NAME, stub)
        assert HybridRetriever(collection, k=1, mode="dense").search(text_of(7))[0].id == "r7"
    assert len(content(db)) == SYNC - 1


def test_damage_of_another_collection_is_no_reason_to_refuse(db: Path, stub: StubEncoder) -> None:
    empty(graph_of(db, "others") / HEADER)
    with Client(db) as client:
        assert len(open_collection(client, NAME, stub)) == RECORDS
        with pytest.raises(DamagedCollectionError, match="'others'"):
            open_collection(client, "others", stub)


def test_files_that_are_being_written_are_waited_for(
    db: Path, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have Chroma write: the header says more elements than the other files hold, for a moment."""
    monkeypatch.setattr(gte_rag.segments, "_SETTLED_S", 20)
    length = graph_of(db) / LENGTHS
    whole = length.read_bytes()
    halve(length)
    timer = threading.Timer(0.3, length.write_bytes, [whole])
    timer.start()
    with Client(db) as client:
        assert len(open_collection(client, NAME, stub)) == RECORDS
    timer.join()


def test_opening_a_whole_collection_starts_no_process_and_reads_only_headers(
    db: Path, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with Client(db) as client:
        open_collection(client, NAME, stub)


def test_a_collection_in_memory_or_behind_a_server_is_not_examined(
    chroma_server: tuple[str, int], stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gte_rag.chroma, "torn_folders", lambda _: pytest.fail("a folder was examined"))
    host, port = chroma_server
    in_memory = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
    for client in (in_memory, chromadb.HttpClient(host, port, settings=Settings(anonymized_telemetry=False))):
        collection = open_collection(client, "not-examined", stub)
        collection.upsert(["a"], ["text"])
        assert len(open_collection(client, "not-examined", stub)) == 1
        client.delete_collection("not-examined")


def test_sqlite_is_opened_in_other_processes_only(db: Path, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a second handle would release the locks that Chroma holds on it: SQLite's locks belong to the process."""
    monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: pytest.fail("SQLite was opened beside Chroma"))
    empty(graph_of(db) / HEADER)
    with Client(db) as client, pytest.raises(DamagedCollectionError):
        open_collection(client, NAME, stub)
    assert repaired(db, stub).damage is not None


def test_the_stores_of_both_frameworks_refuse_a_damaged_collection(db: Path, encoder: GTEEncoder) -> None:
    langchain = pytest.importorskip("langchain_gte")
    llama_index = pytest.importorskip("llama_index.vector_stores.gte")
    empty(graph_of(db) / HEADER)
    with pytest.raises(DamagedCollectionError, match="gte-rag repair"):
        langchain.GTEChroma(NAME, langchain.GTEEmbeddings(encoder=encoder), persist_directory=str(db))
    with pytest.raises(DamagedCollectionError, match=r"repair_collection.*encoded_text"):
        llama_index.GTEChromaVectorStore(NAME, persist_dir=str(db), encoder=encoder)


# Interruptions


class StopError(Exception):
    """Ends a repair where a process could be killed."""


@pytest.mark.parametrize("step", ["_move_aside", "forget_graph", "_encode_again", "_remove_mark"])
def test_a_repair_that_stops_before_a_step_refuses_to_open_and_a_second_one_completes_it(
    step: str, db: Path, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(db)
    halve(graph_of(db) / LENGTHS)

    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(gte_rag.repair, step, stop)
        with pytest.raises(StopError):
            repaired(db, stub)
    with Client(db) as client, pytest.raises(DamagedCollectionError, match="a repair of it was interrupted"):
        open_collection(client, NAME, stub)
    assert repaired(db, stub).damage == "an earlier repair was interrupted"
    check_whole(db, stub, before)


def test_a_repair_that_ends_among_the_records_goes_on_where_it_was(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    empty(graph_of(db) / VECTORS)
    stub.fails_on = text_of(65)
    with pytest.raises(RuntimeError, match="cannot encode"):
        repaired(db, stub)
    with Client(db) as client, pytest.raises(DamagedCollectionError, match="interrupted"):
        open_collection(client, NAME, stub)
    stub.fails_on = None
    stub.document_calls.clear()
    report = repaired(db, stub)
    encoded = {text for call in stub.document_calls for text in call}
    assert text_of(65) in encoded
    assert text_of(5) not in encoded  # that group was finished
    assert 0 < report.encoded < RECORDS - GROUP
    assert report.moved_to is None
    check_whole(db, stub, before)


KILLED = """
import sys, time
from pathlib import Path
import gte_rag.chroma, gte_rag.repair
from gte_rag.repair import repair_collection
from stub_encoder import StubEncoder

class Slow(StubEncoder):
    def encode_documents(self, texts, **options):
        print("encodes", flush=True)
        time.sleep(0.05)
        return super().encode_documents(texts, **options)

gte_rag.repair.GROUP = 5
repair_collection(Path(sys.argv[1]), "notes", encoder=Slow(dimension=32))
"""


def test_a_repair_killed_at_any_moment_is_completed_by_the_next_one(db: Path, stub: StubEncoder) -> None:
    before = content(db)
    halve(graph_of(db) / LENGTHS)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    for groups in (2, 6):
        command = [sys.executable, "-c", KILLED, str(db)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
        ) as process:
            assert process.stdout is not None
            for _ in range(groups):
                assert process.stdout.readline() == "encodes\n"
            time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        with Client(db) as client, pytest.raises(DamagedCollectionError, match="gte-rag repair"):
            open_collection(client, NAME, stub)
    assert repaired(db, stub).damage == "an earlier repair was interrupted"
    check_whole(db, stub, before)


# Refusals


def test_a_folder_without_a_database_is_refused(tmp_path: Path, stub: StubEncoder) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no Chroma database: there is no chroma\.sqlite3"):
        repaired(tmp_path, stub)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_collection_is_refused_with_those_there_are(db: Path, stub: StubEncoder) -> None:
    with pytest.raises(ValueError, match="no collection 'elsewhere'; it has: notes, others"):
        repair_collection(db, "elsewhere", encoder=cast(Any, stub))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (StubEncoder(dimension=32, fingerprint="f" * 16), "was made by the model 'stub'"),
        (StubEncoder(dimension=16), "holds vectors of dimension 32; this encoder gives 16"),
    ],
)
def test_another_model_is_refused_and_nothing_is_changed(other: StubEncoder, message: str, db: Path) -> None:
    empty(graph_of(db) / HEADER)
    files = snapshot(db)
    with pytest.raises(CollectionMismatchError, match=message):
        repaired(db, other)
    assert snapshot(db) == files
    with Client(db) as client:
        assert REPAIR_KEY not in client.get_collection(NAME, embedding_function=None).metadata


class Other(StubEncoder):
    """The same name and fingerprint, other vectors: as when something else than the text was encoded."""

    def dense(self, text: str) -> Any:
        return np.roll(super().dense(text), 3)


def test_an_encoder_that_gives_other_vectors_than_the_log_holds_is_refused(db: Path) -> None:
    empty(graph_of(db) / HEADER)
    files = snapshot(db)
    with pytest.raises(
        CollectionMismatchError, match=r"median cosine with \d+ vectors in Chroma's log is .*encoded_text"
    ):
        repaired(db, Other(dimension=32))
    assert snapshot(db) == files


def test_what_else_than_the_text_was_encoded_is_encoded_again(tmp_path: Path, stub: StubEncoder) -> None:
    def titled(text: str, metadata: Any) -> str:
        return f"{metadata['title']} {text}"

    with Client(tmp_path) as client:
        new_collection(client, NAME, stub)
        collection = HybridCollection(client, NAME, encoder=cast(Any, stub), encoded_text=titled)
        for start in range(0, RECORDS, GROUP):
            numbers = range(start, min(start + GROUP, RECORDS))
            collection.upsert(
                [f"r{number}" for number in numbers],
                [text_of(number) for number in numbers],
                metadatas=[{"title": f"headline{number}"} for number in numbers],
            )
    before = content(tmp_path)
    empty(graph_of(tmp_path) / HEADER)
    with Client(tmp_path) as client, pytest.raises(DamagedCollectionError, match=r"repair_collection.*encoded_text"):
        HybridCollection(client, NAME, encoder=cast(Any, stub), encoded_text=titled)
    with pytest.raises(CollectionMismatchError, match="encoded_text"):
        repaired(tmp_path, stub)
    repaired(tmp_path, stub, encoded_text=titled)
    assert content(tmp_path) == before


@pytest.fixture
def foreign(tmp_path: Path, stub: StubEncoder) -> Path:
    """A collection that another program filled, without metadata of its own and with a graph that cannot be read."""
    with Client(tmp_path) as client:
        collection = client.create_collection(
            NAME, embedding_function=None, configuration={"hnsw": {"space": "cosine", "sync_threshold": SYNC}}
        )
        texts = [text_of(number) for number in range(RECORDS)]
        collection.add(
            ids=[f"r{number}" for number in range(RECORDS)],
            documents=texts,
            embeddings=[3 * stub.dense(text) for text in texts],
        )
    empty(graph_of(tmp_path) / HEADER)
    return tmp_path


def test_a_collection_of_another_program_is_mended_if_the_caller_knows_the_model(
    foreign: Path, stub: StubEncoder
) -> None:
    with Client(foreign) as client, pytest.raises(DamagedCollectionError, match="--model NAME"):
        HybridCollection(client, NAME, encoder=cast(Any, stub), adopt=True)
    with pytest.raises(CollectionMismatchError, match="was not made by gte-rag"):
        repaired(foreign, stub)
    repaired(foreign, stub, adopt=True)
    assert find_damage(foreign, NAME) is None
    with Client(foreign) as client:
        assert client.get_collection(NAME, embedding_function=None).metadata is None
        collection = HybridCollection(client, NAME, encoder=cast(Any, stub), adopt=True)
        assert HybridRetriever(collection, k=1).search(text_of(40))[0].id == "r40"


def test_records_without_a_text_are_refused_before_anything_is_moved(foreign: Path, stub: StubEncoder) -> None:
    with Client(foreign) as client:
        collection = client.create_collection(
            "textless", embedding_function=None, configuration={"hnsw": {"space": "cosine", "sync_threshold": 5}}
        )
        collection.add(ids=[f"r{n}" for n in range(9)], embeddings=[stub.dense(str(n)) for n in range(9)])
    empty(graph_of(foreign, "textless") / HEADER)
    files = snapshot(foreign)
    with pytest.raises(ValueError, match="9 of 9 records of collection 'textless' have no text"):
        repair_collection(foreign, "textless", encoder=cast(Any, stub), adopt=True)
    assert snapshot(foreign) == files


def test_a_segment_id_that_leads_out_of_the_folder_is_refused(db: Path, stub: StubEncoder) -> None:
    outside = db.parent / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    graph = graph_of(db)
    empty(graph / HEADER)
    connection = sqlite3.connect(db / DATABASE_FILE)
    with connection:
        connection.execute("UPDATE segments SET id = '../outside' WHERE id = ?", (graph.name,))
    connection.close()
    with pytest.raises(OSError, match="is no id that Chroma makes"):
        repaired(db, stub)
    assert (outside / "kept.txt").read_text() == "kept"
    connection = sqlite3.connect(db / DATABASE_FILE)
    with connection:
        connection.execute("UPDATE segments SET id = ? WHERE id = '../outside'", (graph.name,))
    connection.close()
    shutil.rmtree(graph)
    graph.symlink_to(outside)
    with pytest.raises(OSError, match="is a link"):
        repaired(db, stub)
    assert (outside / "kept.txt").read_text() == "kept"


def test_the_sparse_vectors_stay_sealed_as_they_were(db: Path, stub: StubEncoder) -> None:
    before = {record_id: record[1][RESERVED_KEY] for record_id, record in content(db).items()}
    empty(graph_of(db) / IDS)
    repaired(db, stub)
    assert {record_id: record[1][RESERVED_KEY] for record_id, record in content(db).items()} == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lacks_its_last_byte_is_at_fault(name: str, db: Path) -> None:
    graph = graph_of(db)
    assert thorough_fault(graph) is None
    shorten(graph / name)
    found = thorough_fault(graph)
    assert found is not None
    assert name in found
    assert fault(graph) == (None if name == LINKS else found)  # whose length depends on what is in it
