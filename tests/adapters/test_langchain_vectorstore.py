"""GTEChroma and GTEHybridRetriever.from_chroma: the standard suite, LangChain's indexing, foreign collections, refusals."""

from __future__ import annotations

import asyncio
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest

pytest.importorskip("chromadb")
pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")
pytest.importorskip("langchain_chroma")

import langchain_chroma
from chromadb import EmbeddingFunction
from chromadb.utils.embedding_functions import register_embedding_function
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from gte_rag import CollectionMismatchError, GTEEncoder, HybridRetriever, neighbours
from gte_rag.records import RESERVED_KEY
from langchain_gte import GTEChroma, GTEEmbeddings, GTEHybridRetriever
from langchain_gte.reranker import RERANK_SCORE_KEY

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytestmark = pytest.mark.usefixtures("bundled_once")

DOCUMENTS = [
    Document("The Great Wall of China is visible from afar.", id="wall", metadata={"lang": "en", "year": 2020}),
    Document("Rust frees memory without a garbage collector.", id="rust", metadata={"lang": "en", "year": 2021}),
    Document("北京是中国的首都。", id="beijing", metadata={"lang": "zh", "year": 2022}),
    Document("Bread is made of flour, water and salt.", id="bread", metadata={"lang": "en", "year": 2023}),
]


@pytest.fixture(scope="module")
def embeddings(encoder: GTEEncoder) -> GTEEmbeddings:
    return GTEEmbeddings(encoder=encoder)


