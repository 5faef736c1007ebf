"""HybridCollection: what is stored, replaced, refused and never trusted, on every kind of Chroma client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import pytest

pytest.importorskip("chromadb")

import chromadb
from chromadb.config import Settings

from gte_rag.chroma import HybridCollection
from gte_rag.errors import CollectionMismatchError
from gte_rag.fusion import Calibration
from gte_rag.records import RESERVED_KEY, MetadataValue, Record
from gte_rag.retriever import Hit, HybridRetriever
from stub_encoder import WORD_WEIGHT, StubEncoder, open_collection

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

COSINE: Any = {"hnsw": {"space": "cosine"}}
ALL_KINDS: dict[str, MetadataValue] = {
    "text": "naïve 北京",
    "whole": -(2**63),
    "large": 2**63 - 1,
    "real": 1.0,
    "true": True,
    "texts": ["a", "b"],
    "wholes": [1, 2, 2],
    "reals": [1.0, 2.5],
    "truths": [True, False],
}


@pytest.fixture
def stub() -> StubEncoder:
    return StubEncoder()


@pytest.fixture
def collection(chroma_client: ClientAPI, stub: StubEncoder) -> HybridCollection:
    """Three records of a zoo."""
    collection = open_collection(chroma_client, "zoo", stub)
    collection.upsert(
        ["cat", "dog", "fish"],
        ["the cat sleeps", "the dog barks loudly", "the fish swims"],
        metadatas=[{"legs": 4, "sound": "meow"}, {"legs": 4}, None],
    )
    return collection


@contextmanager
def opened(client: ClientAPI) -> Iterator[ClientAPI]:
    """Close the client afterwards, so that the next one reads the folder anew."""
    try:
        yield client
    finally:
        cast(Any, client).close()


def search(collection: HybridCollection, query: str, **options: Any) -> list[Hit]:
    return HybridRetriever(collection).search(query, **options)


def sparse_scores(collection: HybridCollection, query: str) -> dict[str, float]:
    return {hit.id: hit.sparse_score for hit in search(collection, query)}


def stored_value(collection: HybridCollection, record_id: str) -> str:
    """What lies under the reserved key, read behind the collection's back."""
    metadatas = collection.collection.get([record_id], include=["metadatas"])["metadatas"]
    assert metadatas is not None
    return str(metadatas[0][RESERVED_KEY])


# Reading


def test_records_come_back_in_the_order_of_the_ids_without_missing_ones(collection: HybridCollection) -> None:
    assert collection.get(["fish", "unicorn", "cat"]) == [
        Record("fish", "the fish swims", {}),
        Record("cat", "the cat sleeps", {"legs": 4, "sound": "meow"}),
    ]
    assert collection.get(["unicorn"]) == []
    assert collection.get([]) == []


def test_get_without_ids_returns_every_record(collection: HybridCollection) -> None:
    assert {record.id for record in collection.get()} == {"cat", "dog", "fish"}
    assert collection.count() == len(collection) == 3


@pytest.mark.parametrize("ids", [None, ["dog", "cat", "fish"]])
def test_filters_choose_records_with_and_without_ids(collection: HybridCollection, ids: list[str] | None) -> None:
    def found(**filters: Any) -> set[str]:
        return {record.id for record in collection.get(ids, **filters)}

    assert found(where={"legs": 4}) == {"cat", "dog"}
    assert found(where={"legs": {"$gt": 4}}) == set()
    assert found(where_document={"$contains": "dog"}) == {"dog"}
    assert found(where={"legs": 4}, where_document={"$not_contains": "dog"}) == {"cat"}


@pytest.mark.parametrize("ids", [None, ["dog", "cat", "fish"]])
def test_limit_and_offset_page_through_all_records_once(collection: HybridCollection, ids: list[str] | None) -> None:
    everything = [record.id for record in collection.get(ids)]
    pages = [[record.id for record in collection.get(ids, limit=2, offset=offset)] for offset in (0, 2, 4)]
    assert pages == [everything[:2], everything[2:], []]
    assert [record.id for record in collection.get(ids, offset=1)] == everything[1:]
    assert collection.get(ids, limit=0) == []


