"""HybridRetriever: the same hits and scores as scoring every record by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("chromadb")

import chromadb
from chromadb.config import Settings

from gte_rag import GTEEncoder
from gte_rag.chroma import HybridCollection
from gte_rag.explanation import TokenMatch
from gte_rag.retriever import Hit, HybridRetriever
from gte_rag.vectors import Encoding
from stub_encoder import WORD_WEIGHT, StubEncoder, open_collection

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

# A document's weights are stored as float16, whose rounding error is at most 2**-11 of the weight; all products are
# positive, so the error of their sum is at most that part of the sum. The rest is float32 arithmetic.
FLOAT16 = 2.0**-11
FLOAT32 = 2e-6

TEXTS = {
    "apple": "a red apple",
    "pear": "a green pear",
    "tree": "the apple tree and the pear tree",
    "car": "a fast red car",
}


@pytest.fixture
def stub() -> StubEncoder:
    return StubEncoder()


@pytest.fixture
def collection(chroma_client: ClientAPI, stub: StubEncoder) -> HybridCollection:
    """Four short texts."""
    collection = open_collection(chroma_client, "garden", stub)
    collection.add(list(TEXTS), list(TEXTS.values()), metadatas=[{"number": number} for number in range(4)])
    stub.document_calls.clear()
    return collection


@pytest.fixture(scope="module")
def shared_client() -> Iterator[ClientAPI]:
    """One in-memory database for all examples of a property test."""
    options = Settings(anonymized_telemetry=False)
    admin = chromadb.AdminClient(options)
    database = f"test-{uuid4().hex}"
    admin.create_database(database)
    yield chromadb.EphemeralClient(settings=options, database=database)
    admin.delete_database(database)


# Against brute force


@dataclass(frozen=True)
class Filter:
    """A filter in Chroma's words and in Python's."""

    where: dict[str, Any] | None
    accepts: Callable[[str, int], bool]


WORDS = ["ant", "bee", "cow", "Dog", "蜂", "été"]
texts = st.lists(st.sampled_from([*WORDS, "?", "..."]), max_size=6).map(" ".join)
corpora = st.dictionaries(st.sampled_from([f"id{number}" for number in range(25)]), st.tuples(texts, st.integers(0, 3)))
weights = st.sampled_from([0.0, 0.01, 0.3, 1.0]) | st.floats(0, 10, width=32)
metadata_filters = st.one_of(
    st.just(Filter(None, lambda text, number: True)),
    st.integers(0, 3).map(lambda n: Filter({"number": n}, lambda text, number: number == n)),
    st.integers(0, 3).map(lambda n: Filter({"number": {"$gte": n}}, lambda text, number: number >= n)),
    st.integers(0, 3).map(
        lambda n: Filter(
            {"$or": [{"number": n}, {"number": {"$in": [0, 1]}}]}, lambda text, number: number in (n, 0, 1)
        )
    ),
)
text_filters = st.one_of(
    st.just(Filter(None, lambda text, number: True)),
    st.sampled_from(WORDS).map(lambda word: Filter({"$contains": word}, lambda text, number: word in text)),
    st.sampled_from(WORDS).map(lambda word: Filter({"$not_contains": word}, lambda text, number: word not in text)),
)


@given(
    corpus=corpora,
    query=texts,
    k=st.integers(1, 30),
    dense_weight=weights,
    sparse_weight=weights,
    by_metadata=metadata_filters,
    by_text=text_filters,
)
@example({}, "ant", 10, 1.0, 0.3, Filter(None, lambda text, number: True), Filter(None, lambda text, number: True))
@settings(max_examples=50, deadline=None)
def test_hits_are_those_of_scoring_every_record(
    shared_client: ClientAPI,
    corpus: dict[str, tuple[str, int]],
    query: str,
    k: int,
    dense_weight: float,
    sparse_weight: float,
    by_metadata: Filter,
    by_text: Filter,
) -> None:
    stub = StubEncoder()
    name = f"corpus-{uuid4().hex}"
    collection = open_collection(shared_client, name, stub)
    collection.upsert(
        list(corpus), [text for text, _ in corpus.values()], metadatas=[{"number": n} for _, n in corpus.values()]
    )
    retriever = HybridRetriever(collection, k=k, dense_weight=dense_weight, sparse_weight=sparse_weight)
    hits = retriever.search(query, where=by_metadata.where, where_document=by_text.where)
    shared_client.delete_collection(name)

    expected = {
        record_id: score_by_hand(stub, query, text, dense_weight, sparse_weight)
        for record_id, (text, number) in corpus.items()
        if by_metadata.accepts(text, number) and by_text.accepts(text, number)
    }
    event(f"{'some' if expected else 'no'} records pass the filters")
    assert len({hit.id for hit in hits}) == len(hits) == min(k, len(expected))
    for hit in hits:
        dense, sparse, score = expected[hit.id]
        assert (hit.text, hit.metadata) == (corpus[hit.id][0], {"number": corpus[hit.id][1]})
        assert hit.dense_score == pytest.approx(dense, abs=FLOAT32)
        assert hit.sparse_score == pytest.approx(sparse, rel=FLOAT16, abs=FLOAT32)
        assert hit.score == pytest.approx(score, abs=tolerance(sparse, dense_weight, sparse_weight))
        check_matches(stub, query, hit)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    best = sorted(expected.values(), key=lambda scores: -scores[2])
    for hit, (_, sparse, score) in zip(hits, best, strict=False):
        assert hit.score == pytest.approx(score, abs=tolerance(sparse, dense_weight, sparse_weight))


def score_by_hand(
    stub: StubEncoder, query: str, text: str, dense_weight: float, sparse_weight: float
) -> tuple[float, float, float]:
    """Cosine, sparse score and fused score of one record, from its text alone."""
    dense = float(stub.dense(query).astype(np.float64) @ stub.dense(text).astype(np.float64))
    mine, theirs = stub.weights(query), stub.weights(text)
    sparse = sum(weight * theirs.get(word, 0.0) for word, weight in mine.items())
    return dense, sparse, dense_weight * dense + sparse_weight * sparse


def tolerance(sparse: float, dense_weight: float, sparse_weight: float) -> float:
    return FLOAT32 * (dense_weight + sparse_weight + 1) + FLOAT16 * sparse_weight * sparse


def check_matches(stub: StubEncoder, query: str, hit: Hit) -> None:
    """The matches are the words that both texts have, and add up to the sparse score."""
    mine, theirs = stub.weights(query), stub.weights(hit.text)
    assert {match.token for match in hit.matches} == mine.keys() & theirs.keys()
    for match in hit.matches:
        assert match.query_weight == pytest.approx(mine[match.token], rel=FLOAT32)
        assert match.document_weight == pytest.approx(theirs[match.token], rel=FLOAT16)
    added = [match.weight for match in hit.matches]
    assert added == sorted(added, reverse=True)
    assert sum(added) == pytest.approx(hit.sparse_score, rel=FLOAT32)


# One search


def test_a_hit_says_why_it_was_found(collection: HybridCollection) -> None:
    best, *_ = HybridRetriever(collection, sparse_weight=1.0).search("apple tree tree")
    assert (best.id, best.text, best.metadata) == ("tree", TEXTS["tree"], {"number": 2})
    assert [match.token for match in best.matches] == ["tree", "apple"]
    assert best.matches[0].query_weight == pytest.approx(2 * WORD_WEIGHT)
    assert best.matches[0].document_weight == pytest.approx(2 * WORD_WEIGHT, rel=FLOAT16)
    assert best.sparse_score == pytest.approx(5 * WORD_WEIGHT**2, rel=FLOAT16)
    assert best.score == pytest.approx(best.dense_score + best.sparse_score)


def test_the_weight_of_a_match_is_what_it_adds() -> None:
    assert TokenMatch("x", 0.5, 3.0).weight == 1.5


def test_one_search_is_one_forward_pass(collection: HybridCollection, stub: StubEncoder) -> None:
    HybridRetriever(collection).search("red apple")
    assert stub.query_calls == [["red apple"]]
    assert stub.document_calls == []


def test_weights_decide_the_order(collection: HybridCollection) -> None:
    query = "apple pear tree the"
    by_dense = HybridRetriever(collection, sparse_weight=0).search(query)
    by_sparse = HybridRetriever(collection, dense_weight=0, sparse_weight=2.0).search(query)
    assert [hit.score for hit in by_dense] == pytest.approx([hit.dense_score for hit in by_dense])
    assert [hit.score for hit in by_sparse] == pytest.approx([2 * hit.sparse_score for hit in by_sparse])
    assert by_sparse[0].id == "tree"
    assert by_sparse[0].sparse_score == max(hit.sparse_score for hit in by_dense)


def test_of_equal_scores_the_nearer_dense_vector_comes_first(collection: HybridCollection) -> None:
    hits = HybridRetriever(collection, dense_weight=0, sparse_weight=0).search("red car")
    assert [hit.score for hit in hits] == [0, 0, 0, 0]
    assert hits[0].id == "car"
    assert [hit.dense_score for hit in hits] == sorted((hit.dense_score for hit in hits), reverse=True)


def test_k_of_the_call_beats_k_of_the_retriever(collection: HybridCollection) -> None:
    retriever = HybridRetriever(collection, k=2)
    everything = retriever.search("a red apple", k=100)
    assert len(everything) == 4
    assert retriever.search("a red apple") == everything[:2]
    assert retriever.search("a red apple", k=1) == everything[:1]


def test_more_hits_than_candidates_raise_the_candidates(collection: HybridCollection) -> None:
    assert len(HybridRetriever(collection, k=3, candidates=1).search("apple")) == 3
    assert len(HybridRetriever(collection, candidates=1).search("apple", k=2)) == 2


def test_only_the_candidates_of_dense_search_are_scored(chroma_client: ClientAPI) -> None:
    stub = StubEncoder()
    collection = open_collection(chroma_client, "long", stub)
    padding = " ".join(f"filler{number}" for number in range(30))
    collection.add(["near", "far"], ["apple", f"apple apple apple {padding}"])
    retriever = HybridRetriever(collection, candidates=1, sparse_weight=100.0)
    assert [hit.id for hit in retriever.search("apple", k=1)] == ["near"]
    assert [hit.id for hit in retriever.search("apple", k=2)] == ["far", "near"]


def test_an_empty_collection_has_no_hits(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    retriever = HybridRetriever(open_collection(chroma_client, "empty", stub))
    assert retriever.search("anything") == []
    assert retriever.search("anything", where={"number": 1}, where_document={"$contains": "x"}) == []


def test_a_collection_that_was_emptied_has_no_hits(collection: HybridCollection) -> None:
    collection.delete(list(TEXTS))
    assert HybridRetriever(collection).search("apple") == []


@pytest.mark.parametrize("query", ["", " ", "?!", "\0"])
def test_a_query_without_known_tokens_is_ranked_by_its_dense_vector(collection: HybridCollection, query: str) -> None:
    hits = HybridRetriever(collection).search(query)
    assert len(hits) == 4
    for hit in hits:
        assert (hit.sparse_score, hit.matches) == (0, ())
        assert hit.score == pytest.approx(hit.dense_score)


def test_a_query_that_shares_no_token_has_sparse_scores_of_zero(collection: HybridCollection) -> None:
    assert {hit.sparse_score for hit in HybridRetriever(collection).search("quantum physics")} == {0}


@pytest.mark.parametrize(
    "filters",
    [
        {"where": {"number": 99}},
        {"where": {"missing": "key"}},
        {"where_document": {"$contains": "absent"}},
        {"where": {"number": 0}, "where_document": {"$contains": "pear"}},
    ],
)
def test_filters_that_match_nothing_give_no_hits(collection: HybridCollection, filters: dict[str, Any]) -> None:
    assert HybridRetriever(collection).search("apple", **filters) == []


def test_filters_apply_before_candidates_are_counted(collection: HybridCollection) -> None:
    hits = HybridRetriever(collection, k=1, candidates=1).search("a red apple", where={"number": 3})
    assert [hit.id for hit in hits] == ["car"]


def test_a_search_sees_every_change(collection: HybridCollection) -> None:
    retriever = HybridRetriever(collection, k=1)
    collection.add(["plum"], ["a blue plum"])
    assert retriever.search("a blue plum")[0].id == "plum"
    collection.upsert(["apple"], ["a blue plum a blue plum"])
    assert {hit.id for hit in retriever.search("a blue plum", k=2)} == {"plum", "apple"}
    collection.delete(["plum"])
    assert retriever.search("a blue plum")[0].id == "apple"


def test_threads_share_a_retriever(collection: HybridCollection) -> None:
    retriever = HybridRetriever(collection)
    queries = [f"{color} {thing}" for color in ("red", "green") for thing in ("apple", "pear", "tree", "car")] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(retriever.search, queries)) == [retriever.search(query) for query in queries]


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "hybrid!"}, ValueError, "mode is 'hybrid!'; available: 'rescore'"),
        ({"mode": None}, ValueError, "mode is None; available: 'rescore'"),
        ({"fusion": "sum"}, ValueError, "fusion is 'sum'; available: 'weighted'"),
        ({"k": 0}, ValueError, "k is 0; it must be at least 1"),
        ({"k": -3}, ValueError, "k is -3; it must be at least 1"),
        ({"k": 2.0}, TypeError, r"k is 2\.0; give a whole number"),
        ({"k": True}, TypeError, "k is True; give a whole number"),
        ({"candidates": 0}, ValueError, "candidates is 0; it must be at least 1"),
        ({"candidates": "9"}, TypeError, "candidates is '9'; give a whole number"),
        ({"dense_weight": -0.1}, ValueError, r"dense_weight is -0\.1; it must be finite and not negative"),
        ({"sparse_weight": -1}, ValueError, "sparse_weight is -1; it must be finite and not negative"),
        ({"sparse_weight": float("nan")}, ValueError, "sparse_weight is nan; it must be finite"),
        ({"dense_weight": float("inf")}, ValueError, "dense_weight is inf; it must be finite"),
        ({"dense_weight": "1"}, TypeError, "dense_weight is '1'; give a number"),
    ],
)
def test_impossible_options_are_refused(
    collection: HybridCollection, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HybridRetriever(collection, **options)


@pytest.mark.parametrize("kind", ["Collection", "str", "NoneType"])
def test_only_a_hybrid_collection_is_searched(collection: HybridCollection, kind: str) -> None:
    wrong = {"Collection": collection.collection, "str": "garden", "NoneType": None}[kind]
    with pytest.raises(TypeError, match=f"collection is {kind}; give a HybridCollection"):
        HybridRetriever(cast(Any, wrong))


@pytest.mark.parametrize(
    ("query", "options", "error", "message"),
    [
        (["apple"], {}, TypeError, "query is list; give one string"),
        (b"apple", {}, TypeError, "query is bytes; give one string"),
        (None, {}, TypeError, "query is NoneType; give one string"),
        ("apple", {"k": 0}, ValueError, "k is 0; it must be at least 1"),
        ("apple", {"k": "2"}, TypeError, "k is '2'; give a whole number"),
        ("apple", {"where": {"number": {"$near": 1}}}, ValueError, r"\$near"),
        ("apple", {"where": {}}, ValueError, "Expected where to have exactly one operator"),
        ("apple", {"where_document": {"$like": "x"}}, ValueError, r"\$like"),
    ],
)
def test_impossible_searches_are_refused(
    collection: HybridCollection, query: Any, options: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HybridRetriever(collection).search(query, **options)


# Asynchronous


async def test_asearch_equals_search(collection: HybridCollection) -> None:
    retriever = HybridRetriever(collection, sparse_weight=2.0)
    options: dict[str, Any] = {
        "k": 2,
        "where": {"number": {"$lt": 3}},
        "where_document": {"$contains": "a"},
    }
    hits = await retriever.asearch("a red apple", **options)
    assert [hit.id for hit in hits] == ["apple", "pear"]
    assert hits == retriever.search("a red apple", **options)
    assert await retriever.asearch("a red apple") == retriever.search("a red apple")
    with pytest.raises(TypeError, match="query is int"):
        await retriever.asearch(cast(Any, 7))


async def test_asearch_does_not_block_the_event_loop(
    collection: HybridCollection, stub: StubEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, loop_went_on = stub.encode_queries, threading.Event()

    def wait_for_the_loop(texts: list[str]) -> Encoding:
        assert loop_went_on.wait(timeout=10), "the event loop stood still while the query was encoded"
        return encode(texts)

    monkeypatch.setattr(stub, "encode_queries", wait_for_the_loop)
    searching = asyncio.create_task(HybridRetriever(collection).asearch("a red apple"))
    await asyncio.sleep(0.01)  # lets the search begin; only then does the loop set the event it waits for
    loop_went_on.set()
    assert (await searching)[0].id == "apple"


# The bundled model

PASSAGES = {
    "de-bread": "Brot wird aus Mehl, Wasser, Salz und Hefe gebacken.",
    "de-train": "Der Zug nach Hamburg fährt jede Stunde vom Hauptbahnhof ab.",
    "zh-capital": "北京是中国的首都。",
    "zh-sort": "快速排序是一种常用的排序算法。",
    "ru-space": "Юрий Гагарин был первым человеком в космосе.",
    "ru-tea": "Чай заваривают горячей водой несколько минут.",
    "en-python": "Python is a programming language with readable syntax.",
    "en-whale": "The blue whale is the largest animal on Earth.",
}


@pytest.fixture(scope="module")
def library(shared_client: ClientAPI, encoder: GTEEncoder) -> HybridCollection:
    """Two passages in each of four languages, with the vectors of the bundled model."""
    library = HybridCollection(shared_client, "library", encoder=encoder)
    library.upsert(list(PASSAGES), list(PASSAGES.values()), metadatas=[{"lang": key[:2]} for key in PASSAGES])
    return library


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Woraus wird Brot gebacken?", "de-bread"),
        ("Wann fährt der Zug nach Hamburg?", "de-train"),
        ("中国的首都是哪里？", "zh-capital"),
        ("排序算法", "zh-sort"),
        ("Кто был первым человеком в космосе?", "ru-space"),
        ("Как заваривают чай?", "ru-tea"),
        ("a readable programming language", "en-python"),
        ("Which animal is the largest?", "en-whale"),
    ],
)
def test_the_bundled_model_finds_the_passage_in_its_language(
    library: HybridCollection, query: str, expected: str
) -> None:
    best = HybridRetriever(library).search(query)[0]
    assert best.id == expected
    assert best.matches
    assert sum(match.weight for match in best.matches) == pytest.approx(best.sparse_score, rel=1e-5)


def test_scores_with_the_bundled_model_are_those_of_its_pairs(library: HybridCollection, encoder: GTEEncoder) -> None:
    query = "中国的首都 Hauptbahnhof whale чай"
    hits = HybridRetriever(library, dense_weight=0.5, sparse_weight=0.2).search(query)
    assert {hit.id for hit in hits} == set(PASSAGES)
    expected = encoder.score_pairs([(query, hit.text) for hit in hits], dense_weight=0.5, sparse_weight=0.2)
    errors = np.abs(expected - [hit.score for hit in hits])
    assert np.all(errors <= 1e-5 + FLOAT16 * 0.2 * np.array([hit.sparse_score for hit in hits]))


def test_filters_work_with_the_bundled_model(library: HybridCollection) -> None:
    hits = HybridRetriever(library).search("Кто был первым человеком в космосе?", where={"lang": "de"})
    assert {hit.id for hit in hits} == {"de-bread", "de-train"}
