"""The functions that are given to Chroma itself: stored, rebuilt, shared, and one pass for dense and sparse."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gte_rag import GTEEncoder
from gte_rag.shared import SharedEncoder, shared_encoder

chromadb = pytest.importorskip("chromadb")

from chromadb.utils.embedding_functions import config_to_embedding_function, known_embedding_functions  # noqa: E402

from gte_rag.embedding_functions import GTEEmbeddingFunction, GTESparseEmbeddingFunction  # noqa: E402

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

TEXTS = ["Peking ist die Hauptstadt Chinas.", "Bread needs flour and water."]


def test_a_collection_embeds_and_queries_with_the_function(chroma_client: ClientAPI) -> None:
    collection = chroma_client.create_collection("own", embedding_function=GTEEmbeddingFunction())  # type: ignore[arg-type]
    collection.add(ids=["1", "2"], documents=TEXTS)
    assert collection.configuration_json["hnsw"]["space"] == "cosine"
    found = collection.query(query_texts=["capital of China: Peking"], n_results=1)
    assert found["ids"] == [["1"]]


def test_chroma_rebuilds_the_function_from_a_stored_collection(tmp_path: Path) -> None:
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(tmp_path), settings=settings)
    client.create_collection("own", embedding_function=GTEEmbeddingFunction(dimension=128)).add(
        ids=["1"], documents=TEXTS[:1]
    )
    again = client.get_collection("own")
    assert again.query(query_texts=["Peking"], n_results=1)["ids"] == [["1"]]
    assert again.get(include=["embeddings"])["embeddings"].shape == (1, 128)


def test_both_functions_are_registered_and_survive_serialisation() -> None:
    assert known_embedding_functions["gte_rag"] is GTEEmbeddingFunction
    dense = GTEEmbeddingFunction("gte-mini", dimension=64)
    rebuilt = config_to_embedding_function({"type": "known", "name": "gte_rag", "config": dense.get_config()})
    assert rebuilt.get_config() == dense.get_config()
    sparse = GTESparseEmbeddingFunction.build_from_config(GTESparseEmbeddingFunction().get_config())
    assert sparse.name() == "gte_rag_sparse"


def test_sparse_vectors_are_the_encoders(encoder: GTEEncoder) -> None:
    expected = encoder.encode_documents(TEXTS).sparse
    assert expected is not None
    for given, wanted in zip(GTESparseEmbeddingFunction(precision="float32")(TEXTS), expected, strict=True):
        assert dict(zip(given.indices, given.values, strict=True)) == pytest.approx(wanted.to_dict(), abs=1e-6)


def test_dense_and_sparse_of_the_same_texts_cost_one_pass(passes: list[int]) -> None:
    texts = ["one pass for both", "and one only"]
    GTEEmbeddingFunction()(texts)
    GTESparseEmbeddingFunction()(texts)
    assert passes == [2]
    GTESparseEmbeddingFunction().embed_query(["a question"])
    GTEEmbeddingFunction().embed_query(["a question"])
    assert passes == [2, 1]


def test_a_query_is_not_taken_for_a_document_of_the_same_text(passes: list[int]) -> None:
    function = GTEEmbeddingFunction()
    function(["same text, two roles"])
    function.embed_query(["same text, two roles"])
    assert passes == [1, 1]


def test_a_text_costs_one_pass_whatever_the_batches_are(encoder: GTEEncoder, passes: list[int]) -> None:
    shared = SharedEncoder.wrap(encoder)
    dense = shared.dense(["a b", "c d", "e f", "a b"])
    sparse = [shared.sparse(["c d", "a b"]), shared.sparse(["e f", "new one", "new one"])]
    assert passes == [3, 1]
    expected = encoder.encode_documents(["a b", "c d", "e f", "a b"]).dense
    assert expected is not None
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    for given, texts in zip(sparse, [["c d", "a b"], ["e f", "new one", "new one"]], strict=True):
        wanted = encoder.encode_documents(texts).sparse
        assert wanted is not None
        assert [row.indices.tolist() for row in given] == [row.indices.tolist() for row in wanted]
        assert given.shape == wanted.shape


def test_a_vector_that_was_asked_for_is_not_kept(encoder: GTEEncoder) -> None:
    shared = SharedEncoder.wrap(encoder)
    shared.dense(["a b", "c d"])
    assert [len(kept) for kept in shared._kept.values()] == [0, 2]
    shared.sparse(["a b", "c d"])
    assert [len(kept) for kept in shared._kept.values()] == [0, 0]


def test_what_is_kept_is_bounded_but_for_one_large_call(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gte_rag.shared._KEPT_TEXTS", 4)
    shared = SharedEncoder.wrap(encoder)
    for number in range(6):
        shared.dense([f"text {number}"])
    assert len(shared._kept["sparse"]) == 4
    shared.dense([f"many {number}" for number in range(9)])
    assert len(shared._kept["sparse"]) == 9
    shared.dense(["one more"])
    assert len(shared._kept["sparse"]) == 4


def test_dense_and_sparse_asked_for_at_the_same_moment_cost_one_pass(
    encoder: GTEEncoder, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedEncoder.wrap(encoder)
    encode = encoder.encode_documents
    started, asked = threading.Event(), threading.Event()

    def slow(texts: list[str], **options: Any) -> Any:
        started.set()
        assert asked.wait(timeout=10)
        return encode(texts, **options)

    monkeypatch.setattr(encoder, "encode_documents", slow)
    first = threading.Thread(target=shared.dense, args=(["a b"],))
    first.start()
    assert started.wait(timeout=10)
    second = threading.Thread(target=shared.sparse, args=(["a b"],))
    second.start()
    asked.set()
    first.join()
    second.join()
    assert passes == [1]


def test_a_failed_call_leaves_nothing_waiting(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedEncoder.wrap(encoder)
    with monkeypatch.context() as broken:
        broken.setattr(encoder, "encode_documents", lambda texts, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shared.dense(["a b"])
    assert shared.dense(["a b"]).shape == (1, encoder.dimension)


def test_no_texts_give_no_rows(encoder: GTEEncoder) -> None:
    shared = SharedEncoder.wrap(encoder, dimension=64)
    assert shared.dense([]).shape == (0, 64)
    assert shared.sparse([]).shape == (0, encoder.vocab_size)
    assert shared.dense(["a"]).shape == (1, 64)


def test_equal_options_share_one_encoder_even_between_threads() -> None:
    found: list[SharedEncoder] = []
    threads = [
        threading.Thread(target=lambda: found.append(shared_encoder("gte-mini", dimension=96))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(shared) for shared in found}) == 1
    assert len({id(shared.encoder) for shared in found}) == 1


def test_nothing_is_loaded_before_the_first_text() -> None:
    assert shared_encoder("no/such-model", dimension=77)._encoder is None
    GTEEmbeddingFunction("no/such-model", dimension=77)


def test_the_model_of_a_collection_cannot_be_changed() -> None:
    function = GTEEmbeddingFunction()
    with pytest.raises(ValueError, match="made with model_name='gte-mini', not 'other'"):
        function.validate_config_update(function.get_config(), {**function.get_config(), "model_name": "other"})
    with pytest.raises(ValueError, match="unknown options colour"):
        GTEEmbeddingFunction.build_from_config({"colour": "red"})


def test_vectors_are_float32_of_unit_length() -> None:
    vectors = np.array(GTEEmbeddingFunction()(TEXTS))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
