"""A chatbot over your documents with LangGraph, in the terminal: three nodes, and a checkpointer that keeps the conversation.

    python examples/chatbots/langgraph_chatbot.py                            three questions of the bundled demo texts
    python examples/chatbots/langgraph_chatbot.py --docs ~/notes --model ollama:llama3.2

Options as for `langchain_chatbot.py`, whose index and chat models it uses. With a checkpointer on disk (packages
langgraph-checkpoint-sqlite and -postgres) a conversation goes on after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

from conversation import (
    CITE,
    CONDENSE,
    INSTRUCTION,
    REMEMBERED_MESSAGES,
    Passage,
    Reply,
    numbered,
    quote,
    run,
    standalone,
)
from gte_rag import GTEEncoder
from langchain_chatbot import asked, chat_model, index, scores, source
from langchain_gte import GTEHybridRetriever

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph


class State(MessagesState):
    """What a thread remembers: the messages, and of the last question the query and the passages."""

    query: str
    passages: list[Document]


def chatbot(retriever: GTEHybridRetriever, model: BaseChatModel | None) -> CompiledStateGraph[State]:
    """Return the graph: condense -> retrieve -> answer."""

    def condense(state: State) -> dict[str, Any]:
        messages = state["messages"]
        if model is None:
            return {"query": standalone(asked(messages), lambda query: scores(retriever, query))}
        if len(messages) == 1:
            return {"query": messages[0].text}
        return {"query": model.invoke([SystemMessage(CONDENSE), *messages[-REMEMBERED_MESSAGES - 1 :]]).text}

    def retrieve(state: State) -> dict[str, Any]:
        return {"passages": retriever.invoke(state["query"])}

    def answer(state: State) -> dict[str, Any]:
        texts = [passage.page_content for passage in state["passages"]]
        if model is None:
            return {"messages": AIMessage(quote(retriever.collection.encoder, state["query"], texts))}
        *earlier, question = state["messages"][-REMEMBERED_MESSAGES - 1 :]
        prompt = HumanMessage(f"Passages:\n{numbered(texts)}\n\nQuestion: {question.text}")
        return {"messages": model.invoke([SystemMessage(f"{INSTRUCTION} {CITE}"), *earlier, prompt])}

    graph = StateGraph(State)
    for node in (condense, retrieve, answer):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "condense")
    graph.add_edge("condense", "retrieve")
    graph.add_edge("retrieve", "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=InMemorySaver())


def answering(passages: list[Passage], encoder: GTEEncoder, model: BaseChatModel | None) -> Callable[[str], Reply]:
    """Return what answers a question; the checkpointer remembers it."""
    graph = chatbot(index(passages, encoder), model)

    def ask(question: str) -> Reply:
        given: Any = {"messages": [HumanMessage(question)]}  # the checkpointer has the rest of the state
        state = graph.invoke(given, {"configurable": {"thread_id": "terminal"}})
        return Reply(state["messages"][-1].text, state["query"], [source(passage) for passage in state["passages"]])

    return ask


if __name__ == "__main__":
    run("A chatbot over your documents, with LangGraph.", chat_model, answering)
