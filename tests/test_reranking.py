"""Three stages on one call: the retriever's hits in the reranker's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("chromadb")

from gte_rag import GTEEncoder, GTEReranker, HybridCollection, HybridRetriever, RerankingRetriever

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

QUERY = "what is the capital of China?"
TEXTS = {
    "wall": "The Great Wall of China is visible from afar.",
    "rust": "Rust frees memory without a garbage collector.",
    "beijing": "北京是中国的首都。",
    "bread": "Bread is made of flour, water and salt.",
    "paris": "Paris is the capital of France.",
}


@pytest.fixture
def retriever(chroma_client: ClientAPI, encoder: GTEEncoder) -> HybridRetriever:
    collection = HybridCollection(chroma_client, "documents", encoder=encoder)
    metadatas: list[Any] = [{"number": number} for number in range(len(TEXTS))]
    collection.upsert(list(TEXTS), list(TEXTS.values()), metadatas=metadatas)
    return HybridRetriever(collection)


def test_hits_come_in_the_rerankers_order(retriever: HybridRetriever, reranker: GTEReranker) -> None:
    hits = RerankingRetriever(retriever, reranker).search(QUERY)
    scores = {key: float(reranker.score_pairs([(QUERY, text)])[0]) for key, text in TEXTS.items()}
    assert [hit.id for hit in hits] == sorted(TEXTS, key=lambda key: -scores[key])
    np.testing.assert_allclose([hit.rerank_score for hit in hits], [scores[hit.id] for hit in hits], atol=1e-5)


def test_a_hit_keeps_all_that_the_retriever_said(retriever: HybridRetriever, reranker: GTEReranker) -> None:
    before = {hit.id: hit for hit in retriever.search(QUERY)}
    for hit in RerankingRetriever(retriever, reranker).search(QUERY):
        known = before[hit.id]
        assert (hit.text, hit.metadata, hit.matches) == (known.text, known.metadata, known.matches)
        assert (hit.score, hit.dense_score, hit.sparse_score) == (known.score, known.dense_score, known.sparse_score)


def test_only_the_candidates_are_read_and_k_are_returned(retriever: HybridRetriever, reranker: GTEReranker) -> None:
    first = {hit.id for hit in retriever.search(QUERY, k=3)}
    three = RerankingRetriever(retriever, reranker, k=2, candidates=3)
    assert {hit.id for hit in three.search(QUERY, k=3)} == first
    assert three.search(QUERY) == three.search(QUERY, k=3)[:2]
    assert len(three.search(QUERY, k=5)) == 5


async def test_async_and_filters(retriever: HybridRetriever, reranker: GTEReranker) -> None:
    reranking = RerankingRetriever(retriever, reranker)
    assert await reranking.asearch(QUERY) == reranking.search(QUERY)
    assert await reranking.asearch(QUERY, k=1) == reranking.search(QUERY, k=1)
    where: dict[str, Any] = {"number": {"$lt": 2}}
    assert {hit.id for hit in reranking.search(QUERY, where=where)} == {"wall", "rust"}
    assert await reranking.asearch(QUERY, where=where) == reranking.search(QUERY, where=where)
    (hit,) = await reranking.asearch(QUERY, where_document={"$contains": "flour"})
    assert hit.id == "bread"


def test_nothing_found_is_nothing_reranked(
    chroma_client: ClientAPI, encoder: GTEEncoder, reranker: GTEReranker
) -> None:
    empty = HybridRetriever(HybridCollection(chroma_client, "empty", encoder=encoder))
    assert RerankingRetriever(empty, reranker).search(QUERY) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retriever": "chroma"}, TypeError, "retriever is str; give a HybridRetriever"),
        ({"reranker": "gte"}, TypeError, "reranker is str; give a GTEReranker"),
        ({"k": 0}, ValueError, "k is 0; it must be at least 1"),
        ({"candidates": 1.5}, TypeError, r"candidates is 1\.5; give a whole number"),
    ],
)
def test_wrong_options_are_refused(
    retriever: HybridRetriever,
    reranker: GTEReranker,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given: dict[str, Any] = {"retriever": retriever, "reranker": reranker, **options}
    with pytest.raises(error, match=message):
        RerankingRetriever(**given)


def test_wrong_arguments_of_a_search_are_refused(retriever: HybridRetriever, reranker: GTEReranker) -> None:
    reranking = RerankingRetriever(retriever, reranker)
    with pytest.raises(TypeError, match="query is NoneType; give one string"):
        reranking.search(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        reranking.search(QUERY, k=0)
