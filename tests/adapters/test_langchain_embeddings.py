"""GTEEmbeddings: LangChain's own suites, the drop-in promise, and what it refuses."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

from langchain_core.runnables import RunnableLambda
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from gte_rag import CheckpointError, GTEEncoder
from langchain_gte import GTEEmbeddings

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

TEXTS = ["The Great Wall is in China.", "Rust has no garbage collector.", "北京是中国的首都", ""]


class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[GTEEmbeddings]:
        return GTEEmbeddings


class TestStandardIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[GTEEmbeddings]:
        return GTEEmbeddings


@pytest.fixture
def embeddings(encoder: GTEEncoder) -> GTEEmbeddings:
    return GTEEmbeddings(encoder=encoder)


def call_first(
    encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch, first: Callable[[Sequence[str], dict[str, Any]], None]
) -> None:
    """Call `first` with texts and options before the encoder encodes anything."""
    for name in ("encode_queries", "encode_documents"):
        monkeypatch.setattr(encoder, name, partial(_call_first, first, getattr(encoder, name)))


def _call_first(first: Any, encode: Any, texts: Sequence[str], **options: Any) -> Any:
    first(texts, options)
    return encode(texts, **options)


@pytest.fixture
def loaded(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every load; what is loaded is the bundled encoder."""
    calls: list[dict[str, Any]] = []

    def from_pretrained(name_or_path: str, **options: Any) -> GTEEncoder:
        calls.append({"name_or_path": name_or_path, **options})
        return encoder

    monkeypatch.setattr(GTEEncoder, "from_pretrained", from_pretrained)
    return calls


def test_vectors_are_those_of_the_encoder(embeddings: GTEEmbeddings, encoder: GTEEncoder) -> None:
    documents = encoder.encode_documents(TEXTS, sparse=False).dense
    query = encoder.encode_queries(TEXTS[:1], sparse=False).dense
    assert documents is not None
    assert query is not None
    assert embeddings.embed_documents(TEXTS) == documents.tolist()
    assert embeddings.embed_query(TEXTS[0]) == query[0].tolist()


async def test_async_vectors_are_the_same(embeddings: GTEEmbeddings) -> None:
    assert await embeddings.aembed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
    assert await embeddings.aembed_query(TEXTS[0]) == embeddings.embed_query(TEXTS[0])


def test_no_documents_give_no_vectors(embeddings: GTEEmbeddings) -> None:
    assert embeddings.embed_documents([]) == []


