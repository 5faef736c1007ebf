"""GTEHybridRetriever for LlamaIndex: nodes in and out, filters, engines, foreign records, and what it refuses."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("chromadb")
pytest.importorskip("llama_index.core")

from llama_index.core import Document
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import IndexNode, MetadataMode, NodeRelationship, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from gte_rag import GTEEncoder
from gte_rag.chroma import HybridCollection
from gte_rag.retriever import HybridRetriever
from llama_index.retrievers.gte import GTEHybridRetriever

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytestmark = pytest.mark.usefixtures("bundled_once")

NODES = [
    TextNode(text="The Great Wall of China is visible from afar.", id_="wall", metadata={"lang": "en", "year": 2020}),
    TextNode(text="Rust frees memory without a garbage collector.", id_="rust", metadata={"lang": "en", "year": 2021}),
    TextNode(text="北京是中国的首都。", id_="beijing", metadata={"lang": "zh", "year": 2022}),
    TextNode(text="Bread is made of flour, water and salt.", id_="bread", metadata={"lang": "en", "year": 2023}),
]


@pytest.fixture
def empty(chroma_client: ClientAPI, encoder: GTEEncoder) -> Iterator[HybridCollection]:
    collection = HybridCollection(chroma_client, "nodes", encoder=encoder)
    yield collection
    # Lists in metadata outlive a dropped collection and turn up in later records (chroma-core/chroma#7594).
    if left := [record.id for record in collection.get()]:
        collection.delete(left)


@pytest.fixture
def collection(empty: HybridCollection) -> HybridCollection:
    GTEHybridRetriever(empty).add_nodes(NODES)
    return empty


def ids(retriever: GTEHybridRetriever, query: str = "China") -> list[str]:
    return [result.node.node_id for result in retriever.retrieve(query)]


def test_nodes_come_back_with_the_fused_score(collection: HybridCollection) -> None:
    results = GTEHybridRetriever(collection, similarity_top_k=4).retrieve("garbage collector")
    hits = HybridRetriever(collection).search("garbage collector", k=4)
    assert [(result.node.node_id, result.score) for result in results] == [(hit.id, hit.score) for hit in hits]
    assert results[0].node == NODES[1]
    assert results[0].node.hash == NODES[1].hash


async def test_async_results_are_the_same(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection, similarity_top_k=4)
    assert await retriever.aretrieve("China") == retriever.retrieve(QueryBundle("China"))


async def test_searching_does_not_block_the_event_loop(
    collection: HybridCollection, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    encode_queries = encoder.encode_queries

    def wait_for_the_loop(texts: list[str], **options: Any) -> Any:
        ticked = threading.Event()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(timeout=10), "the event loop stood still during a search"
        return encode_queries(texts, **options)

    monkeypatch.setattr(encoder, "encode_queries", wait_for_the_loop)
    assert len(await GTEHybridRetriever(collection).aretrieve("wall")) == 2


def test_the_number_of_nodes_is_llama_indexs_and_may_change(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection)
    assert len(ids(retriever)) == 2
    retriever.similarity_top_k = 3
    assert len(ids(retriever)) == 3


def test_a_node_comes_back_as_it_was_given(empty: HybridCollection) -> None:
    node = TextNode(
        text="a wall",
        id_="n",
        metadata={
            "nested": {"a": [1, {"b": None}]},
            "mixed": [1, "two"],
            "none": None,
            "empty": [],
            "huge": 2**70,
            "tags": ["x", "y"],
            "doc_id": "the user's own",
        },
        excluded_embed_metadata_keys=["nested"],
        excluded_llm_metadata_keys=["mixed"],
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="document"),
            NodeRelationship.NEXT: RelatedNodeInfo(node_id="next"),
        },
        start_char_idx=3,
        end_char_idx=9,
        text_template="{content} / {metadata_str}",
    )
    retriever = GTEHybridRetriever(empty, where={"tags": {"$contains": "x"}})
    assert retriever.add_nodes([node]) == ["n"]
    (result,) = retriever.retrieve("wall")
    assert result.node == node
    assert result.node.ref_doc_id == "document"


def test_values_without_a_json_form_come_back_in_llama_indexs(empty: HybridCollection) -> None:
    metadata = {"when": datetime(2024, 5, 6, tzinfo=timezone.utc), "pair": ("a", "b"), "infinite": [1.0, math.inf]}
    retriever = GTEHybridRetriever(empty)
    retriever.add_nodes([TextNode(text="a wall", metadata=metadata)])
    (result,) = retriever.retrieve("wall")
    assert result.node.metadata == {"when": "2024-05-06T00:00:00Z", "pair": ["a", "b"], "infinite": [1.0, None]}


def test_the_text_is_embedded_without_the_metadata(empty: HybridCollection) -> None:
    GTEHybridRetriever(empty).add_nodes([TextNode(text="a wall", id_="n", metadata={"title": "garbage"})])
    (record,) = empty.get(["n"])
    assert record.text == "a wall"
    assert "a wall" not in str(record.metadata)  # stored once
    assert HybridRetriever(empty).search("garbage")[0].sparse_score == 0


def test_kinds_of_nodes_are_kept(empty: HybridCollection) -> None:
    retriever = GTEHybridRetriever(empty, similarity_top_k=5)
    retriever.add_nodes([IndexNode(text="wall one", id_="i", index_id="target"), Document(text="wall two", id_="d")])
    found = {result.node.node_id: result.node for result in retriever.retrieve("wall")}
    assert isinstance(found["i"], IndexNode)
    assert found["i"].index_id == "target"
    assert found["d"].get_content() == "wall two"


def test_index_nodes_lead_to_their_objects(empty: HybridCollection) -> None:
    target = TextNode(text="what the wall stands for", id_="target")
    node = IndexNode(text="a wall", id_="i", index_id="target", obj=target)
    GTEHybridRetriever(empty).add_nodes([node])
    (result,) = GTEHybridRetriever(empty, objects=[node]).retrieve("wall")
    assert result.node.get_content() == target.text


def test_adding_a_node_again_replaces_it(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection, similarity_top_k=1)
    retriever.add_nodes([TextNode(text="Rust is a colour.", id_="rust")])
    assert collection.count() == len(NODES)
    (result,) = retriever.retrieve("colour of Rust")
    assert (result.node.get_content(), result.node.metadata) == ("Rust is a colour.", {})


def test_chunks_of_a_document_know_it_and_are_deleted_with_it(collection: HybridCollection) -> None:
    document = Document(text="Walls are built. " * 40, id_="walls", metadata={"author": "Li"})
    chunks = SentenceSplitter(chunk_size=40, chunk_overlap=0).get_nodes_from_documents([document])
    retriever = GTEHybridRetriever(collection, similarity_top_k=len(chunks), where={"ref_doc_id": "walls"})
    retriever.add_nodes(chunks)
    results = retriever.retrieve("Who builds walls?")
    assert len(results) == len(chunks) > 1
    assert {result.node.ref_doc_id for result in results} == {"walls"}
    assert results[0].node.metadata == {"author": "Li"}
    retriever.delete_ref_doc("walls")
    retriever.delete_ref_doc("walls")
    assert collection.count() == len(NODES)


def test_records_of_other_programs_become_sensible_nodes(collection: HybridCollection) -> None:
    collection.upsert(["plain"], ["cheese is made of milk"], metadatas=[{"lang": "en", "doc_id": 7}])
    (result,) = GTEHybridRetriever(collection, similarity_top_k=1).retrieve("cheese milk")
    assert result.node == TextNode(text="cheese is made of milk", id_="plain", metadata={"lang": "en", "doc_id": 7})
    assert result.node.get_content(MetadataMode.LLM).endswith("cheese is made of milk")


def test_changes_made_behind_llama_indexs_back_are_seen(collection: HybridCollection) -> None:
    collection.collection.update(["rust"], metadatas=[{"year": 1999, "new": True}])
    (result,) = GTEHybridRetriever(collection, similarity_top_k=1).retrieve("garbage collector")
    assert result.node.metadata == {"lang": "en", "year": 1999, "new": True}


def test_the_records_id_and_text_come_before_the_stored_nodes(collection: HybridCollection) -> None:
    (record,) = collection.get(["rust"])
    collection.upsert(["copy"], ["cheese is made of milk"], metadatas=[record.metadata])
    (result,) = GTEHybridRetriever(collection, similarity_top_k=1).retrieve("cheese milk")
    assert (result.node.node_id, result.node.get_content()) == ("copy", "cheese is made of milk")
    assert result.node.metadata == NODES[1].metadata


def test_nodes_written_by_llama_indexs_own_store_are_found(empty: HybridCollection, encoder: GTEEncoder) -> None:
    chroma = pytest.importorskip("llama_index.vector_stores.chroma")
    from llama_index.embeddings.gte import GTEEmbedding

    vectors = GTEEmbedding(encoder=encoder).get_text_embedding_batch([node.text for node in NODES])
    store = chroma.ChromaVectorStore(chroma_collection=empty.collection)
    store.add([node.model_copy(update={"embedding": vector}) for node, vector in zip(NODES, vectors, strict=True)])
    (result,) = GTEHybridRetriever(empty, similarity_top_k=1).retrieve("garbage collector")
    assert result.node == NODES[1]


def test_a_node_found_by_several_queries_is_one_node(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection, similarity_top_k=4)
    by_query = [{result.node.hash for result in retriever.retrieve(query)} for query in ("China", "bread")]
    assert by_query[0] == by_query[1] == {node.hash for node in NODES}
    fused = QueryFusionRetriever(
        [retriever, retriever], mode=FUSION_MODES.RECIPROCAL_RANK, similarity_top_k=9, num_queries=1, llm=MockLLM()
    )
    assert len(fused.retrieve("China")) == len(NODES)


def test_it_feeds_a_query_engine(collection: HybridCollection) -> None:
    engine = RetrieverQueryEngine.from_args(
        GTEHybridRetriever(collection, similarity_top_k=1), llm=MockLLM(), response_mode=ResponseMode.COMPACT
    )
    response = engine.query("garbage collector")
    assert [source.node.node_id for source in response.source_nodes] == ["rust"]
    assert NODES[1].text in str(response)  # the mock repeats its prompt
    assert "_node_content" not in str(response)


def where(*filters: MetadataFilter | MetadataFilters, condition: FilterCondition | None = None) -> MetadataFilters:
    return MetadataFilters(filters=list(filters), condition=condition)


ENGLISH = MetadataFilter(key="lang", value="en")
SINCE_2021 = MetadataFilter(key="year", value=2021, operator=FilterOperator.GTE)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where(), {"wall", "rust", "beijing", "bread"}),
        (where(ENGLISH), {"wall", "rust", "bread"}),
        (where(ENGLISH, SINCE_2021), {"rust", "bread"}),
        (where(ENGLISH, SINCE_2021, condition=FilterCondition.OR), {"wall", "rust", "beijing", "bread"}),
        (where(MetadataFilter(key="lang", value="en", operator=FilterOperator.NE)), {"beijing"}),
        (where(MetadataFilter(key="year", value=2021, operator=FilterOperator.GT)), {"beijing", "bread"}),
        (where(MetadataFilter(key="year", value=2021, operator=FilterOperator.LT)), {"wall"}),
        (where(MetadataFilter(key="year", value=2021, operator=FilterOperator.LTE)), {"wall", "rust"}),
        (where(MetadataFilter(key="year", value=[2020, 2022], operator=FilterOperator.IN)), {"wall", "beijing"}),
        (where(MetadataFilter(key="year", value=[2020, 2022], operator=FilterOperator.NIN)), {"rust", "bread"}),
        (
            where(
                where(ENGLISH, SINCE_2021), where(MetadataFilter(key="year", value=2022)), condition=FilterCondition.OR
            ),
            {"rust", "bread", "beijing"},
        ),
    ],
)
def test_llama_index_filters_restrict_the_search(
    collection: HybridCollection, filters: MetadataFilters, expected: set[str]
) -> None:
    assert set(ids(GTEHybridRetriever(collection, similarity_top_k=9, filters=filters))) == expected


def test_chroma_filters_restrict_the_search(collection: HybridCollection) -> None:
    assert ids(GTEHybridRetriever(collection, similarity_top_k=9, where={"lang": "zh"})) == ["beijing"]
    by_text = GTEHybridRetriever(collection, similarity_top_k=9, where_document={"$contains": "flour"})
    assert ids(by_text) == ["bread"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_top_k": 0}, "k is 0; it must be at least 1"),
        ({"mode": "guess"}, "mode is 'guess'; available: "),
        ({"fusion": "sum"}, "fusion is 'sum'; available: "),
        ({"filters": where(ENGLISH), "where": {"lang": "en"}}, "filters and where are both given"),
        (
            {"filters": where(MetadataFilter(key="lang", value="e", operator=FilterOperator.TEXT_MATCH))},
            "filter on 'lang' uses TEXT_MATCH; accepted here: EQ, NE",
        ),
        ({"filters": where(ENGLISH, condition=FilterCondition.NOT)}, "filter condition NOT is not known to Chroma"),
    ],
)
def test_bad_options_are_refused(collection: HybridCollection, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GTEHybridRetriever(collection, **options)


def test_bad_nodes_are_refused(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection)
    with pytest.raises(ValueError, match="ids 'wall' given more than once"):
        retriever.add_nodes([NODES[0], NODES[0]])
    with pytest.raises(ValueError, match=r"metadatas\[0\] has the key '\$where'"):
        retriever.add_nodes([TextNode(text="t", metadata={"$where": 1})])
    assert collection.count() == len(NODES)