@pytest.fixture
def store(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> GTEChroma:
    return GTEChroma.from_documents(DOCUMENTS, embeddings, client=chroma_client)


def ids(documents: list[Document]) -> list[str | None]:
    return [document.id for document in documents]


class TestStandard(VectorStoreIntegrationTests):
    # The suite's fake embeddings have no sparse side; the store is made of its own, as the suite allows.
    @pytest.fixture
    def vectorstore(self, chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> VectorStore:
        return GTEChroma(embedding_function=embeddings, client=chroma_client)


async def test_hybrid_search_is_the_retrievers(store: GTEChroma) -> None:
    hits = HybridRetriever(store.collection, k=4).search("garbage collector")
    found = store.hybrid_search_with_score("garbage collector")
    assert [(document.id, score) for document, score in found] == [(hit.id, hit.score) for hit in hits]
    assert found[0][0] == DOCUMENTS[1]
    assert await store.ahybrid_search_with_score("garbage collector") == found
    assert store.hybrid_search("garbage collector") == [document for document, _ in found]
    assert await store.ahybrid_search("garbage collector", 2) == [document for document, _ in found[:2]]
    assert store.search("garbage collector", "hybrid", k=1) == [DOCUMENTS[1]]
    assert await store.asearch("garbage collector", "hybrid", k=1) == [DOCUMENTS[1]]


def test_options_of_hybrid_search_do_what_they_say(store: GTEChroma) -> None:
    assert ids(store.hybrid_search("garbage", filter={"lang": "zh"})) == ["beijing"]
    assert ids(store.hybrid_search("garbage", where_document={"$contains": "flour"})) == ["bread"]
    assert ids(store.hybrid_search("flour", mode="sparse")) == ["bread"]
    (_, score), *_ = store.hybrid_search_with_score("flour", dense_weight=2, sparse_weight=0)
    (_, distance), *_ = store.similarity_search_with_score("flour")
    assert score == pytest.approx(2 * (1 - distance), abs=1e-5)
    with pytest.raises(ValueError, match="mode is 'both'; available"):
        store.hybrid_search("flour", mode="both")
    with pytest.raises(TypeError, match="weights"):
        store.hybrid_search("flour", weights=(1, 2))


async def test_similarity_search_is_dense_search(store: GTEChroma, embeddings: GTEEmbeddings) -> None:
    query = embeddings.embed_query("walls in China")
    vectors = embeddings.embed_documents([document.page_content for document in DOCUMENTS])
    cosines = {document.id: float(np.dot(query, vector)) for document, vector in zip(DOCUMENTS, vectors, strict=True)}
    found = store.similarity_search_with_score("walls in China", k=3)
    assert ids([document for document, _ in found]) == sorted(cosines, key=lambda name: -cosines[name])[:3]
    assert [distance for _, distance in found] == pytest.approx(
        [1 - cosines[document.id] for document, _ in found], abs=1e-5
    )
    assert await store.asimilarity_search_with_score("walls in China", k=3) == found
    documents = [document for document, _ in found]
    assert store.similarity_search("walls in China", 3) == documents
    assert store.similarity_search_by_vector(query, 3) == documents
    assert store.similarity_search_by_vector([7 * value for value in query], 3) == documents
    assert await store.asimilarity_search("walls in China", 3) == documents
    assert await store.asimilarity_search_by_vector(query, 3) == documents
    assert store.similarity_search_by_vector_with_relevance_scores(query, 3) == found


def test_a_distance_is_never_below_0(store: GTEChroma, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = neighbours.unit_vector
    longer = np.float32(1 + 1e-6)  # as rounding may leave a unit vector
    monkeypatch.setattr(neighbours, "unit_vector", lambda *arguments: unit(*arguments) * longer)
    assert store.similarity_search_with_score(DOCUMENTS[0].page_content, 1) == [(DOCUMENTS[0], 0.0)]


def test_documents_come_with_their_vectors(store: GTEChroma, embeddings: GTEEmbeddings) -> None:
    found = store.similarity_search_with_vectors("wall", 2, {"id": {"$ne": "absent"}})
    assert [document for document, _ in found] == store.similarity_search("wall", 2, {"id": {"$ne": "absent"}})
    expected = embeddings.embed_documents([document.page_content for document, _ in found])
    np.testing.assert_allclose([vector for _, vector in found], expected, atol=1e-6)


def test_filters_have_langchain_chromas_names(store: GTEChroma, embeddings: GTEEmbeddings) -> None:
    query = embeddings.embed_query("bread")
    since = {"year": {"$gte": 2021}}
    contains = {"$contains": "a"}
    expected = {"rust", "bread"}
    assert set(ids(store.similarity_search("bread", filter=since, where_document=contains))) == expected
    assert set(ids(store.similarity_search_by_vector(query, filter=since, where_document=contains))) == expected
    assert set(ids(store.max_marginal_relevance_search("bread", filter=since, where_document=contains))) == expected
    assert set(ids(store.hybrid_search("bread", filter=since, where_document=contains))) == expected


async def test_relevance_lies_between_0_and_1(store: GTEChroma) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store.similarity_search_with_relevance_scores(DOCUMENTS[3].page_content)
    assert found[0][0] == DOCUMENTS[3]
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert all(0 <= relevance <= 1 for _, relevance in found)
    assert store.similarity_search_with_relevance_scores(DOCUMENTS[3].page_content, score_threshold=0.99) == found[:1]
    assert await store.asimilarity_search_with_relevance_scores(DOCUMENTS[3].page_content) == found


def test_the_relevance_may_be_the_callers(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> None:
    store = GTEChroma.from_documents(
        DOCUMENTS, embeddings, client=chroma_client, relevance_score_fn=lambda distance: 0.5
    )
    assert {relevance for _, relevance in store.similarity_search_with_relevance_scores("bread")} == {0.5}


async def test_mmr_avoids_what_it_has_already(store: GTEChroma, embeddings: GTEEmbeddings) -> None:
    store.add_documents([Document("Bread is made of flour, water and salt!", id="bread again")])
    assert set(ids(store.similarity_search("bread flour", 2))) == {"bread", "bread again"}
    diverse = store.max_marginal_relevance_search("bread flour", 2, lambda_mult=0.1)
    assert len({"bread", "bread again"} & set(ids(diverse))) == 1
    assert ids(store.max_marginal_relevance_search("bread flour", 2, lambda_mult=1)) == ids(
        store.similarity_search("bread flour", 2)
    )
    query = embeddings.embed_query("bread flour")
    assert store.max_marginal_relevance_search_by_vector(query, 2, lambda_mult=0.1) == diverse
    assert await store.amax_marginal_relevance_search("bread flour", 2, lambda_mult=0.1) == diverse
    assert await store.amax_marginal_relevance_search_by_vector(query, 2, lambda_mult=0.1) == diverse
    assert len(store.max_marginal_relevance_search("bread", 3, fetch_k=1)) == 3
    assert store.max_marginal_relevance_search("bread", filter={"lang": "no such"}) == []


async def test_retrievers_of_every_search_type(store: GTEChroma) -> None:
    for search_type, expected in {
        "hybrid": store.hybrid_search("garbage", 2),
        "similarity": store.similarity_search("garbage", 2),
        "mmr": store.max_marginal_relevance_search("garbage", 2),
    }.items():
        retriever = store.as_retriever(search_type=search_type, search_kwargs={"k": 2})
        assert retriever.invoke("garbage") == expected
        assert await retriever.ainvoke("garbage") == expected
        assert len(retriever.invoke("garbage", k=1)) == len(await retriever.ainvoke("garbage", k=1)) == 1
    assert store.as_retriever().invoke("garbage") == store.similarity_search("garbage")
    threshold = {"score_threshold": 0.99}
    retriever = store.as_retriever(search_type="similarity_score_threshold", search_kwargs=threshold)
    assert retriever.invoke(DOCUMENTS[0].page_content) == [DOCUMENTS[0]]
    options = {"k": 3, "candidates": 4, "mode": "sparse", "fusion": "weighted", "filter": {"lang": "en"}}
    assert ids(store.as_retriever(search_type="hybrid", search_kwargs=options).invoke("flour")) == ["bread"]
    assert store.as_retriever().tags == ["GTEChroma", "GTEEmbeddings"]


def test_a_retriever_refuses_what_it_does_not_know(store: GTEChroma) -> None:
    with pytest.raises(ValueError, match="search_type of lexical not allowed"):
        store.as_retriever(search_type="lexical")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        store.as_retriever(k=3)
    with pytest.raises(TypeError, match="top_k"):
        store.as_retriever(search_kwargs={"top_k": 3}).invoke("wall")


def test_adding_again_replaces_text_and_all_metadata(store: GTEChroma) -> None:
    assert store.add_documents([Document("Rust is a colour.", id="rust", metadata={"kind": "chemistry"})]) == ["rust"]
    assert store.collection.count() == len(DOCUMENTS)
    assert store.get_by_ids(["rust"]) == [Document("Rust is a colour.", id="rust", metadata={"kind": "chemistry"})]
    store.update_document("rust", Document("Rust is iron oxide."))
    assert store.get_by_ids(["rust"]) == [Document("Rust is iron oxide.", id="rust")]


def test_texts_come_from_any_iterable_and_missing_ids_are_invented(store: GTEChroma) -> None:
    added = store.add_texts((text for text in ("one", "two", "three")), [{"n": 1}, None, {}], ["1", None, None])
    assert added[0] == "1"
    assert len(set(added)) == 3
    assert [document.page_content for document in store.get_by_ids(added)] == ["one", "two", "three"]
    assert store.add_texts([]) == []


def test_nothing_is_written_when_something_cannot_be(store: GTEChroma) -> None:
    for options, message in (
        ({"ids": ["a", "a"]}, "ids 'a' given more than once"),
        ({"ids": ["a"]}, "1 ids, 2 texts"),
        ({"metadatas": [{}]}, "2 ids, 2 texts and 1 metadatas"),
        ({"metadatas": [{}, {"x": {"y": 1}}]}, r"metadatas\[1\]\['x'\] is"),
    ):
        with pytest.raises(ValueError, match=message):
            store.add_texts(["one", "two"], **options)
    assert store.collection.count() == len(DOCUMENTS)


def test_scored_documents_can_be_stored_again(store: GTEChroma) -> None:
    retrieved = GTEHybridRetriever(collection=store.collection).invoke("wall")
    retrieved[0].metadata[RERANK_SCORE_KEY] = 3.5
    store.add_documents(retrieved)
    assert store.get_by_ids(["wall", "rust", "beijing", "bread"]) == DOCUMENTS


async def test_deleting_by_id_and_by_filter(store: GTEChroma) -> None:
    assert store.delete(["wall", "wall", "unknown"]) is True
    assert await store.adelete(where={"lang": "zh"}) is True
    assert set(ids(store.similarity_search("x"))) == {"rust", "bread"}
    assert store.delete([]) is True
    with pytest.raises(ValueError, match=r"delete needs ids or a filter; reset_collection\(\) deletes everything"):
        store.delete()
    store.reset_collection()
    assert store.collection.count() == 0
    assert store.add_texts(["new"], ids=["new"]) == ["new"]
    store.delete_collection()


async def test_getting_documents(store: GTEChroma) -> None:
    assert ids(store.get_by_ids(["rust", "missing", "wall", "rust"])) == ["rust", "wall"]
    assert await store.aget_by_ids(["rust"]) == [DOCUMENTS[1]]
    assert store.get_by_ids([]) == []
    found = store.get(["rust"])
    assert found["documents"] == [DOCUMENTS[1].page_content]
    assert found["metadatas"] == [DOCUMENTS[1].metadata]
    assert store.get(where={"lang": "zh"}, include=["embeddings"])["embeddings"].shape == (1, 384)
    assert len(store.get(limit=2, offset=1)["ids"]) == 2


async def test_async_work_does_not_block_the_event_loop(
    store: GTEChroma, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()

    def waiting(encode: Any) -> Any:
        def wait_for_the_loop(texts: list[str], **options: Any) -> Any:
            ticked = threading.Event()
            loop.call_soon_threadsafe(ticked.set)
            assert ticked.wait(timeout=20), "the event loop stood still"
            return encode(texts, **options)

        return wait_for_the_loop

    monkeypatch.setattr(encoder, "encode_queries", waiting(encoder.encode_queries))
    monkeypatch.setattr(encoder, "encode_documents", waiting(encoder.encode_documents))
    assert len(await store.ahybrid_search("wall")) == 4
    assert len(await store.asimilarity_search("wall")) == 4
    assert len(await store.amax_marginal_relevance_search("wall")) == 4
    assert await store.aadd_documents([Document("new", id="new")]) == ["new"]
    assert await store.aadd_texts(["newer"], ids=["newer"]) == ["newer"]
    more = await GTEChroma.afrom_texts(["one"], store.embeddings, client=store._client, collection_name="more")
    assert len(await more.as_retriever(search_type="hybrid").ainvoke("one")) == 1


# LangChain's indexing


def page(source: str, number: int, text: str) -> Document:
    return Document(text, metadata={"source": source, "number": number})


def contents(store: GTEChroma) -> set[str]:
    return {record.text for record in store.collection.get()}


@pytest.fixture
def records() -> InMemoryRecordManager:
    manager = InMemoryRecordManager(namespace="documents")
    manager.create_schema()
    return manager


@pytest.fixture
def empty(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> GTEChroma:
    return GTEChroma("pages", embeddings, client=chroma_client)


PAGES = [page("a", 1, "a one"), page("a", 2, "a two"), page("b", 1, "b one")]
CHANGED = [page("a", 1, "a one"), page("a", 2, "a two, changed")]


@pytest.mark.parametrize(
    ("cleanup", "deleted", "left"),
    [
        (None, 0, {"a one", "a two", "a two, changed", "b one"}),
        ("incremental", 1, {"a one", "a two, changed", "b one"}),
        ("full", 2, {"a one", "a two, changed"}),
        ("scoped_full", 1, {"a one", "a two, changed", "b one"}),
    ],
)
async def test_langchains_indexing_adds_skips_and_cleans_up(
    empty: GTEChroma, records: InMemoryRecordManager, cleanup: Any, deleted: int, left: set[str]
) -> None:
    options: dict[str, Any] = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}
    first = index(PAGES, records, empty, **options)
    assert first == {"num_added": 3, "num_updated": 0, "num_skipped": 0, "num_deleted": 0}
    assert contents(empty) == {"a one", "a two", "b one"}
    again = await aindex(PAGES, records, empty, **options)
    assert again == {"num_added": 0, "num_updated": 0, "num_skipped": 3, "num_deleted": 0}
    third = index(CHANGED, records, empty, **options)
    assert third == {"num_added": 1, "num_updated": 0, "num_skipped": 1, "num_deleted": deleted}
    assert contents(empty) == left


async def test_langchains_indexing_updates_by_force_and_empties(
    empty: GTEChroma, records: InMemoryRecordManager
) -> None:
    options: dict[str, Any] = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    await aindex(PAGES, records, empty, **options)
    forced = index(PAGES, records, empty, force_update=True, batch_size=2, **options)
    assert forced == {"num_added": 0, "num_updated": 3, "num_skipped": 0, "num_deleted": 0}
    assert index([], records, empty, **options)["num_deleted"] == 3
    assert contents(empty) == set()


# Opening


def test_a_persistent_store_is_found_again(tmp_path: Path, embeddings: GTEEmbeddings) -> None:
    folder = str(tmp_path)
    GTEChroma.from_documents(DOCUMENTS, embeddings, persist_directory=folder)
    again = GTEChroma(embedding_function=embeddings, persist_directory=folder, create_collection_if_not_exists=False)
    assert again.hybrid_search("flour", 1) == [DOCUMENTS[3]]


def test_a_store_on_a_server(chroma_server: tuple[str, int], embeddings: GTEEmbeddings) -> None:
    host, port = chroma_server
    store = GTEChroma.from_documents(DOCUMENTS, embeddings, collection_name="langchain-store", host=host, port=port)
    store.add_documents([Document("Rust is a colour.", id="rust")])
    again = GTEChroma("langchain-store", embeddings, host=host, port=port)
    assert again.hybrid_search("flour", 1, mode="union") == [DOCUMENTS[3]]
    assert again.get_by_ids(["rust"]) == [Document("Rust is a colour.", id="rust")]


def test_stores_in_memory_are_kept_apart_by_name(embeddings: GTEEmbeddings) -> None:
    name, other = f"one-{uuid4().hex}", f"two-{uuid4().hex}"
    store = GTEChroma.from_texts(["one"], embeddings, collection_name=name)
    try:
        assert GTEChroma(other, embeddings).collection.count() == 0
        assert GTEChroma(name, embeddings).collection.count() == 1
    finally:
        store.delete_collection()
        GTEChroma(other, embeddings).delete_collection()


def test_the_distance_may_be_said_and_must_be_the_cosine(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> None:
    options: dict[str, Any] = {"embedding_function": embeddings, "client": chroma_client}
    GTEChroma(collection_metadata={"hnsw:space": "cosine"}, **options)
    GTEChroma(collection_configuration={"hnsw": {"space": "cosine"}}, **options)
    with pytest.raises(ValueError, match=r"collection_metadata is {'hnsw:space': 'l2'}; only"):
        GTEChroma(collection_metadata={"hnsw:space": "l2"}, **options)
    with pytest.raises(ValueError, match=r"collection_configuration is {'spann': {}}; only"):
        GTEChroma(collection_configuration={"spann": {}}, **options)


def test_other_embeddings_are_refused(chroma_client: ClientAPI, encoder: GTEEncoder) -> None:
    with pytest.raises(TypeError, match="embedding_function is DeterministicFakeEmbedding; give a langchain_gte"):
        GTEChroma(embedding_function=DeterministicFakeEmbedding(size=6), client=chroma_client)
    with pytest.raises(TypeError, match="embedding_function is NoneType; give a langchain_gte"):
        GTEChroma(client=chroma_client)
    with pytest.raises(ValueError, match="gives 128 dimensions and its encoder 384"):
        GTEChroma(embedding_function=GTEEmbeddings(encoder=encoder, dimension=128), client=chroma_client)


def test_contradicting_places_are_refused(tmp_path: Path, chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> None:
    with pytest.raises(ValueError, match="client and persist_directory are given"):
        GTEChroma(embedding_function=embeddings, client=chroma_client, persist_directory=str(tmp_path))


def test_a_collection_that_must_exist(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> None:
    from chromadb.errors import NotFoundError

    with pytest.raises(NotFoundError):
        GTEChroma("missing", embeddings, client=chroma_client, create_collection_if_not_exists=False)


def test_bad_queries_are_refused(store: GTEChroma) -> None:
    with pytest.raises(ValueError, match="0 records asked for"):
        store.similarity_search("wall", 0)
    with pytest.raises(
        ValueError, match=r"the query vector has the shape \(3,\); this collection holds .* dimension 384"
    ):
        store.similarity_search_by_vector([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"the query vector has the length 0\.0"):
        store.similarity_search_by_vector([0.0] * 384)


# Collections of langchain_chroma


@pytest.fixture
def foreign(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> langchain_chroma.Chroma:
    """A store filled by langchain_chroma: distance l2, its default, and no sparse vectors."""
    return langchain_chroma.Chroma.from_documents(DOCUMENTS, embeddings, client=chroma_client)


def raw(store: langchain_chroma.Chroma) -> Any:
    return store._collection


async def test_hybrid_retrieval_over_somebody_elses_collection(
    foreign: langchain_chroma.Chroma, store_hits: list[tuple[str, float]]
) -> None:
    before = raw(foreign).get(include=["documents", "metadatas", "embeddings"])
    retriever = GTEHybridRetriever.from_chroma(foreign, k=4)
    found = retriever.invoke("garbage collector")
    assert [document.id for document in found] == [name for name, _ in store_hits]
    assert [document.metadata["gte_score"] for document in found] == pytest.approx(
        [score for _, score in store_hits], abs=1e-3
    )
    assert await retriever.ainvoke("garbage collector") == found
    after = raw(foreign).get(include=["documents", "metadatas", "embeddings"])
    assert after["metadatas"] == before["metadatas"]  # nothing was written
    assert np.array_equal(after["embeddings"], before["embeddings"])


@pytest.fixture
def store_hits(chroma_client: ClientAPI, embeddings: GTEEmbeddings) -> list[tuple[str, float]]:
    """What a store of our own finds in the same documents."""
    own = GTEChroma.from_documents(DOCUMENTS, embeddings, client=chroma_client, collection_name="own")
    return [(hit.id, hit.score) for hit in HybridRetriever(own.collection, k=4).search("garbage collector")]


def test_sparse_values_are_stored_when_asked_for(
    foreign: langchain_chroma.Chroma, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = GTEHybridRetriever.from_chroma(foreign, backfill=True, mode="union", k=1)
    stored = raw(foreign).get(include=["documents", "metadatas"])
    assert stored["documents"] == [document.page_content for document in DOCUMENTS]
    for metadata, document in zip(stored["metadatas"], DOCUMENTS, strict=True):
        assert metadata.pop(RESERVED_KEY).startswith("2:")
        assert metadata == document.metadata
    monkeypatch.setattr(encoder, "encode_documents", None)  # not needed any more
    assert ids(retriever.invoke("flour")) == ["bread"]
    monkeypatch.undo()
    foreign.add_texts(["Flour is ground wheat."], ids=["flour"])
    assert set(ids(retriever.invoke("flour", k=2))) == {"bread", "flour"}
    assert ids(GTEHybridRetriever.from_chroma(foreign, backfill=True, k=1).invoke("wheat")) == ["flour"]


def test_the_encoder_may_be_passed(
    foreign: langchain_chroma.Chroma, chroma_client: ClientAPI, encoder: GTEEncoder
) -> None:
    without = langchain_chroma.Chroma(client=chroma_client)
    with pytest.raises(TypeError, match="the store's embeddings are NoneType, which give no sparse vectors"):
        GTEHybridRetriever.from_chroma(without)
    assert ids(GTEHybridRetriever.from_chroma(without, encoder=encoder, k=1).invoke("flour")) == ["bread"]


def test_another_models_collection_is_refused(chroma_client: ClientAPI, encoder: GTEEncoder) -> None:
    def filled(size: int) -> Any:
        fake = DeterministicFakeEmbedding(size=size)
        return langchain_chroma.Chroma.from_documents(
            DOCUMENTS,
            fake,
            client=chroma_client,
            collection_name=f"fake-{size}",
            collection_configuration={"hnsw": {"space": "cosine"}},
        )

    with pytest.raises(CollectionMismatchError, match="was filled by another model than"):
        GTEHybridRetriever.from_chroma(filled(384), encoder=encoder)
    with pytest.raises(CollectionMismatchError, match="holds vectors of dimension 6"):
        GTEHybridRetriever.from_chroma(filled(6), encoder=encoder)
    with pytest.raises(TypeError, match=r"store is str; give a langchain_chroma\.Chroma"):
        GTEHybridRetriever.from_chroma("collection")  # type: ignore[arg-type]


def test_an_attached_embedding_function_is_not_built_to_search(
    chroma_client: ClientAPI, embeddings: GTEEmbeddings
) -> None:
    built: list[str] = []

    @register_embedding_function
    class Attached(EmbeddingFunction[Any]):
        def __init__(self) -> None:
            built.append("built")

        def __call__(self, input: Any) -> Any:
            raise AssertionError("the attached function must not embed anything")

        @staticmethod
        def name() -> str:
            return "gte-rag-test-attached"

        def get_config(self) -> dict[str, Any]:
            return {}

        @staticmethod
        def build_from_config(config: dict[str, Any]) -> Any:
            return Attached()

    chroma_client.create_collection("attached", embedding_function=Attached())
    attached = langchain_chroma.Chroma.from_documents(
        DOCUMENTS, embeddings, client=chroma_client, collection_name="attached"
    )
    built.clear()
    assert ids(GTEHybridRetriever.from_chroma(attached, k=1, mode="union").invoke("flour")) == ["bread"]
    assert built == []
    assert ids(GTEHybridRetriever.from_chroma(attached, backfill=True, k=1).invoke("flour")) == ["bread"]


def test_gte_chroma_takes_over_a_collection_of_langchain_chroma(
    foreign: langchain_chroma.Chroma, chroma_client: ClientAPI, embeddings: GTEEmbeddings
) -> None:
    with pytest.raises(CollectionMismatchError, match="uses the distance 'l2'"):
        GTEChroma(embedding_function=embeddings, client=chroma_client)
    store = GTEChroma(embedding_function=embeddings, client=chroma_client, adopt=True)
    assert store.hybrid_search("flour", 1) == [DOCUMENTS[3]]
    ((nearest, distance),) = store.similarity_search_with_score(DOCUMENTS[3].page_content, 1)
    assert nearest == DOCUMENTS[3]
    assert distance == pytest.approx(0, abs=1e-5)
    store.add_documents([Document("Rust is a colour.", id="rust")])
    assert foreign.get_by_ids(["rust"])[0].page_content == "Rust is a colour."
