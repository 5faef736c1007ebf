"""A collection under random writes, its own and foreign ones, against a plain dictionary; every mode of retrieval.

Scores are compared with tolerance 2e-3 relative: the stored sparse weights are float16.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import gte_rag.chroma
import gte_rag.lexical_view
from gte_rag import HybridCollection, HybridRetriever, SparseVector
from gte_rag.retriever import MODES
from stub_encoder import StubEncoder, open_collection

chromadb = pytest.importorskip("chromadb")

WORDS = ("bread", "water", "stone", "river", "cloud")
IDS = tuple(f"r{number}" for number in range(12))
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
some_ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True)
metadatas = st.fixed_dictionaries({}, optional={"year": st.integers(2020, 2023), "tag": st.sampled_from(["x", "y"])})
filters: st.SearchStrategy[tuple[dict[str, Any] | None, Callable[[dict[str, Any]], bool]]] = st.sampled_from(
    [
        (None, lambda metadata: True),
        ({"year": 2021}, lambda metadata: metadata.get("year") == 2021),
        ({"year": {"$gte": 2022}}, lambda metadata: metadata.get("year", 0) >= 2022),
        ({"tag": {"$in": ["x"]}}, lambda metadata: metadata.get("tag") == "x"),
    ]
)


class HybridMachine(RuleBasedStateMachine):
    """Writes go to the collection and to a dictionary; every search must agree with brute force over the latter."""

    persistent = False

    @initialize()
    def start(self) -> None:
        settings_ = chromadb.Settings(anonymized_telemetry=False)
        self.folder = Path(tempfile.mkdtemp())
        self.client = (
            chromadb.PersistentClient(str(self.folder), settings=settings_)
            if self.persistent
            else chromadb.EphemeralClient(settings=settings_)
        )
        self.name = f"state-{uuid4().hex}"
        self.encoder = StubEncoder()
        self.collection = open_collection(self.client, self.name, self.encoder)
        self.records: dict[str, tuple[str, dict[str, Any]]] = {}

    def teardown(self) -> None:
        self.collection.delete(IDS)
        self.client.delete_collection(self.name)
        shutil.rmtree(self.folder)

    @rule(ids=some_ids, text=texts, metadata=metadatas)
    def upsert(self, ids: list[str], text: str, metadata: dict[str, Any]) -> None:
        self.collection.upsert(
            ids, [f"{text} {WORDS[i % 5]}" for i in range(len(ids))], metadatas=[metadata] * len(ids)
        )
        self.records |= {name: (f"{text} {WORDS[i % 5]}", metadata) for i, name in enumerate(ids)}

    @rule(ids=some_ids)
    def delete(self, ids: list[str]) -> None:
        self.collection.delete(ids)
        for name in ids:
            self.records.pop(name, None)

    @rule(chosen=filters)
    def delete_by_filter(self, chosen: tuple[dict[str, Any] | None, Callable[[dict[str, Any]], bool]]) -> None:
        where, passes = chosen
        if where is not None:
            self.collection.delete(where=where)
            self.records = {name: record for name, record in self.records.items() if not passes(record[1])}

    @rule(name=st.sampled_from(IDS), text=texts)
    def another_program_writes_a_text(self, name: str, text: str) -> None:
        self.collection.collection.upsert(ids=[name], documents=[text], embeddings=self.encoder.dense(text)[None])
        self.records[name] = (text, self.records.get(name, ("", {}))[1])
        self.collection.refresh()  # noticed by itself on disk, unless it comes within the clock's resolution

    @rule(name=st.sampled_from(IDS))
    def another_program_deletes_and_adds_again(self, name: str) -> None:
        self.collection.collection.delete([name])
        self.collection.collection.add(
            ids=[name], documents=["stone stone"], embeddings=self.encoder.dense("stone stone")[None]
        )
        self.records[name] = ("stone stone", {})
        self.collection.refresh()  # noticed by itself on disk, unless it comes within the clock's resolution

    @rule()
    def reopen(self) -> None:
        self.collection = open_collection(self.client, self.name, self.encoder)

    @rule(query=texts, mode=st.sampled_from(MODES), chosen=filters, k=st.integers(1, 14))
    def search(
        self,
        query: str,
        mode: str,
        chosen: tuple[dict[str, Any] | None, Callable[[dict[str, Any]], bool]],
        k: int,
    ) -> None:
        where, passes = chosen
        expected: dict[str, float] = {}
        for name, (text, metadata) in self.records.items():
            if passes(metadata):
                dense = float(self.encoder.dense(query) @ self.encoder.dense(text))
                mine, theirs = self.encoder.weights(query), self.encoder.weights(text)
                sparse = sum(weight * theirs[word] for word, weight in mine.items() if word in theirs)
                if mode != "sparse" or sparse > 0:
                    expected[name] = {"dense": dense, "sparse": sparse}.get(mode, dense + 0.3 * sparse)
        hits = HybridRetriever(self.collection, k=k, candidates=20, mode=mode).search(query, where=where)
        best = sorted(expected.values(), reverse=True)[:k]
        assert [hit.score for hit in hits] == pytest.approx(best, rel=2e-3, abs=1e-5)
        for hit in hits:
            assert hit.score == pytest.approx(expected[hit.id], rel=2e-3, abs=1e-5)
            assert (hit.text, hit.metadata) == self.records[hit.id]

    @invariant()
    def the_number_of_records_is_right(self) -> None:
        if hasattr(self, "collection"):
            assert self.collection.count() == len(self.records)


class PersistentHybridMachine(HybridMachine):
    """The same on disk."""

    persistent = True


_settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestInMemory = HybridMachine.TestCase
TestInMemory.settings = _settings
TestOnDisk = PersistentHybridMachine.TestCase
TestOnDisk.settings = _settings


@pytest.fixture
def on_disk(tmp_path: Path) -> HybridCollection:
    client = chromadb.PersistentClient(str(tmp_path), settings=chromadb.Settings(anonymized_telemetry=False))
    return open_collection(client, "disk", StubEncoder())


def test_the_lexical_index_is_cached_beside_the_collection(
    on_disk: HybridCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk.upsert([f"d{n}" for n in range(2500)], [f"bread number{n}" for n in range(2500)])
    assert len(on_disk.lexical_index()) == 2500
    assert len(list((tmp_path / "gte_rag").glob("*.lexical"))) == 1
    built: list[int] = []
    original = HybridCollection._fetch_sparse

    def counting(self: HybridCollection) -> Any:
        built.append(1)
        return original(self)

    monkeypatch.setattr(HybridCollection, "_fetch_sparse", counting)
    on_disk.refresh()  # as in a new process
    assert len(on_disk.lexical_index()) == 2500
    assert built == []
    on_disk.upsert(["d7", "new"], ["water", "water"])
    on_disk.delete(["d8"])
    index = on_disk.lexical_index()  # own writes are taken over one by one
    assert built == []
    assert len(index) == 2500
    assert "d8" not in index
    water = on_disk.encoder.encode_queries(["water"]).sparse
    assert water is not None
    assert {name for name, _ in index.search(water[0], 5)} == {"d7", "new"}
    on_disk.refresh()  # the file is of an older state now
    assert len(on_disk.lexical_index()) == 2500
    assert built == [1]


def test_a_foreign_write_to_a_local_database_is_noticed(on_disk: HybridCollection) -> None:
    on_disk.upsert(["a", "b"], ["bread", "stone"])
    retriever = HybridRetriever(on_disk, mode="sparse")
    assert [hit.id for hit in retriever.search("bread")] == ["a"]
    time.sleep(0.05)
    on_disk.collection.upsert(ids=["b"], documents=["bread"], embeddings=StubEncoder().dense("bread")[None])
    assert {hit.id for hit in retriever.search("bread")} == {"a", "b"}


def test_the_database_file_is_never_opened_beside_chroma(on_disk: HybridCollection) -> None:
    """Closing a second handle would release the locks that Chroma holds on it: SQLite's locks belong to the process."""
    source = Path(gte_rag.lexical_view.__file__).read_text(encoding="utf-8") + Path(gte_rag.chroma.__file__).read_text(
        "utf-8"
    )
    assert "sqlite3.connect" not in source
    assert "import sqlite3" not in source
    assert on_disk.count() == 0


def test_a_damaged_cache_file_is_not_used(on_disk: HybridCollection, tmp_path: Path) -> None:
    on_disk.upsert([f"d{n}" for n in range(2500)], [f"bread number{n}" for n in range(2500)])
    on_disk.lexical_index()
    (file,) = (tmp_path / "gte_rag").glob("*.lexical")
    file.write_bytes(file.read_bytes()[:-100])
    on_disk.refresh()
    assert len(on_disk.lexical_index()) == 2500


def test_handles_of_one_collection_share_one_index(on_disk: HybridCollection) -> None:
    on_disk.upsert(["a"], ["bread"])
    again = open_collection(on_disk._client, "disk", StubEncoder())
    assert again.lexical_index() is on_disk.lexical_index()


def test_weights_of_the_index_are_those_of_the_records(on_disk: HybridCollection) -> None:
    on_disk.upsert(["a"], ["bread bread water"])
    query = SparseVector.from_dict({1: 1.0})
    assert on_disk.lexical_index().search(query, 3) == []
    vector = on_disk.lexical_index().vector("a")
    (candidate,) = on_disk.candidates(["a"], np.asarray(StubEncoder().dense("x")))
    assert candidate.sparse == vector
