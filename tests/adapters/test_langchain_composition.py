"""The hybrid retrievers inside what LangChain builds from retrievers: chains, ensembles, compression, graphs."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, TypedDict

import pytest

pytest.importorskip("chromadb")
pytest.importorskip("langchain_core")

from langchain_core.callbacks import BaseCallbackHandler, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from pydantic import ConfigDict

from gte_rag import GTEEncoder
from langchain_gte import GTEChroma, GTEEmbeddings, GTEHybridRetriever

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytestmark = pytest.mark.usefixtures("bundled_once")

DOCUMENTS = [
    Document("The Great Wall of China is visible from afar.", id="wall", metadata={"lang": "en"}),
    Document("Rust frees memory without a garbage collector.", id="rust", metadata={"lang": "en"}),
    Document("北京是中国的首都。", id="beijing", metadata={"lang": "zh"}),
    Document("Bread is made of flour, water and salt.", id="bread", metadata={"lang": "en"}),
]
QUESTION = "What is bread made of?"


@pytest.fixture
def store(chroma_client: ClientAPI, encoder: GTEEncoder) -> GTEChroma:
    return GTEChroma.from_documents(DOCUMENTS, GTEEmbeddings(encoder=encoder), client=chroma_client)


@pytest.fixture(params=["store", "retriever"])
def retriever(request: pytest.FixtureRequest, store: GTEChroma) -> BaseRetriever:
    """Both ways to a hybrid retriever."""
    if request.param == "store":
        return store.as_retriever(search_type="hybrid", search_kwargs={"k": 2})
    return GTEHybridRetriever(collection=store.collection, k=2)


def text(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


async def test_a_chain_answers_from_what_is_retrieved(retriever: BaseRetriever) -> None:
    prompt = ChatPromptTemplate.from_template("Context:\n{context}\n\nQuestion: {question}")
    seen: list[str] = []

    def look(value: PromptValue) -> PromptValue:
        seen.append(value.to_string())
        return value

    model = RunnableLambda(look) | FakeListChatModel(responses=["Flour."])
    chain = {"context": retriever | text, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    assert chain.invoke(QUESTION) == await chain.ainvoke(QUESTION) == "Flour."
    assert chain.batch([QUESTION, QUESTION]) == await chain.abatch([QUESTION, QUESTION]) == ["Flour."] * 2
    assert "".join(chain.stream(QUESTION)) == "Flour."
    assert [chunk async for chunk in chain.astream(QUESTION)]
    assert len(seen) == 8
    assert all("made of flour" in value and QUESTION in value for value in seen)


async def test_options_can_be_bound_and_given_by_configuration(store: GTEChroma) -> None:
    bound = store.as_retriever(search_type="hybrid").bind(k=1, filter={"lang": "zh"})
    assert [document.id for document in bound.invoke("China")] == ["beijing"]
    assert [document.id for document in await bound.ainvoke("China")] == ["beijing"]
    chain = itemgetter("question") | GTEHybridRetriever(collection=store.collection).bind(k=1)
    assert [document.id for document in chain.invoke({"question": QUESTION})] == ["bread"]


async def test_callbacks_see_the_search(retriever: BaseRetriever) -> None:
    class Listener(BaseCallbackHandler):
        def __init__(self) -> None:
            self.found: list[list[str | None]] = []

        def on_retriever_end(self, documents: list[Document], **kwargs: object) -> None:  # type: ignore[override]
            self.found.append([document.id for document in documents])

    listener = Listener()
    retriever.invoke(QUESTION, config={"callbacks": [listener]})
    await retriever.ainvoke(QUESTION, config={"callbacks": [listener]})
    assert [found[0] for found in listener.found] == ["bread", "bread"]
    events = [event["event"] async for event in retriever.astream_events(QUESTION, version="v2")]
    assert (events[0], events[-1]) == ("on_retriever_start", "on_retriever_end")


async def test_it_is_a_tool_for_agents(retriever: BaseRetriever) -> None:
    tool = create_retriever_tool(retriever, "handbook", "Searches the handbook.")
    assert DOCUMENTS[3].page_content in tool.invoke({"query": QUESTION})
    assert DOCUMENTS[3].page_content in await tool.ainvoke({"query": QUESTION})


async def test_an_ensemble_merges_it_with_other_retrievers(store: GTEChroma, retriever: BaseRetriever) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    dense = store.as_retriever(search_kwargs={"k": 3})
    ensemble = retrievers.EnsembleRetriever(retrievers=[retriever, dense], weights=[0.7, 0.3], id_key=None)
    found = [document.id for document in ensemble.invoke(QUESTION)]
    assert found[0] == "bread"
    assert len(found) == len(set(found)) == 3  # the same document from both is one
    assert [document.id for document in await ensemble.ainvoke(QUESTION)] == found


class Reranker(BaseDocumentCompressor):
    """Keeps the best document by the encoder's own pair scores."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    encoder: GTEEncoder

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> Sequence[Document]:
        scores = self.encoder.score_pairs([(query, document.page_content) for document in documents])
        return [documents[int(scores.argmax())]]


async def test_a_compressor_works_on_what_it_finds(encoder: GTEEncoder, retriever: BaseRetriever) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    compressed = retrievers.ContextualCompressionRetriever(
        base_compressor=Reranker(encoder=encoder), base_retriever=retriever
    )
    assert [document.id for document in compressed.invoke(QUESTION)] == ["bread"]
    assert [document.id for document in await compressed.ainvoke(QUESTION)] == ["bread"]


class State(TypedDict, total=False):
    question: str
    documents: list[Document]
    answer: str


async def test_a_graph_retrieves_in_a_node(retriever: BaseRetriever) -> None:
    graph_module = pytest.importorskip("langgraph.graph")
    memory = pytest.importorskip("langgraph.checkpoint.memory")

    def retrieve(state: State) -> State:
        return {"documents": retriever.invoke(state["question"])}

    async def aretrieve(state: State) -> State:
        return {"documents": await retriever.ainvoke(state["question"])}

    def answer(state: State) -> State:
        return {"answer": state["documents"][0].page_content}

    graph = graph_module.StateGraph(State)
    graph.add_node("retrieve", RunnableLambda(retrieve, aretrieve))
    graph.add_node("answer", answer)
    graph.add_edge(graph_module.START, "retrieve")
    graph.add_edge("retrieve", "answer")
    graph.add_edge("answer", graph_module.END)
    compiled = graph.compile(checkpointer=memory.InMemorySaver())

    first, second = ({"configurable": {"thread_id": name}} for name in ("sync", "async"))
    expected = DOCUMENTS[3].page_content
    assert compiled.invoke({"question": QUESTION}, first)["answer"] == expected
    assert (await compiled.ainvoke({"question": QUESTION}, second))["answer"] == expected
    # What was retrieved is in the checkpoint, so documents must serialise.
    assert compiled.get_state(first).values["documents"] == retriever.invoke(QUESTION)
    steps = [next(iter(update)) async for update in compiled.astream({"question": QUESTION}, second)]
    assert steps == ["retrieve", "answer"]
