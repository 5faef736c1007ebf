"""GTEHybridRetriever for LangChain: the standard suite, documents in and out, and what it refuses."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("chromadb")
pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

from langchain_core.documents import Document
from langchain_core.prompts import PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableParallel, RunnablePassthrough
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from gte_rag import GTEEncoder
from gte_rag.chroma import HybridCollection
from gte_rag.retriever import HybridRetriever
from langchain_gte import GTEEmbeddings, GTEHybridRetriever

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

pytestmark = pytest.mark.usefixtures("bundled_once")

SCORE_KEYS = {"gte_score", "gte_dense_score", "gte_sparse_score"}
DOCUMENTS = [
    Document("The Great Wall of China is visible from afar.", id="wall", metadata={"lang": "en", "year": 2020}),
    Document("Rust frees memory without a garbage collector.", id="rust", metadata={"lang": "en", "year": 2021}),
    Document("北京是中国的首都。", id="beijing", metadata={"lang": "zh", "year": 2022}),
    Document("Bread is made of flour, water and salt.", id="bread", metadata={"lang": "en", "year": 2023}),
]


@pytest.fixture
def collection(chroma_client: ClientAPI, encoder: GTEEncoder) -> HybridCollection:
    collection = HybridCollection(chroma_client, "documents", encoder=encoder)
    GTEHybridRetriever(collection=collection).add_documents(DOCUMENTS)
    return collection


class TestStandard(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _given(self, collection: HybridCollection) -> None:
        self.collection = collection

    @property
    def retriever_constructor(self) -> type[GTEHybridRetriever]:
        return GTEHybridRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"collection": self.collection}

    @property
    def retriever_query_example(self) -> str:
        return "How is bread made?"


def test_documents_carry_the_record_and_its_scores(collection: HybridCollection) -> None:
    retrieved = GTEHybridRetriever(collection=collection).invoke("garbage collector")
    hits = HybridRetriever(collection).search("garbage collector")
    assert [document.id for document in retrieved] == [hit.id for hit in hits]
    best, hit = retrieved[0], hits[0]
    assert best.id == "rust"
    assert best.page_content == DOCUMENTS[1].page_content
    assert best.metadata == {
        "lang": "en",
        "year": 2021,
        "gte_score": hit.score,
        "gte_dense_score": hit.dense_score,
        "gte_sparse_score": hit.sparse_score,
    }
    assert hit.sparse_score > 0


def test_the_score_keys_are_always_the_retrievers(collection: HybridCollection) -> None:
    collection.upsert(["own"], ["garbage collector"], metadatas=[{"score": "mine", "gte_score": "hidden"}])
    (best,) = GTEHybridRetriever(collection=collection, k=1).invoke("garbage collector")
    assert best.id == "own"
    assert best.metadata["score"] == "mine"
    assert isinstance(best.metadata["gte_score"], float)


def test_scores_can_be_put_into_a_document_prompt(collection: HybridCollection) -> None:
    (best,) = GTEHybridRetriever(collection=collection, k=1).invoke("garbage collector")
    prompt = PromptTemplate.from_template("{page_content} ({gte_score:.1f})")
    assert format_document(best, prompt) == f"{best.page_content} ({best.metadata['gte_score']:.1f})"


def test_retrieved_documents_can_be_stored_again(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection)
    before = collection.get()
    assert set(retriever.add_documents(retriever.invoke("wall"))) == {document.id for document in DOCUMENTS}
    assert collection.get([record.id for record in before]) == before


def test_adding_replaces_by_id_and_invents_missing_ids(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection)
    added = retriever.add_documents([Document("Rust is a colour.", id="rust"), Document("no id"), Document("no id")])
    assert added[0] == "rust"
    assert len(set(added)) == 3
    assert collection.count() == len(DOCUMENTS) + 2
    (record,) = collection.get(["rust"])
    assert (record.text, record.metadata) == ("Rust is a colour.", {})


async def test_documents_are_added_in_a_thread(collection: HybridCollection) -> None:
    ids = await GTEHybridRetriever(collection=collection).aadd_documents([Document("new", id="new")])
    assert ids == ["new"]
    assert collection.get(["new"])[0].text == "new"


def test_from_documents_fills_a_collection(chroma_client: ClientAPI, encoder: GTEEncoder) -> None:
    collection = HybridCollection(chroma_client, "another", encoder=encoder)
    retriever = GTEHybridRetriever.from_documents(DOCUMENTS, collection=collection, k=2)
    assert collection.count() == len(DOCUMENTS)
    assert retriever.invoke("garbage collector")[0].id == "rust"
    assert len(retriever.invoke("anything")) == 2


async def test_options_of_a_call_replace_those_of_the_retriever(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection, k=1, where={"lang": "en"})
    chinese: dict[str, Any] = {"k": 3, "where": {"lang": "zh"}}
    assert len(retriever.invoke("China")) == 1
    assert {document.metadata["lang"] for document in retriever.invoke("中国", k=4)} == {"en"}
    assert [document.id for document in retriever.invoke("China", **chinese)] == ["beijing"]
    assert [document.id for document in await retriever.ainvoke("China", **chinese)] == ["beijing"]
    assert len(await retriever.ainvoke("China", k=2)) == 2
    by_text = retriever.invoke("China", k=4, where_document={"$contains": "flour"})
    assert [document.id for document in by_text] == ["bread"]


def test_k_may_be_changed_and_the_model_of_ranking_may_not(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection)
    retriever.k = 2
    assert len(retriever.invoke("China")) == 2
    with pytest.raises(ValidationError, match="frozen"):
        retriever.sparse_weight = 0.5


def test_weights_reach_the_ranking(collection: HybridCollection) -> None:
    (best,) = GTEHybridRetriever(collection=collection, k=1, dense_weight=2.0, sparse_weight=0.0).invoke("bread")
    assert best.metadata["gte_score"] == pytest.approx(2 * best.metadata["gte_dense_score"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"mode": "guess"}, "mode is 'guess'; available: "),
        ({"fusion": "sum"}, "fusion is 'sum'; available: "),
        ({"sparse_weight": -1.0}, "sparse_weight is -1.0; it must be"),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_bad_options_are_refused_when_the_retriever_is_made(
    collection: HybridCollection, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GTEHybridRetriever(collection=collection, **options)


async def test_bad_options_of_a_call_are_refused(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        retriever.invoke("q", k=0)
    with pytest.raises(TypeError, match="top_k"):
        retriever.invoke("q", top_k=3)
    with pytest.raises(TypeError, match="top_k"):
        await retriever.ainvoke("q", top_k=3)


def test_only_a_hybrid_collection_is_searched() -> None:
    with pytest.raises(ValueError, match="HybridCollection"):
        GTEHybridRetriever(collection="documents")  # type: ignore[arg-type]


def test_metadata_that_chroma_cannot_hold_is_refused(collection: HybridCollection) -> None:
    with pytest.raises(ValueError, match=r"metadatas\[0\]\['nested'\]"):
        GTEHybridRetriever(collection=collection).add_documents([Document("t", metadata={"nested": {"a": 1}})])


def _texts(documents: list[Document]) -> list[str]:
    return [document.page_content for document in documents]


def test_it_is_a_step_of_a_chain(collection: HybridCollection) -> None:
    retriever = GTEHybridRetriever(collection=collection, k=1)
    chain: Runnable[str, Any] = RunnableParallel(context=retriever | _texts, question=RunnablePassthrough())
    assert chain.invoke("garbage collector") == {
        "context": [DOCUMENTS[1].page_content],
        "question": "garbage collector",
    }


def test_it_shares_the_encoder_with_the_embeddings(chroma_client: ClientAPI, encoder: GTEEncoder) -> None:
    embeddings = GTEEmbeddings(encoder=encoder)
    collection = HybridCollection(chroma_client, "shared", encoder=embeddings.encoder)
    (best,) = GTEHybridRetriever.from_documents(DOCUMENTS[:1], collection=collection).invoke("wall")
    cosine = sum(
        a * b
        for a, b in zip(embeddings.embed_query("wall"), embeddings.embed_documents([best.page_content])[0], strict=True)
    )
    assert best.metadata["gte_dense_score"] == pytest.approx(cosine, abs=1e-5)


async def test_searching_does_not_block_the_event_loop(
    collection: HybridCollection, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    encode_queries = encoder.encode_queries

    def wait_for_the_loop(texts: list[str], **options: Any) -> Any:
        ticked = threading.Event()
        loop.call_soon_threadsafe(ticked.set)
        assert ticked.wait(timeout=10), "the event loop stood still during a search"
        return encode_queries(texts, **options)

    monkeypatch.setattr(encoder, "encode_queries", wait_for_the_loop)
    assert len(await GTEHybridRetriever(collection=collection).ainvoke("wall", k=1)) == 1
