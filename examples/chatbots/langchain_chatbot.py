"""A chatbot over your documents with LangChain, in the terminal.

    python examples/chatbots/langchain_chatbot.py                            three questions of the bundled demo texts
    python examples/chatbots/langchain_chatbot.py --docs ~/notes             your own text and Markdown files
    python examples/chatbots/langchain_chatbot.py --model ollama:llama3.2    any chat model; also openai:NAME,
                                                                             NAME --base-url URL, or PROVIDER:NAME of LangChain

The conversation is a list of messages; `langgraph_chatbot.py` shows how to keep it in a store. A model rewrites follow-up
questions; without one the collection itself tells them apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import chromadb
from chromadb.config import Settings
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from conversation import (
    CITE,
    CONDENSE,
    INSTRUCTION,
    REMEMBERED_MESSAGES,
    Endpoint,
    Passage,
    Reply,
    numbered,
    quote,
    run,
    standalone,
)
from gte_rag import GTEEncoder, HybridCollection
from langchain_gte import GTEHybridRetriever

Step = dict[str, Any]  # question, history, query, passages, answer: each step adds one


def chat_model(name: str, base_url: str | None) -> BaseChatModel:
    """Return a chat model by name.

    Raises:
        ValueError: The name says nothing of where the model is.
    """
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        sys.exit("--model needs more packages: pip install 'gte-rag[examples]'")
    if base_url is None and ":" in name and not name.startswith(("openai:", "ollama:")):
        return init_chat_model(name)  # LangChain's own names, such as anthropic:… with the package langchain-anthropic
    endpoint = Endpoint.named(name, base_url)
    return init_chat_model(
        endpoint.model, model_provider="openai", base_url=endpoint.base_url, api_key=endpoint.api_key
    )


def index(passages: list[Passage], encoder: GTEEncoder) -> GTEHybridRetriever:
    """Return a hybrid retriever over passages, in memory."""
    documents = [Document(each.text, id=each.id, metadata={"source": each.source}) for each in passages]
    client = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))
    collection = HybridCollection(client, f"chatbot-{uuid4().hex}", encoder=encoder)
    return GTEHybridRetriever.from_documents(documents, collection=collection, k=3)


def chatbot(retriever: GTEHybridRetriever, model: BaseChatModel | None) -> Runnable[Step, Step]:
    """Return the chain: question and history -> stand-alone query -> passages -> answer."""
    recent = MessagesPlaceholder("history", n_messages=REMEMBERED_MESSAGES)
    if model is None:

        def condense(step: Step) -> str:
            return standalone([*asked(step["history"]), step["question"]], lambda query: scores(retriever, query))

        def answer(step: Step) -> str:
            texts = [passage.page_content for passage in step["passages"]]
            return quote(retriever.collection.encoder, step["query"], texts)

        query: Runnable[Step, str] = RunnableLambda(condense)
        reply: Runnable[Step, str] = RunnableLambda(answer)
    else:
        rewrite = ChatPromptTemplate.from_messages([("system", CONDENSE), recent, ("human", "{question}")])
        rewritten: Runnable[Step, str] = rewrite | model | StrOutputParser()
        query = RunnableLambda(lambda step: rewritten if step["history"] else step["question"])
        prompt = ChatPromptTemplate.from_messages(
            [("system", f"{INSTRUCTION} {CITE}"), recent, ("human", "Passages:\n{context}\n\nQuestion: {question}")]
        )
        in_prompt = RunnablePassthrough.assign(
            context=lambda step: numbered(passage.page_content for passage in step["passages"])
        )
        reply = in_prompt | prompt | model | StrOutputParser()
    found: Runnable[Step, list[Document]] = RunnableLambda(lambda step: step["query"]) | retriever
    return RunnablePassthrough.assign(query=query).assign(passages=found).assign(answer=reply)


def asked(history: Sequence[BaseMessage]) -> list[str]:
    """Return the questions in a conversation, the oldest first."""
    return [message.text for message in history if isinstance(message, HumanMessage)]


def scores(retriever: GTEHybridRetriever, query: str) -> dict[str, float]:
    """Return the scores of the passages nearest to a query, by id."""
    return {str(passage.id): passage.metadata["gte_score"] for passage in retriever.invoke(query, k=50)}


def source(passage: Document) -> str:
    """Return a line on a passage: where it is from, and its scores."""
    score, dense, sparse = (passage.metadata[f"gte_{name}"] for name in ("score", "dense_score", "sparse_score"))
    return f"{passage.metadata['source']}  {score:.3f} (dense {dense:.3f}, sparse {sparse:.3f})"


def answering(passages: list[Passage], encoder: GTEEncoder, model: BaseChatModel | None) -> Callable[[str], Reply]:
    """Return what answers a question and remembers it."""
    bot = chatbot(index(passages, encoder), model)
    history: list[BaseMessage] = []

    def ask(question: str) -> Reply:
        step = bot.invoke({"question": question, "history": history})
        history.extend([HumanMessage(question), AIMessage(step["answer"])])
        return Reply(step["answer"], step["query"], [source(passage) for passage in step["passages"]])

    return ask


if __name__ == "__main__":
    run("A chatbot over your documents, with LangChain.", chat_model, answering)
