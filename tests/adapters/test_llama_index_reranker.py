"""GTERerank for LlamaIndex: order, scores, events, query engines, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from gte_rag import CheckpointError, GTEEncoder, GTEReranker
from llama_index.embeddings.gte import GTEEmbedding
from llama_index.postprocessor.gte import GTERerank

QUERY = "what is the capital of China?"
TEXTS = [
    "The Great Wall of China is visible from afar.",
    "Rust frees memory without a garbage collector.",
    "北京是中国的首都。",
    "Bread is made of flour, water and salt.",
]


def make_nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=text, id_=str(number), metadata={"number": number}), score=number / 10)
        for number, text in enumerate(TEXTS)
    ]


def best_first(reranker: GTEReranker, metadata_mode: MetadataMode = MetadataMode.EMBED) -> list[str]:
    scores = {
        item.node.node_id: reranker.score_pairs([(QUERY, item.node.get_content(metadata_mode=metadata_mode))])[0]
        for item in make_nodes()
    }
    return sorted(scores, key=lambda node_id: -scores[node_id])


class Recorder(BaseEventHandler):
    """Keeps the events of reranking."""

    events: list[Any] = []  # noqa: RUF012  # a pydantic field

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, (ReRankStartEvent, ReRankEndEvent)):
            self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    root, recorder = get_dispatcher(), Recorder()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


def test_the_best_two_nodes_come_first_with_their_scores(reranker: GTEReranker) -> None:
    nodes = make_nodes()
    ranked = GTERerank(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert [item.node.node_id for item in ranked] == best_first(reranker)[:2]
    content = ranked[0].node.get_content(metadata_mode=MetadataMode.EMBED)
    assert ranked[0].score == pytest.approx(float(reranker.score_pairs([(QUERY, content)])[0]), abs=1e-5)
    assert nodes == make_nodes()


async def test_async_gives_the_same_from_another_thread(reranker: GTEReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    postprocessor = GTERerank(reranker=reranker, top_n=3)
    ranked = postprocessor.postprocess_nodes(make_nodes(), query_str=QUERY)
    threads = []
    rerank = reranker.rerank

    def watched(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return rerank(*args, **options)

    monkeypatch.setattr(reranker, "rerank", watched)
    assert await postprocessor.apostprocess_nodes(make_nodes(), query_bundle=QueryBundle(QUERY)) == ranked
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_metadata_is_read_as_asked(reranker: GTEReranker) -> None:
    orders = []
    for mode in (MetadataMode.EMBED, MetadataMode.NONE):
        ranked = GTERerank(reranker=reranker, top_n=4, metadata_mode=mode).postprocess_nodes(
            make_nodes(), query_str=QUERY
        )
        assert [item.node.node_id for item in ranked] == best_first(reranker, mode)
        orders.append([item.score for item in ranked])
    assert orders[0] != orders[1]


def test_the_retrievers_score_can_be_kept(reranker: GTEReranker) -> None:
    nodes = make_nodes()
    ranked = GTERerank(reranker=reranker, keep_retrieval_score=True).postprocess_nodes(nodes, query_str=QUERY)
    for item in ranked:
        assert item.node.metadata == {
            **nodes[int(item.node.node_id)].node.metadata,
            "retrieval_score": item_score(item),
        }
    assert nodes == make_nodes()


def item_score(item: NodeWithScore) -> float | None:
    return make_nodes()[int(item.node.node_id)].score


def test_start_and_end_of_reranking_are_events(reranker: GTEReranker, recorder: Recorder) -> None:
    ranked = GTERerank(reranker=reranker, top_n=3).postprocess_nodes(make_nodes(), query_str=QUERY)
    start, end = recorder.events
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert (start.query, start.top_n, start.model_name) == (QueryBundle(QUERY), 3, reranker.name)
    assert start.nodes == make_nodes()
    assert end.nodes == ranked


def test_the_callback_gets_start_and_end(reranker: GTEReranker) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = GTERerank(reranker=reranker, callback_manager=CallbackManager([handler]))
    ranked = postprocessor.postprocess_nodes(make_nodes(), query_str=QUERY)
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: make_nodes(),
        EventPayload.MODEL_NAME: reranker.name,
        EventPayload.QUERY_STR: QUERY,
        EventPayload.TOP_K: 2,
    }
    assert end.payload == {EventPayload.NODES: ranked}


def test_it_works_in_a_query_engine(reranker: GTEReranker, encoder: GTEEncoder) -> None:
    nodes = [item.node for item in make_nodes()]
    index = VectorStoreIndex(nodes=nodes, embed_model=GTEEmbedding(encoder=encoder))
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=4, node_postprocessors=[GTERerank(reranker=reranker, top_n=2)]
    )
    response = engine.query(QUERY)
    assert [item.node.node_id for item in response.source_nodes] == best_first(reranker)[:2]


def test_no_nodes_give_no_nodes(reranker: GTEReranker) -> None:
    assert GTERerank(reranker=reranker).postprocess_nodes([], query_str=QUERY) == []


def test_a_reranker_is_loaded_by_name(reranker_folder: Path, reranker: GTEReranker) -> None:
    postprocessor = GTERerank(str(reranker_folder), device="cpu", max_length=512)
    assert postprocessor.reranker.fingerprint == reranker.fingerprint
    assert isinstance(postprocessor.reranker, GTEReranker)
    assert postprocessor.reranker.max_length == 512
    assert postprocessor.to_dict()["model"] == str(reranker_folder)
    assert postprocessor.to_dict()["class_name"] == "GTERerank"


# What is refused


def test_a_query_is_needed(reranker: GTEReranker) -> None:
    with pytest.raises(ValueError, match="reranking needs a query"):
        GTERerank(reranker=reranker).postprocess_nodes(make_nodes())


def test_an_encoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="gte-mini cannot rerank"):
        GTERerank("gte-mini")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either model, .* or reranker"),
        ({"model": "a", "reranker": True}, "give either model, .* or reranker"),
        ({"reranker": True, "max_length": 512}, "reranker is given beside device"),
        ({"reranker": True, "top_n": 0}, "top_n"),
    ],
)
def test_wrong_options_are_refused(reranker: GTEReranker, options: dict[str, Any], message: str) -> None:
    given = {**options, "reranker": reranker} if "reranker" in options else options
    with pytest.raises(ValueError, match=message):
        GTERerank(**given)


def test_something_else_than_a_reranker_is_refused() -> None:
    with pytest.raises(TypeError, match=r"reranker is str; give a gte_rag\.GTEReranker"):
        GTERerank(reranker="gte")  # type: ignore[arg-type]
