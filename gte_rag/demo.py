"""The bundled documents and questions: a small, self-written collection in 19 languages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from gte_rag.chroma import HybridCollection
from gte_rag.encoder import GTEEncoder
from gte_rag.retriever import Hit, HybridRetriever

_FOLDER = Path(__file__).parent / "demo_data"


@dataclass(frozen=True)
class DemoDocument:
    """A bundled text.

    Attributes:
        id: Its id.
        language: Language code, such as ``"de"``.
        topic: What it is about.
        title: Its title.
        text: The text.
    """

    id: str
    language: str
    topic: str
    title: str
    text: str


@dataclass(frozen=True)
class DemoQuestion:
    """A question about the bundled texts.

    Attributes:
        language: Language of the question.
        question: The question.
        expected: Ids of the documents that answer it.
    """

    language: str
    question: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class DemoAnswer:
    """A question and what was found.

    Attributes:
        question: The question.
        hits: The best hits.
    """

    question: DemoQuestion
    hits: list[Hit]

    @property
    def is_right(self) -> bool:
        """Whether the best hit is one of the documents that answer the question."""
        return bool(self.hits) and self.hits[0].id in self.question.expected


def read_documents() -> list[DemoDocument]:
    """Return the bundled documents."""
    return [DemoDocument(**line) for line in _lines("documents.jsonl")]


def read_questions() -> list[DemoQuestion]:
    """Return the bundled questions."""
    return [
        DemoQuestion(line["language"], line["question"], tuple(line["expected"])) for line in _lines("questions.jsonl")
    ]


def build_collection(encoder: GTEEncoder) -> HybridCollection:
    """Index the bundled documents into an in-memory collection."""
    import chromadb

    client = chromadb.EphemeralClient(settings=chromadb.Settings(anonymized_telemetry=False))
    collection = HybridCollection(client, f"demo-{uuid4().hex}", encoder=encoder)
    documents = read_documents()
    collection.upsert(
        [document.id for document in documents],
        [document.text for document in documents],
        metadatas=[
            {"language": document.language, "topic": document.topic, "title": document.title} for document in documents
        ],
    )
    return collection


def answer_questions(collection: HybridCollection, *, k: int = 3) -> Iterator[DemoAnswer]:
    """Ask the bundled questions one after the other."""
    retriever = HybridRetriever(collection, k=k)
    for question in read_questions():
        yield DemoAnswer(question, retriever.search(question.question))


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]
