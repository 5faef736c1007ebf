"""GTERerank for LangChain: order, scores, compression retriever, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("langchain_core")

from langchain_core.documents import Document
from pydantic import ValidationError

from gte_rag import CheckpointError, GTEEncoder, GTEReranker, HybridCollection
from langchain_gte import GTEHybridRetriever, GTERerank

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

QUERY = "what is the capital of China?"
DOCUMENTS = [
    Document("The Great Wall of China is visible from afar.", id="wall", metadata={"year": 2020}),
    Document("Rust frees memory without a garbage collector.", id="rust", metadata={"year": 2021}),
    Document("北京是中国的首都。", id="beijing", metadata={"year": 2022, "gte_rerank_score": "old"}),
    Document("Bread is made of flour, water and salt.", metadata={"year": 2023}),
]


def expected(reranker: GTEReranker) -> list[tuple[str, float]]:
    """Texts and scores, best first, one by one."""
    scores = [float(reranker.score_pairs([(QUERY, document.page_content)])[0]) for document in DOCUMENTS]
    texts = [document.page_content for document in DOCUMENTS]
    return sorted(zip(texts, scores, strict=True), key=lambda item: -item[1])


def texts_and_scores(documents: Any) -> list[tuple[str, float]]:
    return [(document.page_content, document.metadata["gte_rerank_score"]) for document in documents]


def test_the_best_three_documents_come_first_with_their_scores(reranker: GTEReranker) -> None:
    ranked = GTERerank(reranker=reranker).compress_documents(DOCUMENTS, QUERY)
    best = expected(reranker)[:3]
    assert [text for text, _ in texts_and_scores(ranked)] == [text for text, _ in best]
    assert [score for _, score in texts_and_scores(ranked)] == pytest.approx([score for _, score in best], abs=1e-5)


async def test_async_gives_the_same_from_another_thread(reranker: GTEReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = GTERerank(reranker=reranker, top_n=None)
    ranked = compressor.compress_documents(DOCUMENTS, QUERY)
    threads = []
    rerank = reranker.rerank

    def watched(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return rerank(*args, **options)

    monkeypatch.setattr(reranker, "rerank", watched)
    assert await compressor.acompress_documents(DOCUMENTS, QUERY) == ranked
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_documents_are_copied_with_id_and_metadata(reranker: GTEReranker) -> None:
    before = [document.model_copy(deep=True) for document in DOCUMENTS]
    ranked = GTERerank(reranker=reranker, top_n=None).compress_documents(DOCUMENTS, QUERY)
    assert before == DOCUMENTS
    assert {document.id for document in ranked} == {document.id for document in DOCUMENTS}
    for document in ranked:
        assert document.metadata["year"] in range(2020, 2024)
        assert isinstance(document.metadata["gte_rerank_score"], float)


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (4, 4), (9, 4), (None, 4)])
def test_top_n_limits_the_documents(reranker: GTEReranker, top_n: int | None, count: int) -> None:
    compressor = GTERerank(reranker=reranker, top_n=top_n)
    assert len(compressor.compress_documents(DOCUMENTS, QUERY)) == count
    assert compressor.compress_documents([], QUERY) == []


def test_a_reranker_is_loaded_by_name(reranker_folder: Path, reranker: GTEReranker) -> None:
    for name in ("model", "model_name"):
        options: dict[str, Any] = {name: str(reranker_folder), "device": "cpu", "max_length": 512}
        compressor = GTERerank(**options)
        assert compressor.reranker.fingerprint == reranker.fingerprint
        assert isinstance(compressor.reranker, GTEReranker)
        assert compressor.reranker.max_length == 512
        assert compressor.model_name == str(reranker_folder)


async def test_it_works_in_a_compression_retriever(
    reranker: GTEReranker, chroma_client: ClientAPI, encoder: GTEEncoder
) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    collection = HybridCollection(chroma_client, "documents", encoder=encoder)
    base = GTEHybridRetriever.from_documents(DOCUMENTS, collection=collection, k=4)
    retriever = retrievers.ContextualCompressionRetriever(
        base_retriever=base, base_compressor=GTERerank(reranker=reranker, top_n=2)
    )
    ranked = retriever.invoke(QUERY)
    assert [text for text, _ in texts_and_scores(ranked)] == [text for text, _ in expected(reranker)[:2]]
    assert all("gte_score" in document.metadata for document in ranked)
    assert await retriever.ainvoke(QUERY) == ranked
    assert len(await retriever.ainvoke(QUERY, k=1)) == 1


def test_reranked_documents_can_be_stored_again(
    reranker: GTEReranker, chroma_client: ClientAPI, encoder: GTEEncoder
) -> None:
    collection = HybridCollection(chroma_client, "documents", encoder=encoder)
    retriever = GTEHybridRetriever.from_documents(DOCUMENTS[:2], collection=collection)
    before = collection.get()
    retriever.add_documents(GTERerank(reranker=reranker).compress_documents(retriever.invoke(QUERY), QUERY))
    assert collection.get([record.id for record in before]) == before


# What is refused


def test_a_model_must_be_named() -> None:
    with pytest.raises(ValueError, match="give model, the name of a reranker such as 'Alibaba-NLP/gte-multi"):
        GTERerank()


def test_an_encoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="gte-mini cannot rerank"):
        GTERerank(model="gte-mini")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_n": 0}, "top_n"), ({"top_k": 3}, "top_k"), ({"model": 3}, "model")],
)
def test_wrong_options_are_refused_by_name(reranker: GTEReranker, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GTERerank(reranker=reranker, **options)


def test_options_beside_a_ready_made_reranker_are_refused(reranker: GTEReranker) -> None:
    with pytest.raises(ValueError, match="device, max_length: decided by the reranker"):
        GTERerank(reranker=reranker, device="cpu", max_length=512)
    with pytest.raises(TypeError, match=r"reranker is str; give a gte_rag\.GTEReranker"):
        GTERerank(reranker="gte")  # type: ignore[arg-type]