def test_texts_reach_the_encoder_unchanged(
    embeddings: GTEEmbeddings, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    call_first(encoder, monkeypatch, lambda texts, options: seen.extend(texts))
    embeddings.embed_documents(["two\nlines "])
    embeddings.embed_query("\tq\n")
    assert seen == ["two\nlines ", "\tq\n"]


def test_queries_and_documents_take_the_checkpoints_prompts(
    embeddings: GTEEmbeddings, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embeddings.embed_documents(["query: wall", "passage: wall"])
    monkeypatch.setattr(encoder, "query_prompt", "query: ")
    monkeypatch.setattr(encoder, "document_prompt", "passage: ")
    np.testing.assert_allclose(embeddings.embed_query("wall"), plain[0], atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_documents(["wall"])[0], plain[1], atol=1e-6)


def test_replacing_only_the_class_name_is_enough(loaded: list[dict[str, Any]]) -> None:
    embeddings = GTEEmbeddings(
        model_name="Alibaba-NLP/gte-multilingual-base",
        model_kwargs={"device": "cpu", "trust_remote_code": True, "revision": "main", "truncate_dim": 128},
        encode_kwargs={"normalize_embeddings": True, "batch_size": 8},
        cache_folder="models",
    )
    assert loaded == [
        {
            "name_or_path": "Alibaba-NLP/gte-multilingual-base",
            "device": "cpu",
            "precision": "auto",
            "dimension": 128,
            "max_length": 8192,
            "revision": "main",
            "cache_dir": "models",
            "local_files_only": False,
        }
    ]
    vector = embeddings.embed_query("q")
    assert len(vector) == 128
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_model_is_another_name_for_model_name(loaded: list[dict[str, Any]]) -> None:
    assert GTEEmbeddings(model="some/model").model_name == "some/model"
    assert loaded[0]["name_or_path"] == "some/model"


def test_an_option_given_twice_alike_is_accepted(loaded: list[dict[str, Any]]) -> None:
    GTEEmbeddings(device="cpu", model_kwargs={"device": "cpu"})
    assert loaded[0]["device"] == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_kwargs": {"torch_dtype": "float16"}}, "model_kwargs has 'torch_dtype'; understood here: device, "),
        ({"device": "cpu", "model_kwargs": {"device": "cuda"}}, "device is 'cpu' and .* is 'cuda'; give one of them"),
        ({"model_kwargs": {"truncate_dim": "all"}}, "dimension"),
        ({"encode_kwargs": {"prompt_name": "query"}}, "'prompt_name' not understood; accepted here: normalize_"),
        ({"query_encode_kwargs": {"prompt": "q"}}, "'prompt' not understood; accepted here: normalize_embeddings"),
        ({"encode_kwargs": {"normalize_embeddings": False}}, "normalize_embeddings must be True"),
        ({"multi_process": True}, "multi_process must be False: run one process per device"),
        ({"max_lenght": 512}, "max_lenght"),
        ({"dimension": 3}, "dimension is 3; this model gives dense vectors of"),
        ({"precision": "int3"}, "precision is 'int3'; accepted"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GTEEmbeddings(**options)


def test_a_missing_model_raises_the_cores_own_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GTEEmbeddings(model_name=str(tmp_path))


def test_a_single_string_is_not_a_list_of_documents(embeddings: GTEEmbeddings) -> None:
    with pytest.raises(TypeError, match="str"):
        embeddings.embed_documents("one text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="None"):
        embeddings.embed_query(None)  # type: ignore[arg-type]


def test_a_ready_made_encoder_is_shared_and_described(encoder: GTEEncoder) -> None:
    embeddings = GTEEmbeddings(encoder=encoder, dimension=64, show_progress=True)
    assert embeddings.encoder is encoder
    assert embeddings.model_name == "gte-mini"
    assert embeddings.device == str(encoder.device)
    assert len(embeddings.embed_query("q")) == 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cpu"}, ValueError, "^device: decided by the encoder"),
        ({"model": "gte-mini", "max_length": 9}, ValueError, "^model_name, max_length: decided by the encoder"),
        ({"dimension": 100_000}, ValueError, "dimension is 100000; this model gives"),
    ],
)
def test_options_that_contradict_a_ready_made_encoder_are_refused(
    encoder: GTEEncoder, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GTEEmbeddings(encoder=encoder, **options)


def test_only_an_encoder_is_an_encoder() -> None:
    with pytest.raises(TypeError, match=r"encoder is str; give a gte_rag\.GTEEncoder"):
        GTEEmbeddings(encoder="gte-mini")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "documents", "queries"),
    [
        ({}, False, False),
        ({"show_progress": True}, True, True),
        ({"encode_kwargs": {"show_progress_bar": True}}, True, True),
        ({"encode_kwargs": {"show_progress_bar": True}, "query_encode_kwargs": {"batch_size": 1}}, True, False),
        ({"show_progress": True, "query_encode_kwargs": {"show_progress_bar": False}}, True, False),
    ],
)
def test_progress_follows_the_options_of_each_kind_of_text(
    encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], documents: bool, queries: bool
) -> None:
    embeddings = GTEEmbeddings(encoder=encoder, **options)
    shown: list[bool] = []
    call_first(encoder, monkeypatch, lambda texts, options: shown.append(options["show_progress"]))
    embeddings.embed_documents(["d"])
    embeddings.embed_query("q")
    assert shown == [documents, queries]


def test_a_pickle_is_small_and_loads_the_same_model(encoder: GTEEncoder) -> None:
    embeddings = GTEEmbeddings(encoder=encoder, dimension=64)
    pickled = pickle.dumps(embeddings)
    assert len(pickled) < 2000
    restored = pickle.loads(pickled)
    assert restored.model_dump() == embeddings.model_dump()
    assert restored.encoder is not encoder
    assert restored.embed_documents(TEXTS) == embeddings.embed_documents(TEXTS)


def test_a_pickle_refuses_another_model_of_the_same_name(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setitem(encoder.__dict__, "fingerprint", "0123456789abcdef")
        pickled = pickle.dumps(GTEEmbeddings(encoder=encoder))
    with pytest.raises(CheckpointError, match=r"'gte-mini' is another model .* and was 0123456789abcdef"):
        pickle.loads(pickled)


async def test_embedding_does_not_block_the_event_loop(
    embeddings: GTEEmbeddings, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()

    def wait_for_the_loop(texts: Sequence[str], options: dict[str, Any]) -> None:
        ticked = threading.Event()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(timeout=10), "the event loop stood still while a text was embedded"

    call_first(encoder, monkeypatch, wait_for_the_loop)
    assert len(await embeddings.aembed_documents(["d"])) == 1
    assert len(await embeddings.aembed_query("q")) == encoder.dimension


def test_it_is_a_step_of_a_chain(embeddings: GTEEmbeddings) -> None:
    chain = RunnableLambda(embeddings.embed_query) | RunnableLambda(len)
    assert chain.invoke("q") == embeddings.encoder.dimension


def test_it_serves_langchains_chroma_store(embeddings: GTEEmbeddings, chroma_client: ClientAPI) -> None:
    langchain_chroma = pytest.importorskip("langchain_chroma")
    store = langchain_chroma.Chroma(collection_name="texts", embedding_function=embeddings, client=chroma_client)
    store.add_texts(TEXTS[:3], ids=["wall", "rust", "beijing"])
    assert [document.id for document in store.similarity_search(TEXTS[1], k=1)] == ["rust"]
