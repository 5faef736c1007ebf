"""A chatbot over your documents, in the terminal.

    python examples/chatbot.py                                  asks three questions of the bundled demo texts
    python examples/chatbot.py --docs ~/notes                   your own text and Markdown files
    python examples/chatbot.py --model openai:gpt-4o-mini       any LangChain chat model by name

Without --model nothing leaves the machine: the answer is then no generated text but a quotation of the passages found, and is
labelled so. With it, the passages and your questions go to that model; install its package (``pip install langchain
langchain-openai``, say) and set its key as that package says.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import chromadb
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from gte_rag import GTEEncoder, HybridCollection
from gte_rag.demo import read_documents
from langchain_gte import GTEHybridRetriever

QUESTIONS = ("How long does sourdough rise?", "Was bedeutet ECONNREFUSED?", "Что делать при ожоге?")
INSTRUCTION = (
    "Answer the question from the numbered passages only, in its language, and cite their numbers. "
    "Say so if they do not hold the answer."
)

Answer = Callable[[str, list[Document], list[BaseMessage]], str]


def load_passages(folder: Path | None) -> Iterable[Document]:
    """Return paragraphs of the text and Markdown files in a folder, or the bundled demo texts."""
    if folder is None:
        return [
            Document(document.text, id=document.id, metadata={"source": document.id}) for document in read_documents()
        ]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
    return [
        Document(paragraph.strip(), id=f"{path}#{number}", metadata={"source": str(path)})
        for path in files
        for number, paragraph in enumerate(path.read_text(encoding="utf-8").split("\n\n"))
        if paragraph.strip()
    ]


def quote(question: str, passages: list[Document], history: list[BaseMessage]) -> str:
    """Answer without a model: quote the passages found."""
    quotations = "\n".join(f"  [{number}] {passage.page_content}" for number, passage in enumerate(passages, start=1))
    return f"(no chat model: passages quoted, nothing generated)\n{quotations}"


def chat_model(name: str) -> Answer:
    """Return an answerer that asks a LangChain chat model."""
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        sys.exit(
            "--model needs the package langchain and the one of the provider: pip install langchain langchain-openai"
        )
    model: Any = init_chat_model(name)

    def ask(question: str, passages: list[Document], history: list[BaseMessage]) -> str:
        context = "\n".join(f"[{number}] {passage.page_content}" for number, passage in enumerate(passages, start=1))
        prompt = f"Passages:\n{context}\n\nQuestion: {question}"
        return str(model.invoke([SystemMessage(INSTRUCTION), *history, HumanMessage(prompt)]).text)

    return ask


def questions() -> Iterable[str]:
    """Yield what the user types, or three questions when nobody is at the terminal."""
    if not sys.stdin.isatty():
        yield from QUESTIONS
        return
    print("Ask a question; an empty line ends the conversation.")
    while line := input("> ").strip():
        yield line


def main() -> None:
    """Index the passages and answer questions."""
    parser = argparse.ArgumentParser(description="A chatbot over your documents.")
    parser.add_argument("--docs", type=Path, help="folder of text and Markdown files; default: the bundled demo texts")
    parser.add_argument("--model", help="a LangChain chat model such as openai:gpt-4o-mini; default: quote passages")
    parser.add_argument("--embedding-model", default="gte-mini", help="the GTE checkpoint for retrieval")
    options = parser.parse_args()
    answer = chat_model(options.model) if options.model else quote
    encoder = GTEEncoder.from_pretrained(options.embedding_model)
    collection = HybridCollection(chromadb.EphemeralClient(), "chatbot-example", encoder=encoder)
    retriever = GTEHybridRetriever.from_documents(list(load_passages(options.docs)), collection=collection, k=2)
    history: list[BaseMessage] = []
    for question in questions():
        passages = retriever.invoke(question)
        reply = answer(question, passages, history[-6:])
        history += [HumanMessage(question), AIMessage(reply)]
        sources = ", ".join(
            f"[{number}] {passage.metadata['source']}" for number, passage in enumerate(passages, start=1)
        )
        print(f"\nQ: {question}\nA: {reply}\n   sources: {sources}")


if __name__ == "__main__":
    main()
