"""nDCG against trec_eval, and the choice of fusion and weights on made-up queries whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gte_rag.fusion import FUSIONS, Calibration, fusion_named
from gte_rag.tuning import MIN_QUERIES, ScoredQuery, Trial, Tuning, ndcg, tune

CALIBRATION = Calibration(0.5, 0.1, 2.0, 1.5, queries=10, candidates=1000)
Qrels = dict[str, dict[str, float]]


def collection(
    queries: int = 60, candidates: int = 30, *, dense_noise: float, sparse_noise: float, seed: int = 0
) -> tuple[list[ScoredQuery], Qrels]:
    """Return queries whose scores are grades plus noise: the side with less noise deserves the weight."""
    draw = np.random.default_rng(seed)
    scored, qrels = [], {}
    for number in range(queries):
        grades = draw.choice([0, 0, 0, 0, 0, 0, 1, 2], size=candidates)
        ids = [f"d{place}" for place in range(candidates)]
        dense = 0.5 + 0.05 * (grades + dense_noise * draw.normal(size=candidates))
        sparse = np.maximum(0, 3 * (grades + sparse_noise * draw.normal(size=candidates)))
        scored.append(ScoredQuery(f"q{number}", ids, dense, sparse))
        qrels[f"q{number}"] = dict(zip(ids, grades.tolist(), strict=True))
    return scored, qrels


def mean_ndcg(trial: Trial | Tuning, queries: list[ScoredQuery], qrels: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean nDCG by the plain way: rank ids, grade the ranking."""
    fuse = fusion_named(trial.fusion, options=trial.options, calibration=CALIBRATION)
    values = []
    for query in queries:
        fused = fuse(query.dense, query.sparse, dense_weight=trial.dense_weight, sparse_weight=trial.sparse_weight)
        ranking = sorted(range(len(query.ids)), key=lambda place: -fused[place])
        values.append(ndcg([query.ids[place] for place in ranking], qrels[query.query]))
    return float(np.mean(values))


# ---------------------------------------------------------------------------------------------------------------- nDCG


def test_ndcg_is_the_published_sum() -> None:
    grades = {"a": 3, "b": 2, "c": 1, "z": 0}
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(["a", "b", "c"], grades) == pytest.approx(1)
    assert ndcg(["c", "x", "a"], grades) == pytest.approx((1 + 3 / 2) / ideal)
    assert ndcg(["c", "x", "a"], grades, k=2) == pytest.approx(1 / (3 + 2 / math.log2(3)))
    assert ndcg(["z", "x"], grades) == 0
    assert ndcg([], grades) == 0
    assert ndcg(["a"], {}) == 0
    assert ndcg(["a"], {"a": 0, "b": -1}) == 0


