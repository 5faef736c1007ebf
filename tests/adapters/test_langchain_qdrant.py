"""The sparse side of LangChain's Qdrant store, in a real Qdrant: one forward pass a text, and the right results."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from checkpoints import build, find_variant
from gte_rag import GTEEncoder

langchain_qdrant = pytest.importorskip("langchain_qdrant")

from langchain_qdrant import QdrantVectorStore, RetrievalMode  # noqa: E402

from langchain_gte import GTEEmbeddings, GTESparseEmbeddings  # noqa: E402

TEXTS = ["Peking ist die Hauptstadt Chinas.", "Paris is the capital of France.", "Error E1042 means no paper.", ""]


@pytest.fixture
def embeddings(encoder: GTEEncoder) -> GTEEmbeddings:
    return GTEEmbeddings(encoder=encoder, dimension=64)


def store(embeddings: GTEEmbeddings, mode: RetrievalMode) -> QdrantVectorStore:
    return QdrantVectorStore.construct_instance(
        embedding=embeddings,
        sparse_embedding=GTESparseEmbeddings(embeddings),
        retrieval_mode=mode,
        client_options={"location": ":memory:"},
        collection_name="texts",
    )


def test_it_is_what_the_store_expects(embeddings: GTEEmbeddings, encoder: GTEEncoder) -> None:
    sparse = GTESparseEmbeddings(embeddings)
    assert isinstance(sparse, langchain_qdrant.SparseEmbeddings)
    expected = encoder.encode_documents(TEXTS).sparse
    assert expected is not None
    for given, wanted in zip(sparse.embed_documents(TEXTS), expected, strict=True):
        assert dict(zip(given.indices, given.values, strict=True)) == pytest.approx(wanted.to_dict(), abs=1e-6)


def test_adding_and_searching_cost_one_pass_a_text(embeddings: GTEEmbeddings, passes: list[int]) -> None:
    hybrid = store(embeddings, RetrievalMode.HYBRID)
    passes.clear()
    hybrid.add_texts(TEXTS)
    assert passes == [len(TEXTS)]
    passes.clear()
    assert [found.page_content for found in hybrid.similarity_search("capital of France", k=1)] == [TEXTS[1]]
    assert passes == [1]


async def test_async_adding_and_searching_cost_one_pass_a_text(embeddings: GTEEmbeddings, passes: list[int]) -> None:
    hybrid = store(embeddings, RetrievalMode.HYBRID)
    passes.clear()
    await hybrid.aadd_texts(TEXTS[:3])
    assert passes == [3]
    assert [found.page_content for found in await hybrid.asimilarity_search("capital of France", k=1)] == [TEXTS[1]]
    assert passes == [3, 1]


def test_the_score_of_the_sparse_mode_is_the_encoders(embeddings: GTEEmbeddings, encoder: GTEEncoder) -> None:
    sparse = store(embeddings, RetrievalMode.SPARSE)
    sparse.add_texts(TEXTS)
    ((document, score),) = sparse.similarity_search_with_score("E1042", k=1)
    assert document.page_content == TEXTS[2]
    expected = encoder.score_pairs([("E1042", TEXTS[2])], dense_weight=0, sparse_weight=1)
    assert score == pytest.approx(float(expected[0]), rel=1e-5)


def test_dense_vectors_stay_those_of_the_embeddings(embeddings: GTEEmbeddings, encoder: GTEEncoder) -> None:
    alone = GTEEmbeddings(encoder=encoder, dimension=64)
    GTESparseEmbeddings(embeddings)
    for given, wanted in zip(embeddings.embed_documents(TEXTS), alone.embed_documents(TEXTS), strict=True):
        assert given == pytest.approx(wanted, abs=1e-6)
    assert embeddings.embed_query("q") == pytest.approx(alone.embed_query("q"), abs=1e-6)


def test_both_sides_survive_a_pickle_together(embeddings: GTEEmbeddings, passes: list[int]) -> None:
    dense, sparse = pickle.loads(pickle.dumps((embeddings, GTESparseEmbeddings(embeddings))))
    sparse.embed_documents(["a b"])
    assert len(dense.embed_documents(["a b"])[0]) == 64
    assert passes == [1]


def test_what_cannot_be_the_dense_side_is_refused(tmp_path: Path) -> None:
    other: Any = object()
    with pytest.raises(TypeError, match="embeddings is object; give the store's GTEEmbeddings"):
        GTESparseEmbeddings(other)
    dense_only = GTEEmbeddings(model_name=str(build(find_variant("multilingual-reranker"), tmp_path)))
    with pytest.raises(ValueError, match="gives no sparse vectors; choose a model with a sparse head"):
        GTESparseEmbeddings(dense_only)
