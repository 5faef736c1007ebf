"""GTEChromaVectorStore for LlamaIndex: modes, filters, nodes in and out, indexes, foreign collections, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

pytest.importorskip("chromadb")
pytest.importorskip("llama_index.core")

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import IndexNode, MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode

from gte_rag import CollectionMismatchError, GTEEncoder, HybridRetriever
from llama_index.embeddings.gte import GTEEmbedding
from llama_index.retrievers.gte import GTEHybridRetriever
from llama_index.vector_stores.gte import GTEChromaVectorStore
from stub_encoder import StubEncoder

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytestmark = pytest.mark.usefixtures("bundled_once")

MODES = VectorStoreQueryMode
NODES = [
    TextNode(text="The Great Wall of China is visible from afar.", id_="wall", metadata={"lang": "en", "year": 2020}),
    TextNode(text="Rust frees memory without a garbage collector.", id_="rust", metadata={"lang": "en", "year": 2021}),
    TextNode(text="北京是中国的首都。", id_="beijing", metadata={"lang": "zh", "year": 2022}),
    TextNode(
        text="Bread is made of flour, water and salt.",
        id_="bread",
        metadata={"lang": "en", "year": 2023, "tags": ["food", "home"]},
    ),
]


@pytest.fixture(scope="module")
def embed_model(encoder: GTEEncoder) -> GTEEmbedding:
    return GTEEmbedding(encoder=encoder)


@pytest.fixture
def empty(chroma_client: ClientAPI, encoder: GTEEncoder) -> GTEChromaVectorStore:
    return GTEChromaVectorStore("nodes", chroma_client=chroma_client, encoder=encoder)


@pytest.fixture
def store(empty: GTEChromaVectorStore) -> GTEChromaVectorStore:
    assert empty.add(NODES) == [node.node_id for node in NODES]
    return empty


def asked(text: str, mode: VectorStoreQueryMode = MODES.DEFAULT, **options: Any) -> VectorStoreQuery:
    return VectorStoreQuery(query_str=text, mode=mode, **{"similarity_top_k": 4, **options})


def scored(store: GTEChromaVectorStore, query: VectorStoreQuery, **options: Any) -> dict[str, float]:
    result = store.query(query, **options)
    assert result.nodes is not None
    assert result.similarities is not None
    assert [node.node_id for node in result.nodes] == result.ids
    return dict(zip(result.ids, result.similarities, strict=True))


def exact(store: GTEChromaVectorStore, text: str) -> dict[str, tuple[float, float]]:
    """Both scores of every node."""
    hits = HybridRetriever(store.collection, mode="union").search(text, k=100)
    return {hit.id: (hit.dense_score, hit.sparse_score) for hit in hits}


# Query modes


def test_default_mode_is_dense_search(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    cosines = {name: dense for name, (dense, _) in exact(store, "walls").items()}
    expected = dict(sorted(cosines.items(), key=lambda item: -item[1]))
    assert scored(store, asked("walls")) == pytest.approx(expected, abs=1e-5)
    assert list(scored(store, asked("walls", similarity_top_k=2))) == list(expected)[:2]
    vector = embed_model.get_query_embedding("walls")
    by_embedding = scored(store, VectorStoreQuery(query_embedding=vector, similarity_top_k=4))
    assert by_embedding == pytest.approx(expected, abs=1e-5)


def test_the_querys_embedding_comes_before_its_text(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    embedding = [3 * value for value in embed_model.get_query_embedding("Bread is made of flour, water and salt.")]
    assert next(iter(scored(store, asked("garbage collector", query_embedding=embedding)))) == "bread"
    found = scored(store, asked("garbage collector", MODES.HYBRID, query_embedding=embedding, alpha=0.5))
    assert set(list(found)[:2]) == {"bread", "rust"}


@pytest.mark.parametrize("mode", [MODES.SPARSE, MODES.TEXT_SEARCH])
def test_sparse_mode_is_exact_search_by_words(store: GTEChromaVectorStore, mode: VectorStoreQueryMode) -> None:
    expected = {name: sparse for name, (_, sparse) in exact(store, "made of flour").items() if sparse > 0}
    expected = dict(sorted(expected.items(), key=lambda item: -item[1]))
    assert scored(store, asked("made of flour", mode)) == pytest.approx(expected, rel=1e-5)
    assert next(iter(expected)) == "bread"
    assert len(expected) > 1
    assert list(scored(store, asked("made of flour", mode, sparse_top_k=1))) == ["bread"]
    assert list(scored(store, asked("made of flour", mode, similarity_top_k=1))) == ["bread"]
    assert scored(store, asked("qqqqq zzzzz", mode, filters=where(ENGLISH))).keys() <= {"wall", "rust", "bread"}


def test_alpha_weighs_the_two_sides(store: GTEChromaVectorStore) -> None:
    query = "the wall is made of flour"
    dense, sparse = (
        dict(sorted(((name, scores[side]) for name, scores in exact(store, query).items()), key=lambda item: -item[1]))
        for side in (0, 1)
    )
    assert list(scored(store, asked(query, MODES.HYBRID, alpha=1))) == list(dense)
    only_sparse = list(scored(store, asked(query, MODES.HYBRID, alpha=0)))
    assert only_sparse == list(scored(store, asked(query, MODES.SPARSE)))
    assert only_sparse == [name for name, score in sparse.items() if score > 0]

    def stretched(scores: dict[str, float], name: str) -> float:
        of = [score for score in scores.values() if score > 0 or scores is dense]
        return 0 if scores[name] == 0 else (scores[name] - min(of)) / (max(of) - min(of))

    for alpha in (0.3, 0.5, None):
        weight = 0.5 if alpha is None else alpha
        expected = {name: weight * stretched(dense, name) + (1 - weight) * stretched(sparse, name) for name in dense}
        assert scored(store, asked(query, MODES.HYBRID, alpha=alpha)) == pytest.approx(expected, abs=1e-4)


def test_hybrid_mode_takes_as_many_from_each_side_as_it_is_told(
    store: GTEChromaVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    nearest, lexical_index = store.collection.nearest, store.collection.lexical_index

    def dense_side(vectors: Any, n: int, **filters: Any) -> Any:
        taken.append(n)
        return nearest(vectors, n, **filters)

    class SparseSide:
        def search(self, query: Any, k: int, **filters: Any) -> Any:
            taken.append(k)
            return lexical_index().search(query, k, **filters)

    monkeypatch.setattr(store.collection, "nearest", dense_side)
    monkeypatch.setattr(store.collection, "lexical_index", SparseSide)
    for options, sides, returned in (
        ({"similarity_top_k": 2}, [100, 100], 2),
        ({"similarity_top_k": 2, "hybrid_top_k": 3}, [2, 2], 2),
        ({"similarity_top_k": 1, "sparse_top_k": 2, "hybrid_top_k": 1}, [1, 2], 1),
        ({"similarity_top_k": 3, "sparse_top_k": 1}, [100, 1], 3),
        ({"similarity_top_k": 200}, [200, 200], 4),
    ):
        taken.clear()
        found = scored(store, asked("Great flour", MODES.HYBRID, **options))
        assert (taken, len(found)) == (sides, returned)


def test_hybrid_mode_finds_what_only_the_words_give_away(chroma_client: ClientAPI) -> None:
    store = GTEChromaVectorStore(
        "words", chroma_client=chroma_client, encoder=cast(GTEEncoder, StubEncoder(dimension=4)), candidates=1
    )
    store.add([TextNode(text="other words", id_="near"), TextNode(text="rare " + "padding " * 30, id_="far")])
    embedding = cast(StubEncoder, store.encoder).dense("other words").tolist()
    query = asked("rare", MODES.HYBRID, query_embedding=embedding)
    assert set(scored(store, query)) == {"near", "far"}


def test_the_fusion_may_be_another_one(chroma_client: ClientAPI, encoder: GTEEncoder) -> None:
    for fusion in ("weighted", "reciprocal_rank", "distribution_based", "calibrated"):
        store = GTEChromaVectorStore("nodes", chroma_client=chroma_client, encoder=encoder, fusion=fusion)
        store.add(NODES)
        if fusion == "calibrated":
            with pytest.raises(ValueError, match="needs a calibration"):
                store.query(asked("flour", MODES.HYBRID))
            HybridRetriever(store.collection).calibrate()
        found = scored(store, asked("flour", MODES.HYBRID))
        assert next(iter(found)) == "bread"
        if fusion == "weighted":
            dense, sparse = exact(store, "flour")["bread"]
            assert found["bread"] == pytest.approx((dense + sparse) / 2, rel=1e-4)


def test_mmr_mode_avoids_what_it_has_already(store: GTEChromaVectorStore) -> None:
    store.add([TextNode(text="Bread is made of flour, water and salt!", id_="again", metadata=NODES[3].metadata)])
    both = {"bread", "again"}
    assert set(scored(store, asked("bread flour", similarity_top_k=2))) == both
    query = asked("bread flour", MODES.MMR, similarity_top_k=2)
    diverse = scored(store, query, mmr_threshold=0.1)
    assert len(both & set(diverse)) == 1
    assert diverse == scored(store, asked("bread flour", MODES.MMR, similarity_top_k=2, mmr_threshold=0.1))
    cosines = scored(store, asked("bread flour", similarity_top_k=5))
    assert diverse == pytest.approx({name: cosines[name] for name in diverse}, abs=1e-5)
    assert set(scored(store, query, mmr_threshold=1)) == both
    assert set(scored(store, query, mmr_threshold=0.1, mmr_prefetch_k=2)) == both
    assert scored(store, asked("bread", MODES.MMR, filters=where(MetadataFilter(key="lang", value="no")))) == {}


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (
            asked("x", MODES.SEMANTIC_HYBRID),
            {},
            "query mode SEMANTIC_HYBRID is not available; accepted here: DEFAULT, SP",
        ),
        (asked("x", MODES.SVM), {}, "query mode SVM is not available"),
        (VectorStoreQuery(), {}, "a query in mode DEFAULT needs its text; set query_str"),
        (VectorStoreQuery(mode=MODES.SPARSE), {}, "a query in mode SPARSE needs its text; set query_str"),
        (VectorStoreQuery([1.0] * 256, mode=MODES.HYBRID), {}, "a query in mode HYBRID needs its text; set query_str"),
        (VectorStoreQuery([1.0, 0.0]), {}, r"the query vector has the shape \(2,\)"),
        (asked("x", MODES.HYBRID, alpha=1.5), {}, r"alpha is 1\.5; give 0 \(only sparse\) to 1"),
        (asked("x", MODES.HYBRID, sparse_top_k=0), {}, "sparse_top_k is 0; it must be at least 1"),
        (asked("x", similarity_top_k=0), {}, "0 records asked for; it must be at least 1"),
        (asked("x", MODES.MMR), {"mmr_threshold": 2}, "mmr_threshold is 2; give 0"),
        (asked("x", filters=MetadataFilters(filters=[])), {"where": {"a": 1}}, "filters and where are both given"),
    ],
)
def test_bad_queries_are_refused(
    store: GTEChromaVectorStore, query: VectorStoreQuery, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.query(query, **options)


async def test_async_twins_do_the_same_and_do_not_block_the_event_loop(
    empty: GTEChromaVectorStore, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
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
    assert await empty.async_add(NODES) == ["wall", "rust", "beijing", "bread"]
    for mode in (MODES.DEFAULT, MODES.SPARSE, MODES.HYBRID, MODES.MMR):
        result = await empty.aquery(asked("flour", mode), where={"lang": "en"})
        assert result.ids is not None
        assert result.ids[0] == "bread"
    assert await empty.aget_nodes(["rust"]) == [NODES[1]]
    await empty.adelete_nodes(["rust"])
    await empty.adelete("no such document")
    assert len(await empty.aget_nodes()) == 3
    await empty.aclear()
    assert await empty.aget_nodes() == []


# Filters


def where(*filters: MetadataFilter | MetadataFilters, condition: FilterCondition | None = None) -> MetadataFilters:
    return MetadataFilters(filters=list(filters), condition=condition)


def given(key: str, operator: FilterOperator, value: Any) -> MetadataFilter:
    return MetadataFilter(key=key, operator=operator, value=value)


ENGLISH = MetadataFilter(key="lang", value="en")
CHINESE = MetadataFilter(key="lang", value="zh")
FOOD = given("tags", FilterOperator.CONTAINS, "food")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where(), {"wall", "rust", "beijing", "bread"}),
        (where(ENGLISH), {"wall", "rust", "bread"}),
        (where(given("year", FilterOperator.NE, 2020)), {"rust", "beijing", "bread"}),
        (where(given("year", FilterOperator.GT, 2021), ENGLISH), {"bread"}),
        (where(given("year", FilterOperator.GTE, 2022)), {"beijing", "bread"}),
        (where(given("year", FilterOperator.LT, 2021)), {"wall"}),
        (where(given("year", FilterOperator.LTE, 2021)), {"wall", "rust"}),
        (where(given("year", FilterOperator.IN, [2020, 2022])), {"wall", "beijing"}),
        (where(given("year", FilterOperator.NIN, [2020, 2022])), {"rust", "bread"}),
        (where(FOOD), {"bread"}),
        (where(given("tags", FilterOperator.ANY, ["food", "toys"])), {"bread"}),
        (where(given("tags", FilterOperator.ANY, ["food"])), {"bread"}),
        (where(given("tags", FilterOperator.ALL, ["food", "home"])), {"bread"}),
        (where(given("tags", FilterOperator.ALL, ["food", "toys"])), set()),
        (where(CHINESE, FOOD, condition=FilterCondition.OR), {"beijing", "bread"}),
        (where(where(ENGLISH, where(FOOD)), where(CHINESE), condition=FilterCondition.OR), {"beijing", "bread"}),
    ],
)
def test_filters_hold_everywhere(store: GTEChromaVectorStore, filters: MetadataFilters, expected: set[str]) -> None:
    assert {node.node_id for node in store.get_nodes(filters=filters)} == expected
    for mode in (MODES.DEFAULT, MODES.HYBRID, MODES.MMR):
        assert set(scored(store, asked("flour wall", mode, filters=filters))) == expected
    assert set(scored(store, asked("flour wall", MODES.SPARSE, filters=filters))) <= expected


def test_documents_and_texts_restrict_a_query(store: GTEChromaVectorStore) -> None:
    of = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    store.add([TextNode(text="a wall of books", id_="page", relationships=of)])
    assert list(scored(store, asked("wall", doc_ids=["book", "other"]))) == ["page"]
    assert list(scored(store, asked("wall", MODES.HYBRID, doc_ids=["book"], filters=where(ENGLISH)))) == []
    for mode in (MODES.DEFAULT, MODES.SPARSE, MODES.HYBRID, MODES.MMR):
        assert list(scored(store, asked("of flour", mode), where_document={"$contains": "flour"})) == ["bread"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (
            where(given("lang", FilterOperator.TEXT_MATCH, "e")),
            "filter on 'lang' uses TEXT_MATCH; accepted here: EQ, NE",
        ),
        (where(given("lang", FilterOperator.IS_EMPTY, None)), "filter on 'lang' uses IS_EMPTY; accepted here: EQ, NE"),
        (where(ENGLISH, condition=FilterCondition.NOT), "filter condition NOT is not known to Chroma"),
        (where(given("year", FilterOperator.IN, [])), "uses IN with the value .*; give a non-empty list"),
        (where(given("tags", FilterOperator.ANY, "food")), "uses ANY with the value 'food'; give a non-empty list"),
        (where(given("year", FilterOperator.EQ, None)), "uses EQ with the value None; give one string or number"),
        (where(given("year", FilterOperator.GT, [1])), r"uses GT with the value \[1\]; give one string or number"),
    ],
)
def test_what_chroma_cannot_express_is_refused_by_name(
    store: GTEChromaVectorStore, filters: MetadataFilters, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.query(asked("wall", filters=filters))
    with pytest.raises(ValueError, match=message):
        store.delete_nodes(filters=filters)


# Nodes


def test_a_node_comes_back_as_it_was_given(empty: GTEChromaVectorStore) -> None:
    node = TextNode(
        text="a wall",
        id_="n",
        metadata={"nested": {"a": [1, {"b": None}]}, "tags": ["x", "y"], "none": None},
        excluded_embed_metadata_keys=["nested"],
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="document", metadata={"author": "Li"}),
            NodeRelationship.PREVIOUS: RelatedNodeInfo(node_id="before"),
            NodeRelationship.NEXT: RelatedNodeInfo(node_id="after"),
            NodeRelationship.CHILD: [RelatedNodeInfo(node_id="child")],
        },
        start_char_idx=3,
        end_char_idx=9,
    )
    empty.add([node])
    for mode in (MODES.DEFAULT, MODES.SPARSE, MODES.HYBRID, MODES.MMR):
        result = empty.query(asked("wall", mode))
        assert result.nodes == [node]
        assert result.nodes[0].hash == node.hash
    assert empty.get_nodes(["n"]) == [node]


def test_a_node_is_encoded_as_llama_index_embeds_it(empty: GTEChromaVectorStore, encoder: GTEEncoder) -> None:
    node = TextNode(
        text="a wall",
        id_="n",
        metadata={"title": "garbage", "path": "/secret"},
        excluded_embed_metadata_keys=["path"],
    )
    text = node.get_content(MetadataMode.EMBED)
    assert text == "title: garbage\n\na wall"
    empty.add([node])
    (record,) = empty.collection.get(["n"])
    assert record.text == "a wall"
    expected = encoder.encode_documents([text])
    assert expected.dense is not None
    stored = empty.client.get(["n"], include=["embeddings"])["embeddings"]
    assert np.allclose(stored, expected.dense, atol=1e-5)
    assert list(scored(empty, asked("garbage", MODES.SPARSE))) == ["n"]
    assert list(scored(empty, asked("secret", MODES.SPARSE))) == []


def test_adding_a_node_again_replaces_it(store: GTEChromaVectorStore) -> None:
    store.add([TextNode(text="Rust is a colour.", id_="rust")])
    assert store.get_nodes(["rust"]) == [TextNode(text="Rust is a colour.", id_="rust")]
    assert len(store.get_nodes()) == len(NODES)
    assert store.add([]) == []


def test_more_nodes_than_chroma_takes_at_once(chroma_client: ClientAPI) -> None:
    number = chroma_client.get_max_batch_size() + 50
    store = GTEChromaVectorStore("many", chroma_client=chroma_client, encoder=cast(GTEEncoder, StubEncoder()))
    assert len(store.add([TextNode(text=f"number{n}", id_=str(n)) for n in range(number)])) == number
    assert store.collection.count() == number
    assert list(scored(store, asked(f"number{number - 1}", MODES.SPARSE))) == [str(number - 1)]
    store.clear()
    assert store.collection.count() == 0


def test_getting_and_deleting_nodes(store: GTEChromaVectorStore) -> None:
    assert [node.node_id for node in store.get_nodes(["rust", "missing", "wall", "rust"])] == ["rust", "wall"]
    assert [node.node_id for node in store.get_nodes(["rust", "beijing"], where(CHINESE))] == ["beijing"]
    assert store.get_nodes([]) == []
    store.delete_nodes(["rust", "beijing"], where(CHINESE))
    store.delete_nodes(["wall", "wall", "missing"])
    store.delete_nodes([])
    assert {node.node_id for node in store.get_nodes()} == {"rust", "bread"}
    store.delete_nodes(filters=where(FOOD))
    assert {node.node_id for node in store.get_nodes()} == {"rust"}
    with pytest.raises(ValueError, match=r"delete_nodes needs ids or a filter; clear\(\) deletes everything"):
        store.delete_nodes()
    store.clear()
    store.clear()
    assert store.get_nodes() == []


# Through an index


def index_of(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> VectorStoreIndex:
    return VectorStoreIndex.from_vector_store(store, embed_model=embed_model)


def test_an_index_is_built_from_documents_and_answers(empty: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    documents = [Document(text=node.get_content(), id_=node.node_id, metadata=node.metadata) for node in NODES]
    index = VectorStoreIndex.from_documents(
        documents, storage_context=StorageContext.from_defaults(vector_store=empty), embed_model=embed_model
    )
    for mode, options in (
        ("default", {}),
        ("sparse", {}),
        ("text_search", {}),
        ("hybrid", {"alpha": 0.6, "sparse_top_k": 3, "hybrid_top_k": 1}),
        ("mmr", {"vector_store_kwargs": {"mmr_threshold": 0.9}}),
    ):
        engine = index.as_query_engine(
            llm=MockLLM(), vector_store_query_mode=mode, similarity_top_k=1, filters=where(ENGLISH), **options
        )
        response = engine.query("What is bread made of?")
        assert [source.node.ref_doc_id for source in response.source_nodes] == ["bread"]
        assert NODES[3].get_content() in str(response)  # the mock repeats its prompt
    index.delete_ref_doc("bread")
    index.insert(Document(text="Cheese is made of milk.", id_="cheese"))
    retriever = index.as_retriever(vector_store_query_mode="hybrid", similarity_top_k=9)
    assert {found.node.ref_doc_id for found in retriever.retrieve("bread")} == {"wall", "rust", "beijing", "cheese"}


async def test_an_index_works_asynchronously(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    index = index_of(store, embed_model)
    await index.ainsert_nodes([TextNode(text="Cheese is made of milk.", id_="cheese")])
    retriever = index.as_retriever(vector_store_query_mode="hybrid", similarity_top_k=1)
    assert [found.node.node_id for found in await retriever.aretrieve("milk")] == ["cheese"]
    await index.adelete_nodes(["cheese"])
    assert [found.node.node_id for found in await retriever.aretrieve("flour")] == ["bread"]


def test_index_nodes_do_not_hide_the_other_nodes(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    index = index_of(store, embed_model)
    index.insert_nodes([IndexNode(text="See the chapter on walls.", id_="see", index_id="walls")])
    for mode in ("default", "hybrid"):
        retriever = index.as_retriever(vector_store_query_mode=mode, similarity_top_k=9)
        found = {result.node.node_id: result.node for result in retriever.retrieve("wall")}
        assert found.keys() == {"wall", "rust", "beijing", "bread", "see"}
        assert isinstance(found["see"], IndexNode)
        assert found["see"].index_id == "walls"


def test_hypothetical_documents_are_searched_for(store: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    class Imagining(MockLLM):
        def predict(self, *args: Any, **options: Any) -> str:
            return "Bread is made of flour, water and salt."

    bundle = HyDEQueryTransform(llm=Imagining(max_tokens=None), include_original=False)("What is in a roll?")
    (best,) = index_of(store, embed_model).as_retriever(similarity_top_k=1).retrieve(bundle)
    assert best.node.node_id == "bread"


def test_a_pipeline_replaces_changed_documents(empty: GTEChromaVectorStore, embed_model: GTEEmbedding) -> None:
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=40, chunk_overlap=0), embed_model],
        vector_store=empty,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
    )
    pipeline.run(documents=[Document(text="Walls are built. " * 40, id_="walls"), Document(text="Bread.", id_="bread")])
    before = empty.get_nodes()
    assert len(before) > 3
    pipeline.run(documents=[Document(text="Walls are torn down.", id_="walls"), Document(text="Bread.", id_="bread")])
    assert {node.get_content() for node in empty.get_nodes()} == {"Walls are torn down.", "Bread."}


def test_another_models_embeddings_are_refused(empty: GTEChromaVectorStore) -> None:
    for dimension, message in (
        (384, r"has an embedding that 'gte-mini', .* the cosine is"),
        (8, "of dimension 8; this"),
    ):
        index = VectorStoreIndex.from_vector_store(empty, embed_model=MockEmbedding(dimension))
        with pytest.raises(ValueError, match=message):
            index.insert_nodes(NODES)
    assert empty.get_nodes() == []


def test_the_hybrid_retriever_reads_the_stores_nodes(store: GTEChromaVectorStore) -> None:
    (best,) = GTEHybridRetriever(store.collection, similarity_top_k=1).retrieve("flour")
    assert best.node == NODES[3]


# Opening


def test_a_persistent_store_is_found_again(tmp_path: Path, encoder: GTEEncoder, embed_model: GTEEmbedding) -> None:
    database, storage = str(tmp_path / "db"), str(tmp_path / "storage")
    store = GTEChromaVectorStore(persist_dir=database, encoder=encoder)
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex(NODES, storage_context=context, embed_model=embed_model)
    index.storage_context.persist(storage)

    again = GTEChromaVectorStore(persist_dir=database, encoder=encoder)
    assert again.get_nodes() == NODES
    loaded = load_index_from_storage(
        StorageContext.from_defaults(vector_store=again, persist_dir=storage), embed_model=embed_model
    )
    (best,) = loaded.as_retriever(vector_store_query_mode="hybrid", similarity_top_k=1).retrieve("flour")
    assert best.node == NODES[3]


def test_a_store_survives_serialisation_and_pickling(tmp_path: Path, encoder: GTEEncoder) -> None:
    import pickle

    store = GTEChromaVectorStore(persist_dir=str(tmp_path), encoder=encoder, candidates=7, fusion="weighted")
    store.add(NODES)
    for copy in (
        GTEChromaVectorStore.from_dict(json.loads(store.to_json())),
        pickle.loads(pickle.dumps(store)),
    ):
        assert copy.to_dict() == store.to_dict()
        assert (copy.candidates, copy.fusion, copy.class_name()) == (7, "weighted", "GTEChromaVectorStore")
        assert copy.get_nodes() == NODES


def test_a_store_on_a_server_can_be_pickled_too(chroma_server: tuple[str, int], encoder: GTEEncoder) -> None:
    import pickle

    host, port = chroma_server
    store = GTEChromaVectorStore("llama-store", host=host, port=port, encoder=encoder)
    store.add(NODES)
    copy = pickle.loads(pickle.dumps(store))
    assert list(scored(copy, asked("flour", MODES.HYBRID, similarity_top_k=1))) == ["bread"]
    copy.delete_nodes(["bread"])
    assert "bread" not in scored(store, asked("flour", MODES.HYBRID))


def test_a_store_that_only_this_process_knows_cannot_be_pickled(store: GTEChromaVectorStore) -> None:
    import pickle

    with pytest.raises(
        TypeError, match="the store of 'nodes' cannot be pickled, because its database is known to this"
    ):
        pickle.dumps(store)


def test_bad_options_are_refused(chroma_client: ClientAPI, encoder: GTEEncoder, tmp_path: Path) -> None:
    for options, message in (
        ({"persist_dir": str(tmp_path)}, "chroma_client and persist_dir are given"),
        ({"fusion": "sum"}, "fusion is 'sum'; available: "),
        ({"candidates": 0}, "candidates is 0; it must be at least 1"),
        ({"dimension": 128}, "encoder is given beside model_name or dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            GTEChromaVectorStore("nodes", chroma_client=chroma_client, encoder=encoder, **options)
    with pytest.raises(TypeError, match="unknown options: top_k"):
        GTEChromaVectorStore("nodes", chroma_client=chroma_client, encoder=encoder, top_k=3)


def test_a_collection_of_llama_indexs_own_store_is_taken_over(
    chroma_client: ClientAPI, encoder: GTEEncoder, embed_model: GTEEmbedding
) -> None:
    chroma = pytest.importorskip("llama_index.vector_stores.chroma")
    flat = [node.model_copy(update={"metadata": {"lang": node.metadata["lang"], "title": "x" * 50}}) for node in NODES]
    foreign = chroma.ChromaVectorStore(chroma_collection=chroma_client.create_collection("theirs"))
    VectorStoreIndex(flat, storage_context=StorageContext.from_defaults(vector_store=foreign), embed_model=embed_model)

    with pytest.raises(CollectionMismatchError, match="uses the distance 'l2'"):
        GTEChromaVectorStore("theirs", chroma_client=chroma_client, encoder=encoder)
    store = GTEChromaVectorStore("theirs", chroma_client=chroma_client, encoder=encoder, adopt=True)
    for _ in range(2):
        for mode in (MODES.DEFAULT, MODES.SPARSE, MODES.HYBRID, MODES.MMR):
            assert next(iter(scored(store, asked("flour and salt", mode)))) == "bread"
        assert set(scored(store, asked("flour", MODES.HYBRID, filters=where(CHINESE)))) == {"beijing"}
        assert store.get_nodes(["bread"])[0].metadata == flat[3].metadata
        store.collection.backfill()
    foreign.delete("None")  # nodes without a document, to LlamaIndex
    assert store.get_nodes() == []