@pytest.mark.parametrize("ids", [None, ["dog", "cat"]])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": -1}, ValueError, "limit is -1; it must be 0 or more"),
        ({"offset": -1}, ValueError, "offset is -1; it must be 0 or more"),
        ({"limit": 1.5}, TypeError, r"limit is 1\.5; give a whole number"),
        ({"offset": True}, TypeError, "offset is True; give a whole number"),
    ],
)
def test_get_refuses_impossible_pages(
    collection: HybridCollection,
    ids: list[str] | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        collection.get(ids, **options)


@pytest.mark.parametrize("method", ["get", "delete"])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ("cat", TypeError, "ids is str; give a list"),
        ({"cat"}, TypeError, "ids is set; give a list"),
        ([1], TypeError, r"ids\[0\] is int"),
        (["cat", ""], ValueError, r"ids\[1\] is empty"),
        (["cat", "dog", "cat"], ValueError, "'cat' given more than once"),
        (["\ud800"], ValueError, r"ids\[0\] has a lone surrogate"),
    ],
)
def test_get_and_delete_refuse_what_is_no_list_of_ids(
    collection: HybridCollection, method: str, ids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(collection, method)(ids)
    assert collection.count() == 3


def test_the_reserved_key_never_shows(collection: HybridCollection) -> None:
    records = [*collection.get(), *collection.get(["cat"]), *collection.get(where={"legs": 4})]
    metadatas = [item.metadata for item in records] + [hit.metadata for hit in search(collection, "the cat")]
    assert len(metadatas) == 9
    for metadata in metadatas:
        assert not [key for key in metadata if key.startswith("gte_rag")]
    assert RESERVED_KEY in str(collection.collection.get())  # it is there, behind the curtain


# Writing


def test_every_kind_of_metadata_comes_back_with_its_type(collection: HybridCollection) -> None:
    collection.add(["x"], ["y"], metadatas=[ALL_KINDS])
    metadata = collection.get(["x"])[0].metadata
    assert metadata == ALL_KINDS
    assert {key: type(value) for key, value in metadata.items()} == {k: type(v) for k, v in ALL_KINDS.items()}
    assert search(collection, "y", k=1)[0].metadata == ALL_KINDS


def test_metadata_values_of_none_are_left_out(collection: HybridCollection) -> None:
    metadatas = cast("list[dict[str, MetadataValue]]", [{"gone": None, "kept": 1}, {"gone": None}])
    collection.add(["x", "y"], ["one", "two"], metadatas=metadatas)
    assert [record.metadata for record in collection.get(["x", "y"])] == [{"kept": 1}, {}]


@pytest.mark.parametrize(
    "text", ["", " ", "a\0b", "\u202eright to left", "e\u0301", "👩‍👩‍👧", "x" * 100_000, "line\r\nbreak\n"]
)
def test_unusual_texts_come_back_unchanged(collection: HybridCollection, text: str) -> None:
    collection.add([f"id of {text[:20]}"], [text], metadatas=[{f"key {text[:20]}": text[:20]}])
    assert collection.get([f"id of {text[:20]}"]) == [
        Record(f"id of {text[:20]}", text, {f"key {text[:20]}": text[:20]})
    ]


def test_add_refuses_existing_ids_and_writes_nothing(collection: HybridCollection, stub: StubEncoder) -> None:
    before, calls = collection.get(), len(stub.document_calls)
    with pytest.raises(ValueError, match=r"ids 'dog' exist already; use upsert to replace them\. Nothing was added"):
        collection.add(["bird", "dog"], ["the bird sings", "the dog sings"])
    assert collection.get() == before
    assert len(stub.document_calls) == calls


def test_upsert_replaces_text_and_both_vectors(collection: HybridCollection) -> None:
    collection.upsert(["dog"], ["a snake hisses"])
    assert collection.get(["dog"])[0].text == "a snake hisses"
    best = search(collection, "a snake hisses", k=1)[0]
    assert best.id == "dog"
    assert best.dense_score == pytest.approx(1, abs=1e-6)
    assert sparse_scores(collection, "snake")["dog"] == pytest.approx(WORD_WEIGHT**2, rel=2**-11)
    assert sparse_scores(collection, "barks")["dog"] == 0
    assert collection.count() == 3


@pytest.mark.parametrize("new", [None, {}, {"other": 1}, {"texts": "no list", "whole": [1], "real": "x", "true": 0}])
def test_upsert_leaves_no_metadata_behind(collection: HybridCollection, new: dict[str, MetadataValue] | None) -> None:
    collection.add(["x"], ["y"], metadatas=[ALL_KINDS])
    collection.upsert(
        ["new", "x", "cat"], ["new", "y", "the cat purrs"], metadatas=[{"legs": 1}, new, {"sound": "purr"}]
    )
    assert [record.metadata for record in collection.get(["new", "x", "cat"])] == [
        {"legs": 1},
        new or {},
        {"sound": "purr"},
    ]
    # Neither do the indexes behind the filters remember.
    assert collection.get(where={"texts": {"$contains": "a"}}) == []
    assert collection.get(where={"wholes": {"$contains": 2}}) == []
    assert collection.get(where={"whole": -(2**63)}) == []
    assert collection.get(where={"sound": "meow"}) == []


def test_upsert_of_nothing_does_nothing(collection: HybridCollection) -> None:
    collection.upsert([], [])
    collection.add([], [], metadatas=[])
    collection.delete([])
    assert collection.count() == 3


def test_the_callers_lists_and_metadata_stay_as_they_are(collection: HybridCollection) -> None:
    ids, texts, metadatas = ["cat"], ["new"], [{"tags": ["a"]}]
    collection.upsert(ids, texts, metadatas=cast("list[dict[str, MetadataValue]]", metadatas))
    assert (ids, texts, metadatas) == (["cat"], ["new"], [{"tags": ["a"]}])


NAN = float("nan")
REFUSED_RECORDS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ("ab", ["x", "y"], None, TypeError, "ids is str; give a list"),
    (None, ["x", "y"], None, TypeError, "ids is NoneType; give a list"),
    (["a", "b"], "xy", None, TypeError, "texts is a single str; give a list"),
    (["a", "b"], None, None, TypeError, "texts is NoneType; give a list"),
    (["a", "b"], b"xy", None, TypeError, "texts is a single bytes"),
    (["a", "b"], ["x", None], None, TypeError, r"texts\[1\] is NoneType"),
    (["a", 2], ["x", "y"], None, TypeError, r"ids\[1\] is int"),
    (["a", ""], ["x", "y"], None, ValueError, r"ids\[1\] is empty"),
    (["a", "b", "a"], ["x", "y", "z"], None, ValueError, "ids 'a' given more than once"),
    (["a", "\udcff"], ["x", "y"], None, ValueError, r"ids\[1\] has a lone surrogate"),
    (["a", "b"], ["x", "y\ud800"], None, ValueError, r"texts\[1\] has a lone surrogate"),
    (["a", "b"], ["x"], None, ValueError, "2 ids, 1 texts; give one of each"),
    (["a", "b"], ["x", "y"], [None], ValueError, "2 ids, 2 texts and 1 metadatas; give one of each"),
    (["a", "b"], ["x", "y"], {"k": 1}, TypeError, "metadatas is dict; give a list"),
    (["a", "b"], ["x", "y"], "kv", TypeError, "metadatas is str; give a list"),
    (["a", "b"], ["x", "y"], [{"k": 1}, "v"], TypeError, r"metadatas\[1\] is str; give a mapping"),
]
REFUSED_METADATA: list[tuple[Any, type[Exception], str]] = [
    ({"k": {"nested": 1}}, ValueError, r"metadatas\[1\]\['k'\] is {'nested': 1}; Chroma stores"),
    ({"k": []}, ValueError, r"metadatas\[1\]\['k'\] is \[\]; Chroma stores"),
    ({"k": [1, "a"]}, ValueError, r"metadatas\[1\]\['k'\] is \[1, 'a'\]"),
    ({"k": [1, True]}, ValueError, r"metadatas\[1\]\['k'\] is \[1, True\]"),
    ({"k": [1, 1.0]}, ValueError, r"metadatas\[1\]\['k'\] is \[1, 1\.0\]"),
    ({"k": [[1]]}, ValueError, r"metadatas\[1\]\['k'\] is \[\[1\]\]"),
    ({"k": [None]}, ValueError, r"metadatas\[1\]\['k'\] is \[None\]"),
    ({"k": (1, 2)}, ValueError, r"metadatas\[1\]\['k'\] is \(1, 2\)"),
    ({"k": b"bytes"}, ValueError, r"metadatas\[1\]\['k'\] is b'bytes'"),
    ({"k": NAN}, ValueError, r"metadatas\[1\]\['k'\] is nan"),
    ({"k": [1.0, -float("inf")]}, ValueError, r"metadatas\[1\]\['k'\] is -inf"),
    ({"k": 2**63}, ValueError, "is 9223372036854775808; Chroma stores whole numbers of 64 bits"),
    ({"k": [0, -(2**63) - 1]}, ValueError, "is -9223372036854775809; Chroma stores whole numbers of 64 bits"),
    ({RESERVED_KEY: "mine"}, ValueError, "has the key 'gte_rag:sparse'"),
    ({"#k": 1}, ValueError, "has the key '#k'"),
    ({"$k": 1}, ValueError, r"has the key '\$k'"),
    ({"chroma:document": "x"}, ValueError, "has the key 'chroma:document'"),
    ({"": 1}, ValueError, "has the key ''"),
    ({RESERVED_KEY: None}, ValueError, "has the key 'gte_rag:sparse'"),
    ({1: "x"}, TypeError, r"metadatas\[1\] has the key 1; keys must be strings"),
    ({"\ud800": 1}, ValueError, r"a key of metadatas\[1\] has a lone surrogate"),
    ({"k": "\ud800"}, ValueError, r"metadatas\[1\]\['k'\] has a lone surrogate '\\ud800' at character 0"),
    ({"k": ["a", "b\udfff"]}, ValueError, r"metadatas\[1\]\['k'\] has a lone surrogate '\\udfff' at character 1"),
]


