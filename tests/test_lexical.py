"""`SparseIndex` against a dictionary that is searched by brute force."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gte_rag import lexical
from gte_rag.lexical import SparseIndex
from gte_rag.vectors import SparseMatrix, SparseVector

# Token ids on both sides of 65,536, where the sort of posting lists takes its second pass.
TOKENS = (0, 1, 2, 7, 65_535, 65_536, 69_999)
VOCAB = 70_000

# Multiples of 1/4 add up exactly in float32, so that scores are equal when they should be and ties are real ties.
weights = st.dictionaries(st.sampled_from(TOKENS), st.integers(1, 8).map(lambda n: n / 4), max_size=len(TOKENS))
vectors = weights.map(SparseVector.from_dict)
names = st.sampled_from([f"id {number}" for number in range(30)] + ["", "北京", "\ud800", "a\nb"])


def matrix(rows: Sequence[SparseVector], vocab_size: int = VOCAB) -> SparseMatrix:
    return SparseMatrix.from_vectors(rows, vocab_size)


def brute_force(
    records: dict[str, SparseVector], query: SparseVector, k: int, allowed: object = None
) -> list[tuple[str, float]]:
    """Return what `SparseIndex.search` has to return; `sorted` is stable, so ties keep the dictionary's order."""
    scores = {
        record_id: vector.dot(query)
        for record_id, vector in records.items()
        if allowed is None or record_id in allowed  # type: ignore[operator]
    }
    found = [(record_id, score) for record_id, score in scores.items() if score > 0]
    return sorted(found, key=lambda pair: -pair[1])[:k]


def random_matrix(rows: int, per_row: int, vocab_size: int, seed: int) -> SparseMatrix:
    """Return rows whose tokens are drawn with skew, like real ones: a few in most rows, most in few."""
    draw = np.random.default_rng(seed)
    drawn = (vocab_size * draw.random((rows, per_row)) ** 4).astype(np.int32)
    return matrix(
        [
            SparseVector(tokens, draw.lognormal(-1, 0.8, tokens.size).astype(np.float32))
            for tokens in map(np.unique, drawn)
        ],
        vocab_size,
    )


class OnlyAsks:
    """A container that can say whether an id is in it, and nothing else."""

    def __init__(self, ids: frozenset[str]) -> None:
        self.ids = ids

    def __contains__(self, record_id: object) -> bool:
        return record_id in self.ids


