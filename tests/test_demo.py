"""The bundled documents and questions."""

from __future__ import annotations

import pytest

pytest.importorskip("chromadb")

import chromadb
from chromadb.config import Settings

from gte_rag import GTEEncoder
from gte_rag.demo import Answer, answers, read_documents, read_questions


def test_every_expected_document_exists() -> None:
    ids = [document.id for document in read_documents()]
    assert len(set(ids)) == len(ids)
    for question in read_questions():
        assert question.expected
        assert set(question.expected) <= set(ids)


def test_documents_are_many_and_in_many_languages() -> None:
    documents = read_documents()
    assert len(documents) >= 90
    assert len({document.language for document in documents}) >= 19
    assert all(document.title and document.text and document.topic for document in documents)


@pytest.fixture(scope="module")
def found(encoder: GTEEncoder) -> list[Answer]:
    return list(answers(encoder, k=2))


def test_bundled_model_answers_most_questions(found: list[Answer]) -> None:
    assert [answer.question for answer in found] == read_questions()
    assert all(len(answer.hits) == 2 for answer in found)
    assert sum(answer.is_right for answer in found) >= 8


def test_only_the_first_hit_counts_as_right(found: list[Answer]) -> None:
    for answer in found:
        assert answer.is_right == (answer.hits[0].id in answer.question.expected)
    right = next(answer for answer in found if answer.is_right)
    assert not Answer(right.question, right.hits[::-1]).is_right
    assert not Answer(right.question, ()).is_right


def test_nothing_is_left_in_the_shared_memory_of_chroma(found: list[Answer]) -> None:
    client = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
    assert not [collection.name for collection in client.list_collections() if collection.name.startswith("demo-")]