@pytest.mark.parametrize("method", ["add", "upsert"])
@pytest.mark.parametrize(
    ("ids", "texts", "metadatas", "error", "message"),
    [*REFUSED_RECORDS, *((["a", "b"], ["x", "y"], [{"good": 1}, bad], *rest) for bad, *rest in REFUSED_METADATA)],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_encoded_or_written(
    collection: HybridCollection,
    stub: StubEncoder,
    method: str,
    ids: Any,
    texts: Any,
    metadatas: Any,
    error: type[Exception],
    message: str,
) -> None:
    calls = len(stub.document_calls)
    with pytest.raises(error, match=message):
        getattr(collection, method)(ids, texts, metadatas=metadatas)
    assert collection.count() == 3
    assert len(stub.document_calls) == calls


def test_delete_takes_ids_filters_or_both(collection: HybridCollection) -> None:
    collection.delete(["fish", "unicorn"])
    assert {record.id for record in collection.get()} == {"cat", "dog"}
    collection.delete(["cat"], where={"sound": "bark"})
    assert collection.count() == 2
    collection.delete(where={"legs": 4}, where_document={"$contains": "barks"})
    assert [record.id for record in collection.get()] == ["cat"]
    assert [hit.id for hit in search(collection, "the dog barks")] == ["cat"]


def test_delete_without_ids_or_filter_is_refused(collection: HybridCollection) -> None:
    with pytest.raises(ValueError, match="delete needs ids or a filter"):
        collection.delete()
    assert collection.count() == 3


def test_a_deleted_id_can_be_added_again_and_remembers_nothing(collection: HybridCollection) -> None:
    collection.delete(["cat"])
    collection.add(["cat"], ["a lynx"])
    assert collection.get(["cat"]) == [Record("cat", "a lynx", {})]
    assert sparse_scores(collection, "sleeps")["cat"] == 0


def test_one_call_takes_more_records_than_a_chroma_batch(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    n = chroma_client.get_max_batch_size() + 1
    collection = open_collection(chroma_client, "large", stub)
    ids = [f"id{number}" for number in range(n)]
    collection.add(ids, [f"text {number}" for number in range(n)], metadatas=[{"n": number} for number in range(n)])
    assert n == 5462
    assert collection.count() == n
    backwards = ids[::-1]
    expected = [Record(f"id{number}", f"text {number}", {"n": number}) for number in range(n)][::-1]
    assert collection.get(backwards) == expected
    assert collection.get(backwards, limit=2, offset=n - 1) == expected[-1:]
    with pytest.raises(ValueError, match="ids 'id5461' exist already"):  # seen in the second batch
        collection.add([*(f"new{number}" for number in range(n - 1)), "id5461"], ["x"] * n)
    assert collection.count() == n
    collection.delete(ids)
    assert collection.count() == 0


@pytest.mark.parametrize("method", ["add", "upsert"])
def test_an_encoder_that_fails_midway_leaves_finished_groups_complete(
    chroma_client: ClientAPI, stub: StubEncoder, method: str
) -> None:
    n = 1500
    ids, texts = [f"id{number}" for number in range(n)], [f"word{number}" for number in range(n)]
    metadatas: list[dict[str, MetadataValue]] = [{"n": number} for number in range(n)]
    collection = open_collection(chroma_client, "interrupted", stub)
    stub.fails_on = texts[-1]
    with pytest.raises(RuntimeError, match="cannot encode 'word1499'"):
        getattr(collection, method)(ids, texts, metadatas=metadatas)
    finished = sum(map(len, stub.document_calls[:-1]))
    assert 0 < finished < n
    records = [Record(*record) for record in zip(ids, texts, metadatas, strict=True)]
    assert collection.get(ids) == records[:finished]
    raw = collection.collection.get(include=["metadatas", "embeddings"])
    assert all(RESERVED_KEY in metadata for metadata in raw["metadatas"] or [])
    assert np.shape(cast(Any, raw["embeddings"])) == (finished, stub.dimension)

    stub.fails_on = None
    collection.upsert(ids, texts, metadatas=metadatas)
    assert collection.get(ids) == records


def test_a_failed_replacement_leaves_the_old_record_whole(collection: HybridCollection, stub: StubEncoder) -> None:
    stub.fails_on = "a wolf howls"
    with pytest.raises(RuntimeError, match="cannot encode"):
        collection.upsert(["dog"], ["a wolf howls"])
    assert collection.get(["dog"]) == [Record("dog", "the dog barks loudly", {"legs": 4})]
    assert search(collection, "the dog barks loudly", k=1)[0].dense_score == pytest.approx(1, abs=1e-6)


# What the collection is


def test_the_collection_uses_cosine_distance(collection: HybridCollection, stub: StubEncoder) -> None:
    assert collection.collection.configuration_json["hnsw"]["space"] == "cosine"
    for hit in search(collection, "a loud dog"):
        expected = float(stub.dense("a loud dog") @ stub.dense(hit.text))
        assert hit.dense_score == pytest.approx(expected, abs=1e-6)


def test_a_cosine_never_leaves_its_range(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    collection = open_collection(chroma_client, "range", stub)
    texts = [" ".join(f"w{number}" for number in range(length)) for length in range(40)]
    collection.add([str(number) for number in range(40)], texts)
    best = [search(collection, text, k=1)[0].dense_score for text in texts]
    assert all(score <= 1 for score in best)
    assert best == pytest.approx([1] * 40, abs=1e-6)


def test_reopening_finds_the_records(collection: HybridCollection, chroma_client: ClientAPI, stub: StubEncoder) -> None:
    again = open_collection(chroma_client, "zoo", StubEncoder())
    assert again.name == "zoo"
    assert again.get() == collection.get()
    calls = len(stub.document_calls)
    assert search(again, "the fish swims") == search(collection, "the fish swims")
    assert len(stub.document_calls) == calls
    assert not cast(Any, again.encoder).document_calls  # nothing had to be encoded again


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (StubEncoder(fingerprint="f" * 16), "made by the model 'stub' .*another collection"),
        (StubEncoder(dimension=16), "dimension 32; this encoder gives 16. Load it with dimension=32, or"),
    ],
)
def test_a_collection_of_another_model_or_dimension_is_refused_and_untouched(
    collection: HybridCollection, chroma_client: ClientAPI, other: StubEncoder, message: str
) -> None:
    before, marks = collection.collection.get(), collection.collection.metadata
    with pytest.raises(CollectionMismatchError, match=message):
        open_collection(chroma_client, "zoo", other)
    raw = chroma_client.get_collection("zoo", embedding_function=None)
    assert raw.metadata == marks
    assert raw.get() == before


@pytest.mark.parametrize("space", ["l2", "ip"])
def test_a_collection_with_another_distance_is_refused_and_untouched(
    chroma_client: ClientAPI, stub: StubEncoder, space: str
) -> None:
    configuration: Any = {"hnsw": {"space": space}}
    raw = chroma_client.create_collection("distances", configuration=configuration, embedding_function=None)
    with pytest.raises(
        CollectionMismatchError, match=f"uses the distance '{space}'; gte-rag needs 'cosine'. Index into.*adopt=True"
    ):
        open_collection(chroma_client, "distances", stub)
    assert chroma_client.get_collection("distances", embedding_function=None).metadata == raw.metadata


def test_the_records_of_another_program_are_refused_and_untouched(chroma_client: ClientAPI, stub: StubEncoder) -> None:
    raw = chroma_client.create_collection(
        "foreign", metadata={"owner": "me"}, configuration=COSINE, embedding_function=None
    )
    raw.add(ids=["a"], documents=["text"], embeddings=[stub.dense("text").tolist()])
    with pytest.raises(CollectionMismatchError, match=r"was not made by gte-rag.*into a new collection"):
        open_collection(chroma_client, "foreign", stub)
    raw = chroma_client.get_collection("foreign", embedding_function=None)
    assert raw.metadata == {"owner": "me"}
    assert RESERVED_KEY not in str(raw.get())


@pytest.mark.parametrize("legacy", [False, True])
def test_an_empty_cosine_collection_of_another_program_becomes_ours(
    chroma_client: ClientAPI, stub: StubEncoder, legacy: bool
) -> None:
    if legacy:  # the way to say cosine before there were configurations
        chroma_client.create_collection("adopted", metadata={"owner": "me", "hnsw:space": "cosine"})
    else:
        chroma_client.create_collection("adopted", metadata={"owner": "me"}, configuration=COSINE)
    collection = open_collection(chroma_client, "adopted", stub)
    collection.add(["a"], ["text"])
    again = open_collection(chroma_client, "adopted", StubEncoder())
    assert again.collection.metadata["owner"] == "me"
    assert again.get() == [Record("a", "text", {})]
    with pytest.raises(CollectionMismatchError, match="made by the model 'stub'"):
        open_collection(chroma_client, "adopted", StubEncoder(fingerprint="f" * 16))


def test_an_encoder_without_sparse_vectors_is_refused_and_nothing_is_created(chroma_client: ClientAPI) -> None:
    dense_only = StubEncoder()
    dense_only.has_sparse = False
    with pytest.raises(ValueError, match=r"stub gives no sparse vectors; .* needs a model with a sparse head"):
        open_collection(chroma_client, "dense", dense_only)
    assert chroma_client.list_collections() == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ab", ValueError, "name is 'ab'; Chroma refuses it: .*3-512 characters"),
        ("a b c", ValueError, "name is 'a b c'; Chroma refuses it"),
        ("", ValueError, "name is empty"),
        (None, TypeError, "name is NoneType; give a string"),
    ],
)
def test_a_name_that_chroma_does_not_take_is_refused(
    chroma_client: ClientAPI, stub: StubEncoder, name: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_collection(chroma_client, name, stub)


# What other programs do to the records


def test_a_text_that_another_program_replaced_gets_its_own_sparse_vector(
    collection: HybridCollection, stub: StubEncoder
) -> None:
    text = "wolves howl and howl"
    old = stored_value(collection, "dog")
    collection.collection.upsert(ids=["dog"], documents=[text], embeddings=[stub.dense(text).tolist()])
    assert stored_value(collection, "dog") == old  # Chroma kept the value of the old text
    stub.document_calls.clear()
    assert sparse_scores(collection, "howl")["dog"] == pytest.approx(2 * WORD_WEIGHT**2)
    assert sparse_scores(collection, "barks")["dog"] == 0
    assert stub.document_calls == [[text], [text]]  # only this one was computed
    collection.upsert(["dog"], [text])
    stub.document_calls.clear()
    assert sparse_scores(collection, "howl")["dog"] == pytest.approx(2 * WORD_WEIGHT**2, rel=2**-11)
    assert stub.document_calls == []


def test_a_record_that_another_program_wrote_is_searched_like_ours(
    collection: HybridCollection, stub: StubEncoder
) -> None:
    vectors = [stub.dense("the owl").tolist(), stub.dense("").tolist()]
    collection.collection.upsert(ids=["owl", "no text"], documents=["the owl", ""], embeddings=vectors)
    collection.collection.add(ids=["nothing"], embeddings=[vectors[1]])
    assert collection.get(["owl", "nothing"]) == [Record("owl", "the owl", {}), Record("nothing", "", {})]
    scores = sparse_scores(collection, "owl")
    assert scores == {"cat": 0, "dog": 0, "fish": 0, "no text": 0, "nothing": 0, "owl": pytest.approx(WORD_WEIGHT**2)}


def test_a_record_that_another_program_deleted_is_gone(collection: HybridCollection) -> None:
    collection.collection.delete(["dog"])
    assert collection.get(["dog"]) == []
    assert collection.count() == 2
    assert {hit.id for hit in search(collection, "the dog barks loudly")} == {"cat", "fish"}
    collection.add(["dog"], ["the dog is back"])
    assert collection.count() == 3


def test_a_sparse_vector_of_another_model_is_not_trusted(
    collection: HybridCollection, chroma_client: ClientAPI
) -> None:
    other = open_collection(chroma_client, "other", StubEncoder(fingerprint="f" * 16, word_weight=50.0))
    other.add(["dog"], ["the dog barks loudly"])
    collection.collection.update(ids=["dog"], metadatas=[{RESERVED_KEY: stored_value(other, "dog")}])
    assert sparse_scores(collection, "dog")["dog"] == pytest.approx(WORD_WEIGHT**2)


DAMAGES: dict[str, Callable[[str], Any]] = {
    "missing": lambda value: None,
    "empty": lambda value: "",
    "number": lambda value: 5,
    "list": lambda value: [value],
    "other format": lambda value: "0" + value[1:],
    "no weights": lambda value: value[: value.rindex(":") + 1],
    "cut by a character": lambda value: value[:-1],
    "cut by a token": lambda value: value[:-8],
    "doubled": lambda value: value + value[value.rindex(":") + 1 :],
    "one character changed": lambda value: value[:-3] + ("A" if value[-3] != "A" else "B") + value[-2:],
    "not base64": lambda value: value[:-1] + "ß",
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_sparse_vector_is_computed_anew(collection: HybridCollection, stub: StubEncoder, damage: str) -> None:
    text = "the dog barks loudly"
    value = DAMAGES[damage](stored_value(collection, "dog"))
    collection.collection.update(ids=["dog"], metadatas=cast(Any, [{RESERVED_KEY: value}]))
    stub.document_calls.clear()
    assert sparse_scores(collection, text)["dog"] == pytest.approx(4 * WORD_WEIGHT**2)
    assert stub.document_calls == [[text]]
    assert collection.get(["dog"]) == [Record("dog", text, {"legs": 4})]


# Where the collection lives


def test_a_folder_keeps_the_collection(tmp_path: Path, stub: StubEncoder) -> None:
    with opened(chromadb.PersistentClient(tmp_path)) as client:
        collection = open_collection(client, "kept", stub)
        collection.add(["a", "b"], ["red apple", "green pear"], metadatas=[ALL_KINDS, None])
        hits = search(collection, "red pear")
    with opened(chromadb.PersistentClient(tmp_path)) as client:
        again = open_collection(client, "kept", StubEncoder())
        assert again.get(["a", "b"]) == [Record("a", "red apple", ALL_KINDS), Record("b", "green pear", {})]
        assert search(again, "red pear") == hits
        assert not cast(Any, again.encoder).document_calls
        with pytest.raises(CollectionMismatchError, match="dimension 32; this encoder gives 16"):
            open_collection(client, "kept", StubEncoder(dimension=16))
        again.upsert(["a"], ["blue plum"])
        again.delete(["b"])
    with opened(chromadb.PersistentClient(tmp_path)) as client:
        assert open_collection(client, "kept", stub).get() == [Record("a", "blue plum", {})]


def test_another_process_opens_the_folder(tmp_path: Path, stub: StubEncoder) -> None:
    with opened(chromadb.PersistentClient(tmp_path)) as client:
        collection = open_collection(client, "kept", stub)
        collection.add(["a", "b"], ["red apple", "green pear"], metadatas=[{"n": 1}, None])
        hits = search(collection, "red pear")
    program = """
import sys, chromadb
from gte_rag.retriever import HybridRetriever
from stub_encoder import StubEncoder, open_collection
stub = StubEncoder()
collection = open_collection(chromadb.PersistentClient(sys.argv[1]), "kept", stub)
print(HybridRetriever(collection).search("red pear"))
assert stub.document_calls == []
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(hits)


@pytest.fixture
def http_client(chroma_server: tuple[str, int]) -> Iterator[ClientAPI]:
    host, port = chroma_server
    with opened(chromadb.HttpClient(host, port, settings=Settings(anonymized_telemetry=False))) as client:
        assert client.heartbeat() > 0
        yield client


def test_a_server_does_what_a_folder_does(http_client: ClientAPI, stub: StubEncoder) -> None:
    collection = open_collection(http_client, f"served-{uuid4().hex}", stub)
    assert search(collection, "nothing yet") == []
    collection.add(
        ["cat", "dog", "fish"],
        ["the cat sleeps", "the dog barks", "the fish swims"],
        metadatas=[ALL_KINDS, {"legs": 4}, None],
    )
    assert collection.get(["fish", "unicorn", "cat"]) == [
        Record("fish", "the fish swims", {}),
        Record("cat", "the cat sleeps", ALL_KINDS),
    ]
    with pytest.raises(ValueError, match="ids 'dog' exist already"):
        collection.add(["owl", "dog"], ["x", "y"])
    collection.upsert(["cat"], ["a lynx hunts"], metadatas=[{"texts": "no list"}])
    assert collection.get(["cat"]) == [Record("cat", "a lynx hunts", {"texts": "no list"})]
    assert collection.get(where={"texts": {"$contains": "a"}}) == []
    assert collection.get(where={"legs": 4}, where_document={"$contains": "dog"})[0].id == "dog"
    assert [len(collection.get(limit=2, offset=offset)) for offset in (0, 2, 4)] == [2, 1, 0]

    hits = search(collection, "the dog barks")
    assert [hit.id for hit in hits] == ["dog", "fish", "cat"]
    assert hits[0].dense_score == pytest.approx(1, abs=1e-6)
    assert hits[0].sparse_score == pytest.approx(3 * WORD_WEIGHT**2, rel=2**-11)
    assert [hit.id for hit in search(collection, "the dog", where={"texts": "no list"})] == ["cat"]

    collection.delete(["dog"])
    collection.delete(where={"texts": "no list"})
    assert [record.id for record in collection.get()] == ["fish"]
    again = open_collection(http_client, collection.name, StubEncoder())
    assert search(again, "fish") == search(collection, "fish")
    assert len(stub.document_calls) == 2  # one add and one upsert; the searches encoded no document


def test_a_server_takes_more_records_than_a_chroma_batch(http_client: ClientAPI, stub: StubEncoder) -> None:
    n = http_client.get_max_batch_size() + 1
    collection = open_collection(http_client, f"large-{uuid4().hex}", stub)
    ids = [f"id{number}" for number in range(n)]
    collection.upsert(ids, [f"text {number}" for number in range(n)])
    assert collection.count() == n
    assert [record.id for record in collection.get(ids[::-1])] == ids[::-1]
    collection.delete(ids[1:])
    assert collection.count() == 1


def test_a_server_refuses_what_a_folder_refuses(http_client: ClientAPI, stub: StubEncoder) -> None:
    name = f"marked-{uuid4().hex}"
    collection = open_collection(http_client, name, stub)
    collection.add(["a"], ["text"])
    with pytest.raises(CollectionMismatchError, match="made by the model 'stub'"):
        open_collection(http_client, name, StubEncoder(fingerprint="f" * 16))
    with pytest.raises(CollectionMismatchError, match="dimension 32; this encoder gives 16"):
        open_collection(http_client, name, StubEncoder(dimension=16))
    other = http_client.create_collection(f"l2-{uuid4().hex}", embedding_function=None)
    with pytest.raises(CollectionMismatchError, match="uses the distance 'l2'"):
        open_collection(http_client, other.name, stub)
    for bad in ("ab", "a b c", ""):
        with pytest.raises(ValueError, match="name is"):
            open_collection(http_client, bad, stub)
    for limits in ({"limit": -1}, {"offset": -1}):
        with pytest.raises(ValueError, match="it must be 0 or more"):
            collection.get(**cast(Any, limits))
    for wrong in (["\ud800"], [""]):
        with pytest.raises(ValueError, match=r"ids\[0\]"):
            collection.get(wrong)


def test_vectors_over_a_server_are_those_of_memory(
    http_client: ClientAPI, chroma_client: ClientAPI, stub: StubEncoder
) -> None:
    texts = [f"word{number} word{number // 3} other{number % 5}" for number in range(30)]
    ids = [f"id{number}" for number in range(30)]
    served = open_collection(http_client, f"same-{uuid4().hex}", stub)
    local = open_collection(chroma_client, "same", stub)
    for collection in (served, local):
        collection.add(ids, texts)
        vectors = collection.collection.get(ids, include=["embeddings"])["embeddings"]
        # Chroma normalises what it stores under cosine distance once more: the last bit may differ.
        np.testing.assert_allclose(np.asarray(vectors), np.stack([stub.dense(text) for text in texts]), atol=1.2e-7)
    far = {hit.id: hit for hit in search(served, "word4 other2", k=30)}
    near = {hit.id: hit for hit in search(local, "word4 other2", k=30)}
    assert far.keys() == near.keys() == set(ids)
    for record_id in ids:
        assert far[record_id].sparse_score == near[record_id].sparse_score
        assert far[record_id].score == pytest.approx(near[record_id].score, abs=1e-6)


# Threads, and answers that are lost


def test_a_calibration_outlives_the_write_of_another_thread(stub: StubEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = open_collection(chromadb.EphemeralClient(), f"c{uuid4().hex}", stub)
    calibration, read = Calibration(0.5, 0.1, 0.3, 0.2, 16, 100), collection._metadata
    setting = threading.Thread(target=setattr, args=(collection, "calibration", calibration))

    def read_and_let_it_be_set() -> dict[str, Any]:
        found = read()
        if setting.ident is None:
            setting.start()
            setting.join(timeout=0.5)
        return found

    monkeypatch.setattr(collection, "_metadata", read_and_let_it_be_set)
    collection.upsert(["a"], ["text"])  # leaves its stamp in the same metadata
    setting.join()
    assert collection.calibration == calibration


def test_of_threads_that_add_one_id_all_but_one_are_refused(stub: StubEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = open_collection(chromadb.EphemeralClient(), f"c{uuid4().hex}", stub)
    together, encode = threading.Barrier(3), stub.encode_documents

    def encode_together(*args: Any, **options: Any) -> Any:
        together.wait(timeout=10)  # all have seen that the id is free
        return encode(*args, **options)

    monkeypatch.setattr(stub, "encode_documents", encode_together)
    refused: list[str] = []

    def add(number: int) -> None:
        try:
            collection.add(["x"], [f"text {number}"])
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 2
    assert all("added by another thread or process" in message for message in refused)
    assert collection.count() == 1


@pytest.mark.parametrize("lost", [TimeoutError("no answer"), json.JSONDecodeError("cut off", "{", 1)])
@pytest.mark.parametrize("write", ["upsert", "delete"])
def test_a_write_whose_answer_is_lost_is_searched_all_the_same(
    stub: StubEncoder, monkeypatch: pytest.MonkeyPatch, write: str, lost: Exception
) -> None:
    collection = open_collection(chromadb.EphemeralClient(), f"c{uuid4().hex}", stub)
    collection.upsert(["a", "b"], ["alpha", "beta"])
    retriever = HybridRetriever(collection, mode="sparse")
    assert [hit.id for hit in retriever.search("beta")] == ["b"]
    applied = getattr(collection.collection, write)

    def lose(*args: Any, **options: Any) -> None:
        applied(*args, **options)
        raise lost

    monkeypatch.setattr(collection.collection, write, lose)
    change = partial(collection.upsert, ["b"], ["omega"]) if write == "upsert" else partial(collection.delete, ["b"])
    with pytest.raises(type(lost)):
        change()
    assert [hit.id for hit in retriever.search("omega")] == (["b"] if write == "upsert" else [])
    assert [hit.id for hit in retriever.search("beta")] == []


def test_more_than_chroma_can_be_asked_for_is_all(collection: HybridCollection) -> None:
    assert len(search(collection, "cat", k=2**32)) == 3
    assert len(collection.get(limit=2**40)) == 3
    assert collection.get(offset=2**40) == []