class IndexAgainstDictionary(RuleBasedStateMachine):
    """Random writes, searches and round trips through a file; the dictionary knows the truth."""

    @initialize(folder=st.uuids())
    def start(self, folder: object) -> None:
        self.index = SparseIndex(VOCAB)
        self.records: dict[str, SparseVector] = {}
        self.path = FOLDER[0] / f"{folder}.index"

    @rule(new=st.dictionaries(names, vectors, max_size=12))
    def upsert(self, new: dict[str, SparseVector]) -> None:
        self.index.upsert(list(new), matrix(list(new.values())))
        for record_id, vector in new.items():
            self.records.pop(record_id, None)
            self.records[record_id] = vector

    @rule(count=st.integers(65, 300), vector=vectors, other=vectors)
    def upsert_many(self, count: int, vector: SparseVector, other: SparseVector) -> None:
        """Enough rows for several blocks, with more ties than anyone asks for."""
        new = {f"many {number}": other if number % 7 else vector for number in range(count)}
        self.upsert(new)

    @rule(gone=st.lists(names, max_size=12))
    def delete(self, gone: list[str]) -> None:
        self.index.delete(gone)
        for record_id in gone:
            self.records.pop(record_id, None)

    @rule(step=st.integers(1, 3))
    def delete_many(self, step: int) -> None:
        gone = list(self.records)[::step]
        self.delete(gone)

    @rule(query=vectors, k=st.integers(1, 40))
    def search(self, query: SparseVector, k: int) -> None:
        assert self.index.search(query, k) == brute_force(self.records, query, k)

    @rule(query=vectors, k=st.integers(1, 5), data=st.data())
    def search_filtered(self, query: SparseVector, k: int, data: st.DataObject) -> None:
        known = list(self.records)
        step = data.draw(st.integers(1, 9))
        allowed = frozenset([*known[::step], "unknown", *data.draw(st.lists(names, max_size=3))])
        expected = brute_force(self.records, query, k, allowed)
        for form in (allowed, list(allowed), dict.fromkeys(allowed), OnlyAsks(allowed)):
            assert self.index.search(query, k, allowed=form) == expected

    @rule(queries=st.lists(vectors, max_size=4), k=st.integers(1, 5))
    def search_batch(self, queries: list[SparseVector], k: int) -> None:
        expected = [brute_force(self.records, query, k) for query in queries]
        assert self.index.search_batch(queries, k) == expected
        assert self.index.search_batch(matrix(queries), k) == expected

    @rule(stamp=st.text(alphabet="ab é\n", max_size=3))
    def save_and_load(self, stamp: str) -> None:
        self.index.save(self.path, stamp=stamp)
        assert SparseIndex.load(self.path, stamp=stamp + "?") is None
        loaded = SparseIndex.load(self.path, stamp=stamp)
        assert loaded is not None
        self.index = loaded

    @invariant()
    def holds_the_records(self) -> None:
        if not hasattr(self, "index"):
            return
        assert len(self.index) == len(self.records)
        assert self.index.ids() == list(self.records)
        for record_id in list(self.records)[:3] + list(self.records)[-3:]:
            assert record_id in self.index
            assert self.index.vector(record_id) == self.records[record_id]

    @invariant()
    def segments_keep_their_shape(self) -> None:
        segments = getattr(self, "index", SparseIndex(1))._segments
        later = 0
        for segment in reversed(segments):
            assert segment.live > later
            assert segment.live == np.count_nonzero(segment.alive) >= 0.75 * len(segment.ids)
            assert np.all(np.diff(segment.tokens) > 0)
            assert np.all(np.diff(segment.starts) > 0)
            later += segment.live


FOLDER: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDER[:] = [tmp_path_factory.mktemp("indexes")]


TestIndexAgainstDictionary = IndexAgainstDictionary.TestCase
TestIndexAgainstDictionary.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def skewed() -> tuple[SparseIndex, SparseMatrix, SparseMatrix]:
    """Return an index of 8,000 records in four segments, its matrix, and queries."""
    records, queries = random_matrix(8000, 30, 3000, seed=1), random_matrix(20, 12, 3000, seed=2)
    index = SparseIndex(3000)
    for start, stop in ((0, 4090), (4090, 6590), (6590, 7890), (7890, 8000)):
        rows = np.arange(start, stop)
        index.upsert([f"r{row}" for row in rows], records.take(rows))
    assert len(index._segments) == 4
    return index, records, queries


@pytest.mark.parametrize("k", [1, 10, 100, 1000, 20_000])
def test_scores_are_those_of_the_matrix(skewed: tuple[SparseIndex, SparseMatrix, SparseMatrix], k: int) -> None:
    index, records, queries = skewed
    for query in queries:
        exact = records.dot(query).astype(np.float64)
        found = index.search(query, k)
        rows = [int(record_id[1:]) for record_id, _ in found]
        # 12 additions and one product in float32 on one side, float32 products summed in float64 on the other.
        np.testing.assert_allclose([score for _, score in found], exact[rows], rtol=1e-5)
        assert len(set(rows)) == len(rows) == min(k, np.count_nonzero(exact))
        if rows and len(rows) < np.count_nonzero(exact):
            assert np.delete(exact, rows).max() <= exact[rows].min() * (1 + 1e-5)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5, 0.99])
