"""Sparse embeddings for LlamaIndex, and its Qdrant and Milvus stores: one forward pass a text, and the right results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gte_rag import GTEEncoder

pytest.importorskip("llama_index.core")

from llama_index.core import Document, StorageContext, VectorStoreIndex

from llama_index.embeddings.gte import GTEEmbedding
from llama_index.sparse_embeddings.gte import GTESparseEmbedding, qdrant_sparse_functions

TEXTS = ["Peking ist die Hauptstadt Chinas.", "Paris is the capital of France.", "Error E1042 means no paper."]


@pytest.fixture
def embed_model(encoder: GTEEncoder) -> GTEEmbedding:
    return GTEEmbedding(encoder=encoder, embed_batch_size=2)


def index_of(store: Any, embed_model: GTEEmbedding, documents: list[Document]) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=embed_model)


def best(index: VectorStoreIndex, mode: str, query: str) -> str:
    retriever = index.as_retriever(vector_store_query_mode=mode, similarity_top_k=1, sparse_top_k=2, hybrid_top_k=1)
    text: str = retriever.retrieve(query)[0].node.get_content()
    return text


async def test_the_weights_are_the_encoders_and_cost_no_pass_of_their_own(
    embed_model: GTEEmbedding, encoder: GTEEncoder, passes: list[int]
) -> None:
    sparse = GTESparseEmbedding(embed_model)
    passes.clear()
    embed_model.get_text_embedding_batch(TEXTS)
    given = sparse.get_text_embedding_batch(TEXTS)
    assert sum(passes) == 3
    expected = encoder.encode_documents(TEXTS).sparse
    assert expected is not None
    for weights, wanted in zip(given, expected, strict=True):
        assert weights == pytest.approx(wanted.to_dict(), abs=1e-6)
    assert await sparse.aget_query_embedding("E1042") == pytest.approx(sparse.get_query_embedding("E1042"), abs=1e-6)
    assert (await sparse.aget_text_embedding_batch(TEXTS))[0] == pytest.approx(given[0], abs=1e-6)


def test_similarity_is_the_sparse_score_and_not_its_cosine(embed_model: GTEEmbedding, encoder: GTEEncoder) -> None:
    sparse = GTESparseEmbedding(embed_model)
    query, document = sparse.get_query_embedding("capital of France"), sparse.get_text_embedding(TEXTS[1])
    expected = encoder.score_pairs([("capital of France", TEXTS[1])], dense_weight=0, sparse_weight=1)
    assert sparse.similarity(query, document) == pytest.approx(float(expected[0]), rel=1e-5)
    lengths = np.linalg.norm(list(query.values())) * np.linalg.norm(list(document.values()))
    assert abs(sparse.similarity(query, document) - expected[0] / lengths) > 0.05


def test_what_cannot_be_the_dense_side_is_refused() -> None:
    other: Any = object()
    for build in (GTESparseEmbedding, qdrant_sparse_functions):
        with pytest.raises(TypeError, match="embed_model is object; give the index's GTEEmbedding"):
            build(other)


def test_an_index_in_qdrant_costs_one_pass_a_text(embed_model: GTEEmbedding, passes: list[int]) -> None:
    qdrant_client = pytest.importorskip("qdrant_client")
    stores = pytest.importorskip("llama_index.vector_stores.qdrant")
    store = stores.QdrantVectorStore(
        "texts",
        client=qdrant_client.QdrantClient(":memory:"),
        enable_hybrid=True,
        **qdrant_sparse_functions(embed_model),
    )
    passes.clear()
    documents = [Document(text=text, metadata={"n": number}) for number, text in enumerate(TEXTS)]
    index = index_of(store, embed_model, documents)
    assert sum(passes) == 3
    for mode in ("default", "sparse", "hybrid"):
        passes.clear()
        assert best(index, mode, f"what is the capital of France ({mode})") == TEXTS[1]
        assert passes == [1]


def test_an_index_in_milvus_costs_one_pass_a_text(
    embed_model: GTEEmbedding, encoder: GTEEncoder, passes: list[int], tmp_path: Path
) -> None:
    pytest.importorskip("milvus_lite", reason="Milvus Lite has no wheels for this system")
    stores = pytest.importorskip("llama_index.vector_stores.milvus")
    from llama_index.sparse_embeddings.gte import GTEMilvusSparseEmbedding

    sparse = GTEMilvusSparseEmbedding(embed_model)
    store = stores.MilvusVectorStore(
        str(tmp_path / "milvus.db"),
        dim=encoder.dimension,
        enable_sparse=True,
        sparse_embedding_function=sparse,
        use_async_client=False,
    )
    passes.clear()
    index = index_of(store, embed_model, [Document(text=text) for text in TEXTS])
    assert sum(passes) == 3
    for mode in ("default", "hybrid"):
        passes.clear()
        assert best(index, mode, f"what is the capital of France ({mode})") == TEXTS[1]
        assert passes == [1]
    # The store's own sparse mode sets drop_ratio_search, which Milvus Lite refuses.
    found = store.client.search(
        store.collection_name, sparse.encode_queries(["E1042"]), anns_field=store.sparse_embedding_field, limit=1
    )
    assert found[0][0]["distance"] == pytest.approx(
        float(encoder.score_pairs([("E1042", TEXTS[2])], dense_weight=0, sparse_weight=1)[0]), rel=1e-4
    )
