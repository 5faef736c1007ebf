"""Clients of services in the adapters: they take the place of the local encoder and reranker."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from gte_rag import DashScopeEncoder, DashScopeReranker
from scripted_server import Answer, Request, ScriptedServer, scripted_server

pytest.importorskip("httpx")

KEY = "sk-very-secret-0123456789"


def answer(request: Request) -> Answer:
    """Give the same vectors for every text, and the better score to the later one."""
    if "rerank" in request.path:
        results = [
            {"index": index, "relevance_score": index / 10} for index in range(len(request.body["input"]["documents"]))
        ]
        return Answer(body={"output": {"results": results}})
    item = {"embedding": [3.0, 4.0] + [0.0] * 62, "sparse_embedding": [{"index": 5, "value": 0.5, "token": "a"}]}
    return Answer(
        body={"output": {"embeddings": [{"text_index": n, **item} for n in range(len(request.body["input"]["texts"]))]}}
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    monkeypatch.setenv("DASHSCOPE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with scripted_server() as running:
        running.script = [answer]
        yield running


async def test_langchain_embeds_by_a_service_and_shares_its_requests(server: ScriptedServer) -> None:
    pytest.importorskip("langchain_qdrant")
    from langchain_gte import GTEEmbeddings, GTESparseEmbeddings

    embeddings = GTEEmbeddings(encoder=DashScopeEncoder(base_url=server.url, dimension=64))
    assert embeddings.embed_query("q")[:2] == pytest.approx([0.6, 0.8])
    assert (await embeddings.aembed_documents(["d"]))[0][:2] == pytest.approx([0.6, 0.8])
    assert [request.body["parameters"]["text_type"] for request in server.requests] == ["query", "document"]
    server.requests.clear()
    sparse = GTESparseEmbeddings(embeddings)
    embeddings.embed_documents(["d"])
    assert sparse.embed_documents(["d"])[0].indices == [5]
    assert len(server.requests) == 1
    pickled = pickle.dumps(embeddings)
    assert KEY.encode() not in pickled
    assert pickle.loads(pickled).embed_query("q")[:2] == pytest.approx([0.6, 0.8])


def test_llama_index_embeds_by_a_service(server: ScriptedServer) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.embeddings.gte import GTEEmbedding

    embed_model = GTEEmbedding(encoder=DashScopeEncoder(base_url=server.url, dimension=64))
    assert embed_model.get_text_embedding("d")[:2] == pytest.approx([0.6, 0.8])
    pickled = pickle.dumps(embed_model)
    assert KEY.encode() not in pickled
    assert pickle.loads(pickled).get_query_embedding("q")[:2] == pytest.approx([0.6, 0.8])


def test_both_frameworks_rerank_by_a_service(server: ScriptedServer) -> None:
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    from langchain_gte import GTERerank
    from llama_index.postprocessor.gte import GTERerank as NodeRerank

    reranker = DashScopeReranker(base_url=server.url)
    (document,) = GTERerank(reranker=reranker, top_n=1).compress_documents([Document("a"), Document("b")], "q")
    assert document.page_content == "b"
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("a", "b")]
    (node,) = NodeRerank(reranker=reranker, top_n=1).postprocess_nodes(nodes, query_str="q")
    assert node.node.get_content() == "b"
