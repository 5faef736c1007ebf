"""The sparse side of LangChain's Milvus store, in a real Milvus Lite: one forward pass a text, and the right results."""

from __future__ import annotations

from pathlib import Path

import pytest

from gte_rag import GTEEncoder

pytest.importorskip("milvus_lite", reason="Milvus Lite has no wheels for this system")
langchain_milvus = pytest.importorskip("langchain_milvus")

import pymilvus  # noqa: E402

from langchain_gte import GTEEmbeddings, GTEMilvusSparseEmbeddings  # noqa: E402

TEXTS = ["Peking ist die Hauptstadt Chinas.", "Paris is the capital of France.", "Error E1042 means no paper."]
INNER_PRODUCT = {"metric_type": "IP", "index_type": "AUTOINDEX"}


def test_adding_and_searching_cost_one_pass_a_text(encoder: GTEEncoder, passes: list[int], tmp_path: Path) -> None:
    embeddings = GTEEmbeddings(encoder=encoder)
    store = langchain_milvus.Milvus(
        [embeddings, GTEMilvusSparseEmbeddings(embeddings)],
        vector_field=["dense", "sparse"],
        index_params=[INNER_PRODUCT, {"metric_type": "IP", "index_type": "SPARSE_INVERTED_INDEX"}],
        search_params=[
            {"metric_type": "IP"},
            {"metric_type": "IP"},
        ],  # Milvus Lite refuses the default drop_ratio_build
        connection_args={"uri": str(tmp_path / "milvus.db")},
        auto_id=True,
    )
    # langchain-ai/langchain-milvus#130: 0.3 does not register its connection. Before pymilvus 2.6.10 it need not.
    if pymilvus.__version__ < "3" and hasattr(store.client, "_handler"):
        pymilvus.connections._alias_handlers.setdefault(store.alias, store.client._handler)
    passes.clear()
    store.add_texts(TEXTS)
    assert passes == [3]
    passes.clear()
    assert [found.page_content for found in store.similarity_search("E1042", k=1)] == [TEXTS[2]]
    assert passes == [1]


async def test_the_weights_are_the_encoders(encoder: GTEEncoder) -> None:
    sparse = GTEMilvusSparseEmbeddings(GTEEmbeddings(encoder=encoder))
    expected = encoder.encode_documents(TEXTS).sparse
    assert expected is not None
    for given, wanted in zip(sparse.embed_documents(TEXTS), expected, strict=True):
        assert given == pytest.approx(wanted.to_dict(), abs=1e-6)
    assert await sparse.aembed_query("E1042") == pytest.approx(sparse.embed_query("E1042"), abs=1e-6)
