"""Evaluation: the same figures as a slow oracle, each text encoded once, and MTEB on a task in memory."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ir_measures")

from gte_rag.datasets import BitextSet, RetrievalSet, SimilaritySet
from gte_rag.errors import MissingExtraError
from gte_rag.evaluation import MODES, as_mteb, evaluate, judge, judged
from gte_rag.exact import best_rows, cut, fused
from gte_rag.fusion import FUSIONS, weighted
from gte_rag.results import Result
from gte_rag.tuning import ndcg
from gte_rag.vectors import Encoding, FloatArray
from stub_encoder import StubEncoder, words

WORDS = ["port", "bread", "city", "river", "mountain", "king", "song", "letter", "stone", "winter"]


class Untied(StubEncoder):
    """The stand-in with vectors of which no two texts have the same, so that there is one right order."""

    def weights(self, text: str) -> dict[str, float]:
        factors = {word: 1 + zlib.crc32(f"{word} in {text}".encode()) % 997 / 997 for word in words(text)}
        return {word: weight * factors[word] for word, weight in super().weights(text).items()}

    def dense(self, text: str) -> FloatArray:
        vector = np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dimension)
        unit: FloatArray = (vector / np.linalg.norm(vector)).astype(np.float32)
        return unit


@pytest.fixture(scope="module")
def dataset() -> RetrievalSet:
    """60 passages, 12 queries, grades 0 to 2."""
    random = np.random.default_rng(5)
    corpus = {f"p{number}": " ".join(random.choice(WORDS, 6)) for number in range(60)}
    queries = {f"q{number}": " ".join(random.choice(WORDS, 2)) for number in range(12)}
    qrels = {
        query: {f"p{row}": int(random.integers(0, 3)) for row in random.choice(60, 8, replace=False)} | {"p0": 1}
        for query in queries
    }
    return RetrievalSet("words", corpus, queries, qrels)


def oracle(
    dataset: RetrievalSet, mode: str, dimension: int, depth: int, sparse_weight: float = 0.3
) -> dict[str, list[str]]:
    """Rank one passage at a time, straight from the definitions of the modes."""
    encoder = Untied()
    rankings = {}
    for query, text in dataset.queries.items():
        asked = encoder.weights(text)
        dense, sparse = {}, {}
        for passage, content in dataset.corpus.items():
            one, other = encoder.dense(text)[:dimension], encoder.dense(content)[:dimension]
            dense[passage] = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            sparse[passage] = sum(weight * encoder.weights(content).get(word, 0) for word, weight in asked.items())
        nearest = sorted(dense, key=lambda p: -dense[p])[:depth]
        lexical = [p for p in sorted(sparse, key=lambda p: -sparse[p]) if sparse[p] > 0][:depth]
        pool = {"dense": nearest, "rescore": nearest, "sparse": lexical}.get(
            mode, nearest + [p for p in lexical if p not in nearest]
        )
        score = {
            p: (dense[p] if mode != "hybrid" or p in nearest else 0) * (mode != "sparse")
            + (sparse[p] if mode != "hybrid" or p in lexical else 0)
            * {"dense": 0.0, "sparse": 1.0}.get(mode, sparse_weight)
            for p in pool
        }
        rankings[query] = sorted(pool, key=lambda p: -score[p])[:100]
    return rankings


def test_ids_that_are_no_c_strings_are_told_apart() -> None:
    ids = ["a\0b", "a\0c", "\ud800", "", "a b", "a\tb"]
    for right in ids:
        dataset = RetrievalSet("odd", dict.fromkeys(ids, "text"), {right: "?"}, {right: {right: 1}})
        for first in ids:
            scores, per_query = judge({right: [first]}, dataset)
            assert scores["ndcg@10"] == (first == right)
            assert per_query["ndcg@10"] == {right: first == right}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dimension", [8, 32])
def test_every_mode_reaches_what_a_slow_oracle_reaches(dataset: RetrievalSet, mode: str, dimension: int) -> None:
    results = evaluate(Untied(), dataset, modes=[mode], dimensions=[dimension], candidates=15)
    depth = 100 if mode in ("dense", "sparse") else 15
    expected, _ = judge(oracle(dataset, mode, dimension, depth), dataset)
    assert results[0].scores == pytest.approx(expected)


def test_the_papers_hybrid_counts_a_missing_component_as_nothing() -> None:
    found = Candidates.of(dense=[0.9, 0.5, 0.4], sparse=[1.0, 0.0, 9.0], nearest=[0, 1], lexical=[2])

    def fuse(dense: Any, sparse: Any) -> Any:
        return weighted(dense, sparse, dense_weight=1.0, sparse_weight=0.01)

    assert dict(zip(*fused(found, "hybrid", "weighted", fuse), strict=True)) == pytest.approx({0: 0.9, 1: 0.5, 2: 0.09})
    assert dict(zip(*fused(found, "union", "weighted", fuse), strict=True)) == pytest.approx({0: 0.91, 1: 0.5, 2: 0.49})
    assert dict(zip(*fused(found, "rescore", "weighted", fuse), strict=True)) == pytest.approx({0: 0.91, 1: 0.5})


class Candidates:
    """Makes the argument of `fused` from small lists."""

    @staticmethod
    def of(*, dense: list[float], sparse: list[float], nearest: list[int], lexical: list[int]) -> Any:
        from gte_rag.exact import Found

        rows = np.arange(len(dense))
        scores = np.array(dense, dtype=np.float32), np.array(sparse, dtype=np.float32)
        return Found(rows, *scores, np.isin(rows, nearest), np.isin(rows, lexical))


def test_each_text_is_encoded_once_for_all_modes_dimensions_and_fusions(dataset: RetrievalSet) -> None:
    encoder = StubEncoder()
    results = evaluate(encoder, dataset, dimensions=[8, 16, 32], fusions=["weighted", "reciprocal_rank"])
    assert encoder.document_calls == [list(dataset.corpus.values())]
    assert encoder.query_calls == [list(dataset.queries.values())]
    assert len(results) == 3 + 1 + 3 * 3 * 2  # dense; sparse once; three modes with two fusions
    assert len({result.method for result in results}) == len(results)


def test_every_fusion_works_in_every_mode_with_two_scores(dataset: RetrievalSet) -> None:
    results = evaluate(
        StubEncoder(), dataset, modes=["hybrid", "rescore", "union"], fusions=list(FUSIONS), candidates=20
    )
    assert {(result.mode, result.fusion) for result in results} == {
        (mode, fusion) for mode in ("hybrid", "rescore", "union") for fusion in FUSIONS
    }
    assert all(0.2 < result.scores["recall@20"] <= 1 for result in results)


def test_ndcg_is_that_of_the_definition_and_ties_keep_our_order(dataset: RetrievalSet) -> None:
    rankings = {query: list(reversed(list(dataset.corpus))) for query in dataset.queries}
    means, per_query = judge(rankings, dataset)
    for query, value in per_query["ndcg@10"].items():
        assert value == pytest.approx(ndcg(rankings[query], dataset.qrels[query]))
    assert means["ndcg@10"] == pytest.approx(np.mean(list(per_query["ndcg@10"].values())))
    result = judged({"q0": rankings["q0"]}, dataset, model="bm25")
    assert result.scores["ndcg@10"] == pytest.approx(per_query["ndcg@10"]["q0"] / 12)  # the others found nothing
    with pytest.raises(ValueError, match="more than once for the query 'q0'"):
        judge({"q0": ["p1", "p1"]}, dataset)


def test_a_query_need_not_find_itself(dataset: RetrievalSet) -> None:
    twin = RetrievalSet("twin", dataset.corpus, {"p3": dataset.corpus["p3"]}, {"p3": {"p4": 1}})
    with_it, without = (
        evaluate(Untied(), twin, modes=["dense"], skip_same_id=skip)[0].scores["mrr@10"] for skip in (False, True)
    )
    rank = evaluate_rank(twin)
    assert with_it == (1 / rank if rank <= 10 else 0)
    assert without == (1 / (rank - 1) if rank <= 11 else 0)


def evaluate_rank(dataset: RetrievalSet) -> int:
    return oracle(dataset, "dense", 32, 100)["p3"].index("p4") + 1


class Fixed:
    """An encoder of given vectors."""

    name, has_sparse = "fixed", False

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self.vectors = vectors

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True) -> Any:
        rows = np.array([self.vectors[text] for text in texts], dtype=np.float32)
        return Encoding(rows / np.linalg.norm(rows, axis=1, keepdims=True), None)

    def encode_documents(self, texts: Sequence[str], *, show_progress: bool = False, **options: bool) -> Any:
        return self.encode_queries(texts)


def test_bitext_is_scored_in_both_directions_as_by_mteb() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    texts = [f"{number}" for number in range(30)]
    sources = random.normal(size=(30, 6))
    targets = sources + random.normal(size=(30, 6)) * 0.9
    vectors = {f"s{t}": row for t, row in zip(texts, sources, strict=True)}
    vectors |= {f"t{t}": row for t, row in zip(texts, targets, strict=True)}
    pairs = BitextSet("b", [f"s{t}" for t in texts], [f"t{t}" for t in texts])
    scores = evaluate(Fixed(vectors), pairs)[0].scores
    one, other = cut(sources.astype(np.float32), 6), targets / np.linalg.norm(targets, axis=1, keepdims=True)
    cosines = one / np.linalg.norm(one, axis=1, keepdims=True) @ other.T
    for suffix, matrix in (("", cosines), ("_back", cosines.T)):
        nearest = matrix.argmax(1)
        assert scores[f"accuracy{suffix}"] == pytest.approx((nearest == np.arange(30)).mean())
        expected = sklearn.f1_score(np.arange(30), nearest, average="weighted", zero_division=0)
        assert scores[f"f1{suffix}"] == pytest.approx(expected)
    assert 0.2 < scores["f1"] < 1


def test_equal_translations_are_both_right() -> None:
    vectors = {"ja": [1.0, 0.0], "doch": [0.9, 0.1], "nein": [0.0, 1.0], "yes": [1.0, 0.05], "no": [0.0, 1.0]}
    pairs = BitextSet("b", ["ja", "doch", "nein"], ["yes", "yes", "no"])
    assert evaluate(Fixed(vectors), pairs)[0].scores["f1"] == 1.0


def test_similarity_is_spearmans_correlation() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(2)
    vectors = {f"{number}": row for number, row in enumerate(random.normal(size=(40, 5)))}
    texts = list(vectors)
    pairs = SimilaritySet("s", random.integers(0, 6, 20).astype(float).tolist(), texts[:20], texts[20:])
    (result,) = evaluate(Fixed(vectors), pairs, dimensions=[3])
    rows = np.array(list(vectors.values()))[:, :3]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (rows[:20] * rows[20:]).sum(1)
    assert result.scores["spearman"] == pytest.approx(stats.spearmanr(cosines, pairs.scores).statistic, abs=1e-5)
    assert result.scores["pearson"] == pytest.approx(stats.pearsonr(cosines, pairs.scores).statistic, abs=1e-5)
    assert (result.task, result.dimension, result.mode) == ("similarity", 3, "dense")


def test_the_best_rows_are_those_of_a_stable_sort() -> None:
    scores = np.random.default_rng(3).integers(0, 9, 200).astype(np.float32)
    for k in (1, 7, 199, 200, 500):
        assert best_rows(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["fast"]}, "mode is 'fast'; available: 'dense'"),
        ({"dimensions": [33]}, "dimension is 33; this encoder gives vectors of 32"),
        ({"fusions": ["sum"]}, "fusion is 'sum'"),
        ({"candidates": 0}, "candidates is 0"),
        ({"sparse_weight": math.nan}, "the weights are"),
    ],
)
def test_what_is_out_of_range_is_refused(dataset: RetrievalSet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(StubEncoder(), dataset, **options)


def test_a_dense_encoder_is_measured_dense_and_refuses_the_rest(dataset: RetrievalSet) -> None:
    vectors = {text: [1.0, len(text)] for text in [*dataset.corpus.values(), *dataset.queries.values()]}
    assert [result.mode for result in evaluate(Fixed(vectors), dataset)] == ["dense"]
    with pytest.raises(ValueError, match="fixed has no sparse vectors; mode 'union' needs them"):
        evaluate(Fixed(vectors), dataset, modes=["dense", "union"])


@pytest.mark.parametrize(("module", "call"), [("ir_measures", "evaluate"), ("mteb.models.model_meta", "as_mteb")])
def test_a_missing_package_is_named_with_its_extra(
    dataset: RetrievalSet, monkeypatch: pytest.MonkeyPatch, module: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"gte-rag\[eval\]"):
        evaluate(StubEncoder(), dataset) if call == "evaluate" else as_mteb(StubEncoder())


# --- MTEB --------------------------------------------------------------------------------------------------------------


def mteb_task(dataset: RetrievalSet) -> Any:
    """A retrieval task whose data is in memory."""
    pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Words(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Words",
            description="Words in memory",
            reference=None,
            dataset={"path": "none/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation="",
        )

        def load_data(self, *args: Any, **options: Any) -> None:
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_list([{"id": i, "title": "", "text": text} for i, text in dataset.corpus.items()]),
                "queries": Dataset.from_list([{"id": i, "text": text} for i, text in dataset.queries.items()]),
                "relevant_docs": {query: dict(grades) for query, grades in dataset.qrels.items()},
                "top_ranked": None,
            }}}  # fmt: skip
            self.data_loaded = True

    return Words()


@pytest.mark.parametrize("mode", ["dense", "sparse", "union"])
def test_mteb_measures_what_evaluate_measures(dataset: RetrievalSet, mode: str) -> None:
    task = mteb_task(dataset)
    import mteb

    model = as_mteb(Untied(), mode=mode, dimension=16)
    found = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    theirs = found.task_results[0].scores["test"][0]
    ours: Result = evaluate(Untied(), dataset, modes=[mode], dimensions=[16], candidates=1000)[0]
    assert theirs["ndcg_at_10"] == pytest.approx(ours.scores["ndcg@10"], abs=1e-4)  # MTEB rounds
    assert theirs["recall_at_100"] == pytest.approx(ours.scores["recall@100"], abs=1e-4)
    assert model.mteb_model_meta.name == "gte-rag/stub"


def test_mteb_can_have_given_passages_reranked(dataset: RetrievalSet) -> None:
    pytest.importorskip("mteb")
    model: Any = as_mteb(StubEncoder(), mode="union", fusion="calibrated")
    about: dict[str, Any] = {
        "task_metadata": None,
        "hf_split": "test",
        "hf_subset": "default",
        "encode_kwargs": {},
        "num_proc": None,
    }
    model.index([{"id": i, "text": text} for i, text in dataset.corpus.items()], **about)
    queries = [{"id": "q0", "text": dataset.queries["q0"]}]
    found = model.search(queries, top_k=2, top_ranked={"q0": ["p5", "p6", "p7"]}, **about)
    assert len(found["q0"]) == 2
    assert set(found["q0"]) < {"p5", "p6", "p7"}
    with pytest.raises(TypeError, match="is a conversation"):
        model.search([{"id": "q0", "text": ["a", "b"]}], top_k=2, **about)


def test_mteb_gets_queries_and_passages_encoded_as_such() -> None:
    pytest.importorskip("mteb")
    encoder = StubEncoder()
    model = as_mteb(encoder, dimension=8)
    for prompt in ("query", "document", None):
        batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
        vectors = model.encode(batches, task_metadata=None, hf_split="", hf_subset="", prompt_type=prompt)
        assert vectors.shape == (3, 8)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    assert (encoder.query_calls, encoder.document_calls) == ([["a", "b", "c"]], [["a", "b", "c"]] * 2)
    with pytest.raises(ValueError, match="mode is 'both'"):
        as_mteb(encoder, mode="both")