@given(
    grades=st.dictionaries(st.sampled_from("abcdefghijklmnop"), st.integers(-1, 4), min_size=1),
    ranking=st.permutations("abcdefghijklmnopqrst"),
    length=st.integers(1, 20),
    k=st.sampled_from([1, 3, 10, 100]),
)
@settings(max_examples=100, deadline=None)
def test_ndcg_is_that_of_trec_eval(grades: dict[str, int], ranking: list[str], length: int, k: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run = {"q": {record_id: float(100 - rank) for rank, record_id in enumerate(ranking[:length])}}
    theirs = pytrec_eval.RelevanceEvaluator({"q": grades}, {f"ndcg_cut.{k}"}).evaluate(run)["q"][f"ndcg_cut_{k}"]
    assert ndcg(ranking[:length], grades, k=k) == pytest.approx(theirs, abs=1e-9)


def test_mean_ndcg_is_that_of_ir_measures() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    scored, qrels = collection(40, dense_noise=1.0, sparse_noise=1.0)
    run = {query.query: dict(zip(query.ids, query.dense.tolist(), strict=True)) for query in scored}
    theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    assert mean_ndcg(Trial("weighted", 1.0, 0.0), scored, qrels) == pytest.approx(theirs, abs=1e-6)


def test_ndcg_refuses_what_is_no_ranking() -> None:
    with pytest.raises(ValueError, match="ranked more than once"):
        ndcg(["a", "a"], {"a": 1})
    with pytest.raises(ValueError, match="k is 0"):
        ndcg(["a"], {"a": 1}, k=0)
    with pytest.raises(TypeError, match=r"k is 1\.5"):
        ndcg(["a"], {"a": 1}, k=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a grade is not finite"):
        ndcg(["a"], {"a": math.nan})


# -------------------------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize(("dense_noise", "sparse_noise"), [(0.2, 4.0), (4.0, 0.2), (1.0, 1.0)])
def test_tuning_finds_the_side_that_knows(dense_noise: float, sparse_noise: float) -> None:
    scored, qrels = collection(dense_noise=dense_noise, sparse_noise=sparse_noise)
    tuning = tune(scored, qrels)
    assert tuning.train_ndcg >= tuning.baseline.train_ndcg
    if dense_noise < sparse_noise:
        assert not tuning.kept_baseline
        assert tuning.gain > 0.1
        assert tuning.fusion != "weighted" or tuning.sparse_weight < 0.1
        assert str(tuning).startswith(f"Use {tuning.best}: nDCG@10 ")
    assert tuning.gain == pytest.approx(tuning.heldout_ndcg - tuning.baseline_heldout_ndcg)


def test_the_figures_are_those_of_the_plain_way() -> None:
    scored, qrels = collection(dense_noise=0.3, sparse_noise=2.0)
    tuning = tune(scored, qrels, calibration=CALIBRATION, heldout=0.25)
    assert (tuning.train_queries, tuning.heldout_queries) == (45, 15)
    # A held-out query is one whose judgements do not show in the table.
    held_out = []
    plain = tune(scored, qrels, fusions=[], heldout=0.25)
    for query in scored:
        changed = tune(scored, {**qrels, query.query: {"missed": 1}}, fusions=[], heldout=0.25)
        if changed.table == plain.table:
            held_out.append(query)
        assert changed.without_relevant == tuning.without_relevant + 1
    training = [query for query in scored if query not in held_out]
    assert len(held_out) == 15
    for trial in tuning.table:
        assert trial.train_ndcg == pytest.approx(mean_ndcg(trial, training, qrels), abs=1e-12)
    assert tuning.heldout_ndcg == pytest.approx(mean_ndcg(tuning, held_out, qrels), abs=1e-12)
    assert tuning.baseline_heldout_ndcg == pytest.approx(mean_ndcg(tuning.baseline, held_out, qrels), abs=1e-12)
    assert tuning.best_heldout_ndcg == pytest.approx(mean_ndcg(tuning.best, held_out, qrels), abs=1e-12)
    differences = [
        mean_ndcg(tuning.best, [query], qrels) - mean_ndcg(tuning.baseline, [query], qrels) for query in held_out
    ]
    assert tuning.gain_error == pytest.approx(np.std(differences, ddof=1) / math.sqrt(15))


def test_the_split_depends_on_the_query_ids_alone() -> None:
    scored, qrels = collection(dense_noise=0.3, sparse_noise=2.0)
    tuning = tune(scored, qrels)
    order = np.random.default_rng(1).permutation(len(scored))
    again = tune([scored[place] for place in order], dict(reversed(qrels.items())))
    assert str(again) == str(tuning)
    assert [str(trial) for trial in again.table] == [str(trial) for trial in tuning.table]


def test_every_fusion_is_tried_and_the_best_comes_first() -> None:
    scored, qrels = collection(dense_noise=1.0, sparse_noise=1.0)
    tuning = tune(scored, qrels, calibration=CALIBRATION)
    assert {trial.fusion for trial in tuning.table} == set(FUSIONS)
    figures = [trial.train_ndcg for trial in tuning.table]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] == pytest.approx(tuning.best.train_ndcg)
    assert len({str(trial) for trial in tuning.table}) == len(tuning.table)
    assert {trial.fusion for trial in tune(scored, qrels).table} == set(FUSIONS) - {"calibrated"}


def test_fusions_weights_and_baseline_can_be_given() -> None:
    scored, qrels = collection(dense_noise=1.0, sparse_noise=1.0)
    baseline = Trial("reciprocal_rank", 1.0, 1.0, {"k": 60.0})
    tuning = tune(scored, qrels, fusions=["weighted"], weights=[(1, 0), (0, 1)], baseline=baseline, k=3)
    assert {str(trial) for trial in tuning.table} == {
        "reciprocal_rank(dense_weight=1, sparse_weight=1, k=60)",
        "weighted(dense_weight=1, sparse_weight=0)",
        "weighted(dense_weight=0, sparse_weight=1)",
    }
    assert tuning.baseline.fusion == "reciprocal_rank"
    assert "nDCG@3" in str(tuning)


def test_the_baseline_is_kept_where_nothing_is_better() -> None:
    scored, qrels = collection(dense_noise=1.0, sparse_noise=1.0)
    perfect = [
        ScoredQuery(
            query.query, query.ids, np.array([qrels[query.query][name] for name in query.ids]), query.sparse * 0
        )
        for query in scored
    ]
    tuning = tune(perfect, qrels, calibration=CALIBRATION)
    assert (tuning.fusion, tuning.dense_weight, tuning.sparse_weight, tuning.options) == ("weighted", 1.0, 0.3, {})
    assert tuning.kept_baseline
    assert (tuning.gain, tuning.gain_error) == (0, 0)
    assert tuning.heldout_ndcg == pytest.approx(1)
    assert str(tuning).startswith("Keep weighted(dense_weight=1, sparse_weight=0.3): none of ")


def test_a_gain_that_does_not_hold_on_other_queries_is_refused() -> None:
    """Pure noise: some choice is always best on the training queries, and about half of the time worse on the others."""
    kept = []
    for seed in range(6):
        scored, qrels = collection(24, 12, dense_noise=1e6, sparse_noise=1e6, seed=seed)
        tuning = tune(scored, qrels)
        if tuning.best_heldout_ndcg <= tuning.baseline_heldout_ndcg:
            kept.append(tuning)
            assert tuning.kept_baseline
            assert (tuning.fusion, tuning.sparse_weight) == ("weighted", 0.3)
            assert tuning.heldout_ndcg == tuning.baseline_heldout_ndcg
            assert tuning.best.train_ndcg >= tuning.train_ndcg
            if tuning.best != tuning.baseline:
                assert "is no better on the held-out ones" in str(tuning)
        elif tuning.gain < 2 * tuning.gain_error:
            assert "it may be chance" in str(tuning)
    assert kept


def test_equally_good_choices_are_decided_for_the_simplest() -> None:
    scored, qrels = collection(dense_noise=0.1, sparse_noise=1e3)
    same = [ScoredQuery(query.query, query.ids, query.dense, query.dense * 0) for query in scored]
    given = tune(same, qrels, fusions=["relative_score", "weighted"], weights=[(1.0, 0.5), (1.0, 0.0)])
    assert given.best == given.baseline  # without sparse scores all are the same ranking
    only_sparse = Trial("weighted", 0.0, 1.0)
    given = tune(
        same, qrels, fusions=["relative_score", "weighted"], weights=[(1.0, 0.5), (1.0, 0.0)], baseline=only_sparse
    )
    assert str(given.best) == "relative_score(dense_weight=1, sparse_weight=0.5)"


def test_queries_without_relevant_candidates_count_as_zero() -> None:
    scored, qrels = collection(30, dense_noise=0.3, sparse_noise=1.0)
    hopeless = [ScoredQuery(f"hopeless {number}", [], np.empty(0), np.empty(0)) for number in range(30)]
    tuning = tune([*scored, *hopeless], qrels | {query.query: {"missed": 1.0} for query in hopeless})
    assert tuning.without_relevant == 30
    assert tuning.train_queries + tuning.heldout_queries == 60
    assert "30 of 60 queries have no relevant candidate." in str(tuning)
    everywhere = tune(hopeless, {query.query: {"a": 0.0} for query in hopeless})
    assert everywhere.kept_baseline
    assert everywhere.heldout_ndcg == 0


def test_too_few_or_wrong_queries_are_refused() -> None:
    scored, qrels = collection(MIN_QUERIES, 5, dense_noise=1.0, sparse_noise=1.0)
    assert tune(scored, qrels).heldout_queries == MIN_QUERIES // 2
    with pytest.raises(ValueError, match=f"{MIN_QUERIES - 1} queries are too few .* at least {MIN_QUERIES} judged"):
        tune(scored[1:], qrels)
    with pytest.raises(ValueError, match="query 'q1' is given more than once"):
        tune([*scored, scored[1]], qrels)
    with pytest.raises(ValueError, match="query 'q3' has no judgements"):
        tune(scored, {name: grades for name, grades in qrels.items() if name != "q3"})
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="heldout is"):
            tune(scored, qrels, heldout=share)
    with pytest.raises(TypeError, match="fusions is the string 'weighted'"):
        tune(scored, qrels, fusions="weighted")
    with pytest.raises(ValueError, match="fusion is 'rrf'; available"):
        tune(scored, qrels, fusions=["rrf"])
    with pytest.raises(ValueError, match="'calibrated' needs a calibration"):
        tune(scored, qrels, fusions=["calibrated"])
    with pytest.raises(ValueError, match="sparse_weight is -1"):
        tune(scored, qrels, weights=[(1.0, -1.0)])
    with pytest.raises(ValueError, match="k is 0"):
        tune(scored, qrels, k=0)
    with pytest.raises(TypeError, match="ids is str"):
        ScoredQuery("q", "ab", np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"query 'q' has 2 ids, dense scores of shape \(1,\)"):
        ScoredQuery("q", ["a", "b"], np.zeros(1), np.zeros(2))
    with pytest.raises(ValueError, match="query 'q' has a candidate more than once"):
        ScoredQuery("q", ["a", "a"], np.zeros(2), np.zeros(2))