def test_a_filter_gives_the_best_of_what_it_allows(
    skewed: tuple[SparseIndex, SparseMatrix, SparseMatrix], share: float
) -> None:
    index, _, queries = skewed
    draw = np.random.default_rng(3)
    allowed = np.array([record_id for record_id in index.ids() if draw.random() < share])
    inside = set(allowed.tolist())
    for query in queries:
        expected = [pair for pair in index.search(query, 8000) if pair[0] in inside][:15]
        for form in (allowed, inside, OnlyAsks(frozenset(inside))):
            assert index.search(query, 15, allowed=form) == expected


def test_history_changes_neither_scores_nor_order(skewed: tuple[SparseIndex, SparseMatrix, SparseMatrix]) -> None:
    index, records, queries = skewed
    at_once = SparseIndex(3000)
    at_once.upsert(index.ids(), records)
    assert at_once.search_batch(queries, 50) == index.search_batch(queries, 50)


def test_ties_come_in_the_order_of_writing() -> None:
    index = SparseIndex(10)
    same = SparseVector.from_dict({3: 0.5})
    index.upsert([f"{number:03}" for number in range(500)], matrix([same] * 500, 10))
    index.upsert(["004"], matrix([same], 10))  # replaced: now the last
    assert [record_id for record_id, _ in index.search(same, 6)] == ["000", "001", "002", "003", "005", "006"]
    assert index.ids()[-1] == "004"
    assert [record_id for record_id, _ in index.search(same, 2, allowed={"004", "499", "007"})] == ["007", "499"]


def test_records_that_share_no_token_are_not_returned() -> None:
    index = SparseIndex(10)
    index.upsert(["a", "empty"], matrix([SparseVector.from_dict({1: 1.0}), SparseVector.from_dict({})], 10))
    assert index.search(SparseVector.from_dict({2: 1.0}), 5) == []
    assert index.search(SparseVector.from_dict({}), 5) == []
    assert index.search(SparseVector.from_dict({1: 2.0, 2: 1.0}), 5) == [("a", 2.0)]
    assert len(index.vector("empty")) == 0


def test_a_new_index_is_empty() -> None:
    index = SparseIndex(5)
    assert (len(index), index.ids(), "a" in index, 3 in index) == (0, [], False, False)
    assert index.search(SparseVector.from_dict({1: 1.0}), 3) == []
    assert index.search_batch([], 3) == []
    index.upsert([], matrix([], 5))
    index.delete(["unknown"])
    assert repr(index) == "SparseIndex(0 records, vocab_size=5)"


def test_scores_too_large_for_float32_do_not_hide_other_records() -> None:
    index = SparseIndex(5)
    huge = SparseVector.from_dict({1: 3e38})
    rows = [huge, SparseVector.from_dict({1: 1.0}), *[SparseVector.from_dict({2: 1.0})] * 8]
    index.upsert([*"abcdefghij"], matrix(rows, 5))
    index.delete(["a"])
    with np.errstate(over="ignore"):
        assert index.search(SparseVector.from_dict({1: 10.0}), 5) == [("b", 10.0)]


def test_adding_to_a_large_index_leaves_most_of_it_where_it_is() -> None:
    index = SparseIndex(3000)
    records = random_matrix(3000, 10, 3000, seed=4)
    index.upsert([f"old {row}" for row in range(3000)], records)
    base = index._segments[0]
    for batch in range(20):
        index.upsert([f"new {batch} {row}" for row in range(100)], records.take(np.arange(100)))
        assert index._segments[0].rows is base.rows
        assert len(index._segments) <= 7
    assert len(index) == 5000


@pytest.mark.parametrize("vocab_size", [5, 70_000])
def test_the_given_arrays_are_copied(vocab_size: int) -> None:
    given_rows = matrix([SparseVector.from_dict({1: 1.0, 3: 2.0})], vocab_size)
    index = SparseIndex(vocab_size)
    index.upsert(["a"], given_rows)
    given_rows.values[:] = 9.0
    given_rows.indices[:] = [0, 1]
    assert index.search(SparseVector.from_dict({3: 1.0}), 1) == [("a", 2.0)]


