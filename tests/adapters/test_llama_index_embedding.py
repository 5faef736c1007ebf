"""GTEEmbedding for LlamaIndex: vectors, persistence, pickling, pipelines, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document, Settings, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

from gte_rag import CheckpointError, GTEEncoder
from llama_index.embeddings.gte import GTEEmbedding

TEXTS = ["The Great Wall is in China.", "Rust has no garbage collector.", "北京是中国的首都", "line\nbreak"]


@pytest.fixture
def embedding(encoder: GTEEncoder) -> GTEEmbedding:
    return GTEEmbedding(encoder=encoder)


@pytest.fixture
def loaded(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every load; what is loaded is the bundled encoder."""
    calls: list[dict[str, Any]] = []

    def from_pretrained(name_or_path: str, **options: Any) -> GTEEncoder:
        calls.append({"name_or_path": name_or_path, **options})
        return encoder

    monkeypatch.setattr(GTEEncoder, "from_pretrained", from_pretrained)
    return calls


def call_first(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch, first: Callable[[Sequence[str]], None]) -> None:
    """Call `first` with the texts before the encoder encodes anything."""
    for name in ("encode_queries", "encode_documents"):
        monkeypatch.setattr(encoder, name, partial(_call_first, first, getattr(encoder, name)))


def _call_first(first: Any, encode: Any, texts: Sequence[str], **options: Any) -> Any:
    first(texts)
    return encode(texts, **options)


def test_no_arguments_give_the_bundled_model(encoder: GTEEncoder) -> None:
    embedding = GTEEmbedding()
    assert embedding.model_name == "gte-mini"
    assert embedding.encoder.fingerprint == encoder.fingerprint


def test_vectors_are_those_of_the_encoder(embedding: GTEEmbedding, encoder: GTEEncoder) -> None:
    documents = encoder.encode_documents(TEXTS, sparse=False).dense
    assert documents is not None
    assert embedding.get_text_embedding_batch(TEXTS) == documents.tolist()
    np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[0]), documents[0], atol=1e-6)
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[0]), documents[0], atol=1e-6)  # gte has no prompts


async def test_async_vectors_are_the_same(embedding: GTEEmbedding) -> None:
    assert await embedding.aget_text_embedding_batch(TEXTS) == embedding.get_text_embedding_batch(TEXTS)
    assert await embedding.aget_text_embedding(TEXTS[0]) == embedding.get_text_embedding(TEXTS[0])
    assert await embedding.aget_query_embedding(TEXTS[0]) == embedding.get_query_embedding(TEXTS[0])


