"""The bundled documents and questions: a first impression without any data of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any
from uuid import uuid4

from gte_rag.chroma import HybridCollection
from gte_rag.encoder import GTEEncoder
from gte_rag.errors import missing_extra
from gte_rag.retriever import Hit, HybridRetriever

try:
    import chromadb
    from chromadb.config import Settings
except ImportError as error:
    raise missing_extra("chromadb", "cli") from error


@dataclass(frozen=True)
class DemoDocument:
    """A bundled document.

    Attributes:
        id: Its id.
        language: Language code.
        topic: What it is about, one or two words.
        title: Its title.
        text: Its text, a few sentences.
    """

    id: str
    language: str
    topic: str
    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A bundled question.

    Attributes:
        language: Language code.
        question: The question.
        expected: Ids of the documents that answer it.
    """

    language: str
    question: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What was found for a question.

    Attributes:
        question: The question.
        hits: The best documents, best first.
    """

    question: Question
    hits: tuple[Hit, ...]

    @property
    def is_right(self) -> bool:
        """Whether the first hit is a document that answers the question."""
        return bool(self.hits) and self.hits[0].id in self.question.expected


def read_documents() -> list[DemoDocument]:
    """Return the bundled documents."""
    return [DemoDocument(**row) for row in _rows("documents.jsonl")]


def read_questions() -> list[Question]:
    """Return the bundled questions."""
    return [Question(row["language"], row["question"], tuple(row["expected"])) for row in _rows("questions.jsonl")]


def answers(encoder: GTEEncoder, *, k: int = 3) -> Iterator[Answer]:
    """Index the bundled documents into a Chroma in memory and answer the bundled questions, one after the other.

    Args:
        encoder: A model with a sparse head.
        k: Number of hits for each question.

    Yields:
        An answer for each question. A document's title and text are one text; its metadata are language, topic and title.
    """
    client = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
    name = f"demo-{uuid4().hex}"  # clients in memory share one database within a process
    collection = HybridCollection(client, name, encoder=encoder)
    try:
        documents = read_documents()
        collection.upsert(
            [document.id for document in documents],
            [f"{document.title}\n{document.text}" for document in documents],
            metadatas=[
                {"language": document.language, "topic": document.topic, "title": document.title}
                for document in documents
            ],
        )
        retriever = HybridRetriever(collection, k=k)
        for question in read_questions():
            yield Answer(question, tuple(retriever.search(question.question)))
    finally:
        client.delete_collection(name)


def _rows(name: str) -> list[dict[str, Any]]:
    text = (resources.files("gte_rag") / "demo_data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]