def test_readers_see_each_write_completely_or_not_at_all(tmp_path: Path) -> None:
    index = SparseIndex(100)
    query = SparseVector.from_dict({5: 1.0})
    others = [f"other {number}" for number in range(200)]
    index.upsert(others, matrix([SparseVector.from_dict({9: 1.0})] * 200, 100))
    index.upsert(["left", "right"], matrix([query] * 2, 100))
    stop = threading.Event()
    problems: list[object] = []

    def read(number: int) -> None:
        reads = 0
        while not stop.is_set():
            found = dict(index.search(query, 10, allowed=None if number else {"left", "right"}))
            if found.keys() != {"left", "right"} or found["left"] != found["right"]:
                problems.append(found)
            if len(index.ids()) < 200:
                problems.append(index.ids())
            if number == 1 and reads % 10 == 0:
                path = tmp_path / "index"
                index.save(path, stamp="s")
                loaded = SparseIndex.load(path, stamp="s")
                assert loaded is not None
                kept = dict(loaded.search(query, 10))
                if kept.keys() != {"left", "right"} or kept["left"] != kept["right"]:
                    problems.append(kept)
            reads += 1

    def write(name: str) -> None:
        for step in range(150):
            if name == "pair":
                both = SparseVector.from_dict({5: 1.0 + step, 7: 1.0})
                index.upsert(["left", "right"], matrix([both] * 2, 100))
            else:
                index.upsert([f"{name} {step % 20}"], matrix([SparseVector.from_dict({9: 1.0 + step})], 100))
                index.delete([f"{name} {(step * 7) % 20}"])

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    writers = [threading.Thread(target=write, args=(name,)) for name in ("pair", "x", "y")]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert problems == []
    assert index.vector("left").to_dict() == {5: 150.0, 7: 1.0}


# ---------------------------------------------------------------------------------------------------------------- file


def small_index() -> SparseIndex:
    index = SparseIndex(VOCAB)
    index.upsert(["a", "北京", "c"], matrix([SparseVector.from_dict({1: 0.1, 65_537: 3.0})] * 3))
    index.delete(["c"])
    return index


@pytest.mark.parametrize("filled", [True, False])
def test_a_saved_index_comes_back(tmp_path: Path, filled: bool) -> None:
    index = small_index() if filled else SparseIndex(VOCAB)
    index.save(tmp_path / "index", stamp="s")
    loaded = SparseIndex.load(os.fspath(tmp_path / "index"), stamp="s")
    assert loaded is not None
    assert loaded.vocab_size == VOCAB
    assert loaded.ids() == index.ids()
    assert [loaded.vector(record_id) for record_id in loaded.ids()] == [index.vector(name) for name in index.ids()]
    loaded.upsert(["new"], matrix([SparseVector.from_dict({1: 1.0})]))
    assert "new" in loaded
    assert list(tmp_path.iterdir()) == [tmp_path / "index"]


def test_nothing_is_loaded_where_there_is_no_index(tmp_path: Path) -> None:
    assert SparseIndex.load(tmp_path / "missing", stamp="s") is None
    assert SparseIndex.load(tmp_path / "missing" / "index", stamp="s") is None
    assert SparseIndex.load(tmp_path, stamp="s") is None
    for content in (b"", b"text", b"\xff" * 100, bytes(8) + b"{}"):
        (tmp_path / "other").write_bytes(content)
        assert SparseIndex.load(tmp_path / "other", stamp="s") is None


def test_another_stamp_or_format_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    small_index().save(path, stamp="made from this")
    assert SparseIndex.load(path, stamp="made from that") is None
    assert SparseIndex.load(path, stamp="made from this") is not None
    monkeypatch.setattr(lexical, "_FORMAT", "gte_rag sparse index 2")
    assert SparseIndex.load(path, stamp="made from this") is None