def test_queries_and_documents_take_the_checkpoints_prompts(
    embedding: GTEEmbedding, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embedding.get_text_embedding_batch(["query: wall", "passage: wall"])
    monkeypatch.setattr(encoder, "query_prompt", "query: ")
    monkeypatch.setattr(encoder, "document_prompt", "passage: ")
    np.testing.assert_allclose(embedding.get_query_embedding("wall"), plain[0], atol=1e-6)
    np.testing.assert_allclose(embedding.get_text_embedding("wall"), plain[1], atol=1e-6)


async def test_texts_of_a_batch_are_encoded_together(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = GTEEmbedding(encoder=encoder, embed_batch_size=3)
    sizes: list[int] = []
    call_first(encoder, monkeypatch, lambda texts: sizes.append(len(texts)))
    embedding.get_text_embedding_batch(TEXTS)
    await embedding.aget_text_embedding_batch(TEXTS)
    assert sorted(sizes) == [1, 1, 3, 3]


async def test_embedding_does_not_block_the_event_loop(
    embedding: GTEEmbedding, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()

    def wait_for_the_loop(texts: Sequence[str]) -> None:
        ticked = threading.Event()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(timeout=10), "the event loop stood still while a text was embedded"

    call_first(encoder, monkeypatch, wait_for_the_loop)
    calls: list[Callable[[], Any]] = [
        lambda: embedding.aget_text_embedding_batch(TEXTS),
        lambda: embedding.aget_text_embedding("d"),
        lambda: embedding.aget_query_embedding("q"),
    ]
    for call in calls:
        assert len(await call()) > 0


async def test_loading_after_unpickling_does_not_block_the_event_loop_and_happens_once(
    embedding: GTEEmbedding, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored = pickle.loads(pickle.dumps(embedding))
    restored.embed_batch_size = 1
    loop = asyncio.get_running_loop()
    loads: list[str] = []

    def from_pretrained(name_or_path: str, **options: Any) -> GTEEncoder:
        loads.append(name_or_path)
        ticked = threading.Event()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(timeout=10), "the event loop stood still while the model was loaded"
        time.sleep(0.1)  # the other batches arrive meanwhile
        return encoder

    monkeypatch.setattr(GTEEncoder, "from_pretrained", from_pretrained)
    assert len(await restored.aget_text_embedding_batch(TEXTS)) == len(TEXTS)
    assert loads == ["gte-mini"]


def test_options_reach_the_encoder(loaded: list[dict[str, Any]]) -> None:
    embedding = GTEEmbedding(
        "Alibaba-NLP/gte-multilingual-base",
        cache_folder="models",
        device="cpu",
        max_length=512,
        dimension=128,
        revision="main",
        local_files_only=True,
        trust_remote_code=True,
    )
    assert loaded == [
        {
            "name_or_path": "Alibaba-NLP/gte-multilingual-base",
            "device": "cpu",
            "precision": "auto",
            "dimension": 128,
            "max_length": 512,
            "revision": "main",
            "cache_dir": "models",
            "local_files_only": True,
        }
    ]
    vector = embedding.get_query_embedding("q")
    assert len(vector) == 128
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_a_dict_round_trip_keeps_every_option(loaded: list[dict[str, Any]]) -> None:
    embedding = GTEEmbedding("some/model", dimension=64, max_length=99, embed_batch_size=7, num_workers=2)
    stored = json.loads(json.dumps(embedding.to_dict()))
    assert stored["class_name"] == GTEEmbedding.class_name() == "GTEEmbedding"
    restored = GTEEmbedding.from_dict(stored)
    assert restored.to_dict() == embedding.to_dict()
    assert (restored.embed_batch_size, restored.num_workers) == (7, 2)
    assert GTEEmbedding.from_json(embedding.to_json()).to_dict() == embedding.to_dict()
    assert loaded[0] == loaded[1] == loaded[2]


def test_a_ready_made_encoder_is_shared_and_described(encoder: GTEEncoder) -> None:
    embedding = GTEEmbedding(encoder=encoder, dimension=64)
    assert embedding.encoder is encoder
    assert embedding.device == str(encoder.device)
    assert len(embedding.get_query_embedding("q")) == 64
    assert GTEEmbedding.from_dict(embedding.to_dict()).get_query_embedding("q") == embedding.get_query_embedding("q")


def test_a_pickle_is_small_and_loads_the_model_when_it_is_needed(encoder: GTEEncoder) -> None:
    embedding = GTEEmbedding(encoder=encoder, dimension=64)
    pickled = pickle.dumps(embedding)
    assert len(pickled) < 2000
    restored = pickle.loads(pickled)
    assert restored._encoder is None
    assert restored.to_dict() == embedding.to_dict()
    assert len(pickle.dumps(restored)) == len(pickled)
    assert restored.get_text_embedding_batch(TEXTS) == embedding.get_text_embedding_batch(TEXTS)


def test_a_pickle_leaves_callbacks_behind(encoder: GTEEncoder) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    handler.lock = threading.Lock()  # type: ignore[attr-defined]  # cannot be pickled
    embedding = GTEEmbedding(encoder=encoder, embed_batch_size=5, callback_manager=CallbackManager([handler]))
    embedding.get_query_embedding("q")
    assert handler.get_event_pairs()
    restored = pickle.loads(pickle.dumps(embedding))
    assert restored.callback_manager.handlers == []
    assert restored.embed_batch_size == 5


def test_a_pickle_refuses_another_model_of_the_same_name(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setitem(encoder.__dict__, "fingerprint", "0123456789abcdef")
        restored = pickle.loads(pickle.dumps(GTEEmbedding(encoder=encoder)))
    with pytest.raises(CheckpointError, match=r"'gte-mini' is another model .* and was 0123456789abcdef"):
        restored.get_query_embedding("q")


def test_an_index_is_built_persisted_loaded_and_queried(embedding: GTEEmbedding, tmp_path: Path) -> None:
    documents = [Document(text=text, id_=f"d{number}") for number, text in enumerate(TEXTS)]
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    index.storage_context.persist(tmp_path)
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path))
    restored = load_index_from_storage(storage, embed_model=embedding)
    for searched in (index, restored):
        (best,) = searched.as_retriever(similarity_top_k=1).retrieve("garbage collector in Rust")
        assert best.node.ref_doc_id == "d1"


async def test_it_serves_as_the_global_embedding_model(
    embedding: GTEEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_embed_model", None)
    Settings.embed_model = embedding
    index = VectorStoreIndex([TextNode(text=text, id_=text) for text in TEXTS])
    (best,) = await index.as_retriever(similarity_top_k=1).aretrieve("garbage collector in Rust")
    assert best.node.node_id == TEXTS[1]


async def test_an_ingestion_pipeline_embeds_what_the_model_embeds(embedding: GTEEmbedding) -> None:
    expected = embedding.get_text_embedding_batch(TEXTS)
    nodes = IngestionPipeline(transformations=[embedding]).run(nodes=[TextNode(text=text) for text in TEXTS])
    assert [node.embedding for node in nodes] == expected
    nodes = await IngestionPipeline(transformations=[embedding]).arun(nodes=[TextNode(text=text) for text in TEXTS])
    assert [node.embedding for node in nodes] == expected


def test_worker_processes_of_a_pipeline_load_the_model_themselves(embedding: GTEEmbedding) -> None:
    nodes = IngestionPipeline(transformations=[embedding]).run(
        nodes=[TextNode(text=text) for text in TEXTS], num_workers=2
    )
    assert [node.get_content() for node in nodes] == TEXTS
    np.testing.assert_allclose(
        [node.embedding or [] for node in nodes], embedding.get_text_embedding_batch(TEXTS), atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalize": False}, ValueError, "normalize must be True"),
        ({"dimension": 3}, ValueError, "dimension is 3; this model gives dense vectors of"),
        ({"max_length": 2}, ValueError, "max_length is 2; this model reads"),
        ({"precision": "int3"}, ValueError, "precision is 'int3'; accepted"),
        ({"embed_batch_size": 0}, ValueError, "embed_batch_size"),
        ({"pooling": "mean"}, TypeError, "pooling"),
        ({"encoder": "gte-mini"}, TypeError, r"encoder is str; give a gte_rag\.GTEEncoder"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GTEEmbedding(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "other"}, "encoder is given beside model_name"),
        ({"device": "cpu"}, "encoder is given beside model_name, .* device"),
        ({"dimension": 100_000}, "dimension is 100000; this model gives"),
    ],
)
def test_options_that_contradict_a_ready_made_encoder_are_refused(
    encoder: GTEEncoder, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GTEEmbedding(encoder=encoder, **options)


def test_a_missing_model_raises_the_cores_own_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GTEEmbedding(str(tmp_path))


def test_only_strings_are_embedded(embedding: GTEEmbedding) -> None:
    with pytest.raises(TypeError, match="None"):
        embedding.get_query_embedding(None)
    with pytest.raises(TypeError, match="int"):
        embedding.get_text_embedding_batch([1])
