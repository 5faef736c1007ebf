"""A chatbot over your documents with LlamaIndex, in the terminal.

    python examples/chatbots/llama_index_chatbot.py                          three questions of the bundled demo texts
    python examples/chatbots/llama_index_chatbot.py --docs ~/notes           your own text and Markdown files
    python examples/chatbots/llama_index_chatbot.py --model ollama:llama3.2  any chat model; also openai:NAME, or
                                                                             NAME --base-url URL

The conversation is kept in LlamaIndex's `Memory`. With a model, its `CondensePlusContextChatEngine` does the talking.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from uuid import uuid4

import chromadb
from chromadb.config import Settings
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.llms import LLM
from llama_index.core.memory import Memory
from llama_index.core.schema import NodeWithScore, TextNode

from conversation import INSTRUCTION, Endpoint, Passage, Reply, quote, run, standalone
from gte_rag import GTEEncoder, HybridCollection
from llama_index.retrievers.gte import GTEHybridRetriever


def chat_model(name: str, base_url: str | None) -> LLM:
    """Return a chat model by name.

    Raises:
        ValueError: The name says nothing of where the model is.
    """
    try:
        from llama_index.llms.openai_like import OpenAILike
    except ImportError:
        sys.exit("--model needs more packages: pip install 'gte-rag[examples]'")
    endpoint = Endpoint.named(name, base_url)
    model: LLM = OpenAILike(
        model=endpoint.model,
        api_base=endpoint.base_url or "https://api.openai.com/v1",
        api_key=endpoint.api_key,
        is_chat_model=True,
        context_window=8192,
    )
    return model


def index(passages: list[Passage], encoder: GTEEncoder) -> GTEHybridRetriever:
    """Return a hybrid retriever over passages, in memory."""
    client = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))
    collection = HybridCollection(client, f"chatbot-{uuid4().hex}", encoder=encoder)
    retriever = GTEHybridRetriever(collection, similarity_top_k=3)
    retriever.add_nodes([TextNode(id_=each.id, text=each.text, metadata={"source": each.source}) for each in passages])
    return retriever


def chatbot(passages: list[Passage], encoder: GTEEncoder, llm: LLM | None) -> Callable[[str], Reply]:
    """Return what answers a question and remembers it."""
    retriever = index(passages, encoder)
    memory = Memory.from_defaults(session_id=uuid4().hex, token_limit=4000)
    if llm is not None:
        engine = CondensePlusContextChatEngine.from_defaults(
            retriever=retriever, llm=llm, memory=memory, system_prompt=INSTRUCTION
        )

        def answer(question: str) -> Reply:
            response = engine.chat(question)
            query = response.sources[0].raw_input["message"]
            return Reply(str(response), query, [source(node) for node in response.source_nodes])

        return answer

    every = GTEHybridRetriever(retriever.collection, similarity_top_k=50)

    def scores(query: str) -> dict[str, float]:
        return {node.node_id: node.get_score() for node in every.retrieve(query)}

    def quotation(question: str) -> Reply:
        memory.put(ChatMessage(question, role=MessageRole.USER))
        asked = [str(message.content) for message in memory.get_all() if message.role == MessageRole.USER]
        query = standalone(asked, scores)
        nodes = retriever.retrieve(query)
        text = quote(encoder, query, [node.text for node in nodes])
        memory.put(ChatMessage(text, role=MessageRole.ASSISTANT))
        return Reply(text, query, [source(node) for node in nodes])

    return quotation


def source(node: NodeWithScore) -> str:
    """Return a line on a passage: where it is from, and its score."""
    return f"{node.metadata['source']}  {node.get_score():.3f}"


if __name__ == "__main__":
    run("A chatbot over your documents, with LlamaIndex.", chat_model, chatbot)