def test_no_damaged_byte_and_no_lost_end_goes_unnoticed(tmp_path: Path) -> None:
    path, damaged = tmp_path / "index", tmp_path / "damaged"
    small_index().save(path, stamp="s")
    good = path.read_bytes()
    whole = SparseIndex.load(path, stamp="s")
    assert whole is not None
    contents = [good[:length] for length in range(0, len(good), 7)] + [good + b"more"]
    contents += [
        good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :]
        for place in range(len(good))
        for flip in (1, 0x80)
    ]
    for content in contents:
        damaged.write_bytes(content)
        loaded = SparseIndex.load(damaged, stamp="s")
        if loaded is not None:  # only what means the same may pass, such as white space in the header
            assert loaded.vocab_size == whole.vocab_size
            assert {name: loaded.vector(name).to_dict() for name in loaded.ids()} == {
                name: whole.vector(name).to_dict() for name in whole.ids()
            }


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_numbers_of_a_type_that_numpy_lacks_are_not_loaded(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "index"
    small_index().save(path, stamp="s")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    weights = header["weights"]
    weights["dtype"], weights["shape"] = dtype, [weights["shape"][0] * (2 if dtype == "BF16" else 4)]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    assert SparseIndex.load(path, stamp="s") is None


def test_a_token_without_postings_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    index = small_index()
    segment = index._segments[0]
    forged = replace(
        segment,
        tokens=np.append(segment.tokens, index.vocab_size - 1).astype(segment.tokens.dtype),
        starts=np.append(segment.starts, segment.starts[-1]),
    )
    monkeypatch.setattr(index, "_segments", (forged,))
    index.save(path, stamp="s")
    assert SparseIndex.load(path, stamp="s") is None


@given(garbage=st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_not_loaded(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "index").write_bytes(garbage)
    assert SparseIndex.load(tmp_path / "index", stamp="s") is None


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    small_index().save(path, stamp="old")

    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk on fire"):
            small_index().save(path, stamp="new")
    assert SparseIndex.load(path, stamp="old") is not None
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="index"):
        small_index().save(tmp_path / "missing" / "index", stamp="s")


def test_saving_removes_what_a_killed_save_left_long_ago(tmp_path: Path) -> None:
    path = tmp_path / "index[1]"
    old, fresh = tmp_path / ".index[1].aa.partial", tmp_path / ".index[1].bb.partial"
    for leftover in (old, fresh):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    small_index().save(path, stamp="s")
    assert set(tmp_path.iterdir()) == {path, fresh}


# -------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_refused_and_change_nothing() -> None:
    index = small_index()
    row = SparseVector.from_dict({1: 1.0})
    with pytest.raises(TypeError, match="vocab_size is '5'"):
        SparseIndex("5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocab_size is 0"):
        SparseIndex(0)
    with pytest.raises(TypeError, match="ids is str"):
        index.upsert("a", matrix([row]))
    with pytest.raises(TypeError, match=r"ids\[1\] is int"):
        index.delete(["a", 1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="give a SparseMatrix"):
        index.upsert(["a"], [row])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row per id"):
        index.upsert(["a", "b"], matrix([row]))
    with pytest.raises(ValueError, match="one column per token"):
        index.upsert(["a"], matrix([row], 10))
    with pytest.raises(ValueError, match="'b' is given more than once"):
        index.upsert(["a", "b", "b"], matrix([row] * 3))
    with pytest.raises(KeyError, match="c"):
        index.vector("c")
    with pytest.raises(TypeError, match="k is '3'"):
        index.search(row, "3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is 0"):
        index.search(row, 0)
    with pytest.raises(TypeError, match="a query is dict"):
        index.search({1: 1.0}, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="queries is SparseVector"):
        index.search_batch(row, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token id 70000"):
        index.search(SparseVector.from_dict({VOCAB: 1.0}), 3)
    for wrong in ("a", 3):
        with pytest.raises(TypeError, match="give a set of ids"):
            index.search(row, 3, allowed=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stamp is int"):
        index.save("x", stamp=1)  # type: ignore[arg-type]
    assert index.ids() == ["a", "北京"]
