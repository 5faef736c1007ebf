"""Each fusion against figures worked out by hand, and properties that hold for all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gte_rag.fusion import (
    FUSIONS,
    Calibration,
    Fusion,
    calibrated,
    distribution_based,
    fusion_named,
    measure,
    reciprocal_rank,
    relative_score,
    weighted,
)

Doubles = NDArray[np.float64]
CALIBRATION = Calibration(0.5, 0.1, 2.0, 1.5, queries=10, candidates=1000)
ALL: dict[str, Fusion] = {name: fusion_named(name, calibration=CALIBRATION) for name in FUSIONS}
BY_CANDIDATES = ("reciprocal_rank", "relative_score", "distribution_based")

cosines = st.floats(-1, 1, width=32)
sparse_scores = st.one_of(st.just(0.0), st.floats(0.125, 50, width=32))
pairs = st.lists(st.tuples(cosines, sparse_scores), max_size=12)
each_fusion = pytest.mark.parametrize("name", FUSIONS)
quick = settings(max_examples=40, deadline=None)


def arrays(scores: list[tuple[float, float]]) -> tuple[Doubles, Doubles]:
    both = np.array(scores, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


# ------------------------------------------------------------------------------------------------------------ formulas


def test_weighted_is_the_reference_sum() -> None:
    dense, sparse = np.array([0.8, -0.5]), np.array([2.0, 0.0])
    np.testing.assert_allclose(weighted(dense, sparse), [1.4, -0.5], rtol=1e-6)
    np.testing.assert_allclose(weighted(dense, sparse, dense_weight=2, sparse_weight=0.5), [2.6, -1.0], rtol=1e-6)


def test_weighted_gives_the_model_cards_hybrid_scores() -> None:
    dense = np.array([0.85302734375, 0.257568359375, 0.76953125, 0.325439453125])
    sparse = np.array([0.0, 0.0, 4.600879669189453, 1.570279598236084])
    card = [0.85302734375, 0.257568359375, 2.1497951507568356, 0.7965233325958252]
    np.testing.assert_allclose(weighted(dense, sparse), card, rtol=1e-6)


def test_reciprocal_rank_is_the_published_sum() -> None:
    dense, sparse = np.array([0.9, 0.2, 0.5]), np.array([1.0, 3.0, 2.0])
    expected = [1 / 61 + 1 / 63, 1 / 63 + 1 / 61, 1 / 62 + 1 / 62]
    np.testing.assert_allclose(reciprocal_rank(dense, sparse), expected, rtol=1e-6)
    np.testing.assert_allclose(
        reciprocal_rank(dense, sparse, dense_weight=2, sparse_weight=0.5, k=0),
        [2.0 + 0.5 / 3, 2 / 3 + 0.5, 1 + 0.25],
        rtol=1e-6,
    )


def test_equal_scores_share_the_better_rank() -> None:
    dense, sparse = np.array([0.5, 0.9, 0.5, 0.1]), np.zeros(4)
    np.testing.assert_allclose(reciprocal_rank(dense, sparse, k=0), [1 / 2, 1, 1 / 2, 1 / 4], rtol=1e-6)


@pytest.mark.parametrize("name", BY_CANDIDATES)
def test_a_candidate_that_shares_no_token_gets_nothing_from_the_sparse_side(name: str) -> None:
    dense = np.array([0.5, 0.4, 0.3])
    for sparse in (np.array([0.0, 2.0, 1.0]), np.zeros(3)):
        np.testing.assert_array_equal(ALL[name](dense, sparse)[sparse == 0], ALL[name](dense, np.zeros(3))[sparse == 0])
    alone = ALL[name](np.array([0.5]), np.array([0.0]), dense_weight=0.0)
    np.testing.assert_array_equal(alone, [0.0])


def test_relative_score_stretches_both_sides() -> None:
    dense, sparse = np.array([0.2, 0.6, 0.4]), np.array([1.0, 8.0, 6.0])
    np.testing.assert_allclose(relative_score(dense, sparse), [0, 2, 0.5 + 5 / 7], rtol=1e-6)
    np.testing.assert_allclose(relative_score(dense, sparse, dense_weight=3, sparse_weight=0), [0, 3, 1.5], rtol=1e-6)
    # Without shared tokens the third is not in the sparse list, whose worst is then 1.0.
    np.testing.assert_allclose(relative_score(dense, np.array([1.0, 3.0, 0.0])), [0, 2, 0.5], rtol=1e-6)


def test_equal_scores_become_one_in_relative_and_a_half_in_distribution_based_fusion() -> None:
    dense, sparse = np.array([0.1, 0.1, 0.1]), np.array([0.3, 0.3, 0.0])
    np.testing.assert_array_equal(relative_score(dense, sparse), [2, 2, 1])
    np.testing.assert_array_equal(distribution_based(dense, sparse), [1, 1, 0.5])


def test_distribution_based_maps_three_sigma() -> None:
    dense, sparse = np.array([1.0, 2.0, 3.0]) / 10, np.array([4.0, 4.0, 10.0])
    # dense: mean 0.2, sigma 0.1: (-1, 0, 1) / 6 + 1/2; sparse: mean 6, sigma sqrt(12) = 3.4641
    expected = [2 / 6 + 0.5 - 2 / 20.784610, 3 / 6 + 0.5 - 2 / 20.784610, 4 / 6 + 0.5 + 4 / 20.784610]
    np.testing.assert_allclose(distribution_based(dense, sparse), expected, rtol=1e-6)


def test_distribution_based_cuts_below_and_not_above() -> None:
    dense = np.array([-1.0, *[0.5] * 98, 0.6])
    scores = distribution_based(dense, np.zeros(100))
    assert scores[0] == 0
    sparse = np.array([20.0, 22.0, *[0.1] * 98])
    strong = distribution_based(np.zeros(100), sparse, dense_weight=0)
    assert strong[1] > strong[0] > 1


def test_calibrated_counts_in_standard_deviations() -> None:
    dense, sparse = np.array([0.6, 0.4]), np.array([5.0, 0.5])
    np.testing.assert_allclose(calibrated(dense, sparse, calibration=CALIBRATION), [1 + 2, -1 - 1], rtol=1e-6)
    np.testing.assert_allclose(
        calibrated(dense, sparse, calibration=CALIBRATION, dense_weight=0.5, sparse_weight=2), [4.5, -2.5], rtol=1e-6
    )


@given(scores=pairs, weight=st.floats(0, 4))
@quick
def test_calibrated_ranks_like_weighted_with_scaled_weights(scores: list[tuple[float, float]], weight: float) -> None:
    dense, sparse = arrays(scores)
    one = calibrated(dense, sparse, calibration=CALIBRATION, sparse_weight=weight).astype(np.float64)
    other = weighted(dense, sparse, dense_weight=1 / 0.1, sparse_weight=weight / 1.5).astype(np.float64)
    np.testing.assert_allclose(np.diff(one), np.diff(other), atol=1e-4)  # float32 of numbers below 200


# ---------------------------------------------------------------------------------------------------------- properties


@each_fusion
@given(scores=pairs, weights=st.tuples(st.floats(0, 3), st.floats(0, 3)))
@quick
def test_what_is_better_on_both_sides_is_never_worse(
    name: str, scores: list[tuple[float, float]], weights: tuple[float, float]
) -> None:
    dense, sparse = arrays(scores)
    fused = ALL[name](dense, sparse, dense_weight=weights[0], sparse_weight=weights[1])
    better = (dense[:, None] >= dense) & (sparse[:, None] >= sparse)
    assert np.all(fused[:, None] >= fused, where=better)


@each_fusion
@given(scores=pairs, seed=st.integers(0, 99))
@quick
def test_the_order_of_the_candidates_does_not_matter(name: str, scores: list[tuple[float, float]], seed: int) -> None:
    dense, sparse = arrays(scores)
    order = np.random.default_rng(seed).permutation(len(scores))
    np.testing.assert_allclose(
        ALL[name](dense[order], sparse[order]), ALL[name](dense, sparse)[order], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", BY_CANDIDATES)
@given(
    # Whole numbers, so that scaling and shifting neither make nor break ties.
    scores=st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 8)), max_size=12),
    factor=st.sampled_from([0.125, 3, 1000]),
    shift=st.integers(-4, 4),
)
@quick
def test_the_scales_of_the_scores_do_not_matter(
    name: str, scores: list[tuple[float, float]], factor: float, shift: float
) -> None:
    dense, sparse = arrays(scores)
    expected = ALL[name](dense, sparse)
    np.testing.assert_allclose(ALL[name](dense * factor + shift, sparse), expected, atol=1e-6)
    np.testing.assert_allclose(ALL[name](dense, sparse * factor), expected, atol=1e-6)


@each_fusion
@given(scores=pairs)
@quick
def test_scores_are_finite_float32_one_per_candidate(name: str, scores: list[tuple[float, float]]) -> None:
    dense, sparse = arrays(scores)
    before = dense.copy(), sparse.copy()
    fused = ALL[name](dense.astype(np.float32), sparse.astype(np.float32))
    assert fused.dtype == np.float32
    assert fused.shape == dense.shape
    assert np.isfinite(fused).all()
    np.testing.assert_array_equal(before, (dense, sparse))


@each_fusion
@pytest.mark.parametrize("count", [0, 1, 2, 50])
@pytest.mark.parametrize("value", [0.0, 0.1, 5e-324])
def test_equal_candidates_get_equal_finite_scores(name: str, count: int, value: float) -> None:
    fused = ALL[name](np.full(count, value), np.full(count, value))
    assert fused.shape == (count,)
    assert np.isfinite(fused).all()
    assert len(set(fused.tolist())) <= 1


@each_fusion
def test_differences_too_small_to_square_do_no_harm(name: str) -> None:
    tiny = np.array([0.0, 1e-300, 2e-300])
    assert np.isfinite(ALL[name](tiny, tiny)).all()


@each_fusion
def test_a_weight_of_zero_removes_a_side(name: str) -> None:
    dense, sparse = np.array([0.1, 0.5, 0.3]), np.array([3.0, 1.0, 2.0])
    assert np.argsort(-ALL[name](dense, sparse, sparse_weight=0)).tolist() == [1, 2, 0]
    assert np.argsort(-ALL[name](dense, sparse, dense_weight=0)).tolist() == [0, 2, 1]


@each_fusion
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": np.zeros(2)}, r"dense has the shape \(2,\) and sparse \(3,\)"),
        ({"dense": np.zeros((3, 1)), "sparse": np.zeros((3, 1))}, "one score of each per candidate"),
        ({"sparse": np.array([0, np.nan, 0])}, "a sparse score is nan"),
        ({"dense": np.array([0, np.inf, 0])}, "a dense score is inf"),
        ({"dense_weight": -1.0}, "dense_weight is -1.0"),
        ({"sparse_weight": math.nan}, "sparse_weight is nan"),
    ],
)
def test_wrong_scores_and_weights_are_refused(name: str, change: dict[str, object], message: str) -> None:
    arguments = {"dense": np.zeros(3), "sparse": np.zeros(3), **change}
    with pytest.raises(ValueError, match=message):
        ALL[name](**arguments)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- lookup


def test_fusions_are_looked_up_by_name() -> None:
    dense, sparse = np.array([0.1, 0.5, 0.3]), np.array([3.0, 1.0, 2.0])
    direct: dict[str, Callable[..., object]] = {
        "weighted": weighted,
        "reciprocal_rank": reciprocal_rank,
        "relative_score": relative_score,
        "distribution_based": distribution_based,
    }
    for name, function in direct.items():
        np.testing.assert_array_equal(fusion_named(name)(dense, sparse), function(dense, sparse))
    np.testing.assert_array_equal(
        fusion_named("reciprocal_rank", options={"k": 2})(dense, sparse, dense_weight=3),
        reciprocal_rank(dense, sparse, k=2, dense_weight=3),
    )
    assert set(FUSIONS) == {*direct, "calibrated"}


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="fusion is 'rrf'; available: 'weighted', 'reciprocal_rank'"):
        fusion_named("rrf")
    with pytest.raises(ValueError, match="'weighted' has no option 'k'; it has none"):
        fusion_named("weighted", options={"k": 60})
    with pytest.raises(ValueError, match="'reciprocal_rank' has no option 'c'; it has 'k'"):
        fusion_named("reciprocal_rank", options={"c": 60})
    with pytest.raises(ValueError, match="'calibrated' needs a calibration"):
        fusion_named("calibrated")
    with pytest.raises(ValueError, match="k is -1"):
        reciprocal_rank(np.zeros(1), np.zeros(1), k=-1)


# --------------------------------------------------------------------------------------------------------- calibration


def test_measure_pools_the_spread_within_queries() -> None:
    dense = [np.array([0.1, 0.3]), np.array([0.6, 0.8, 1.0]), np.array([0.5])]
    sparse = [np.array([0.0, 4.0]), np.array([10.0, 10.0, 10.0]), np.array([3.0])]
    found = measure(dense, sparse)
    # dense: squares 2 * 0.01 + 2 * 0.04 over 1 + 2 + 0 degrees of freedom; sparse: 2 * 4 over 3.
    assert found.dense_mean == pytest.approx(3.3 / 6)
    assert found.dense_std == pytest.approx(math.sqrt(0.1 / 3))
    assert found.sparse_mean == pytest.approx(37 / 6)
    assert found.sparse_std == pytest.approx(math.sqrt(8 / 3))
    assert (found.queries, found.candidates) == (3, 6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-200])
def test_scores_without_spread_are_given_the_scale_one(value: float) -> None:
    same = [np.full(3, value), np.full(1, value), np.empty(0)]
    found = measure(same, same)
    assert (found.dense_std, found.sparse_std, found.queries, found.candidates) == (1.0, 1.0, 2, 4)
    assert np.isfinite(calibrated(np.array([0.2, 0.3]), np.array([0.0, 4.0]), calibration=found)).all()


@given(queries=st.lists(pairs, min_size=1, max_size=5), factor=st.floats(0.5, 20))
@quick
def test_calibration_undoes_the_scale_of_a_model(queries: list[list[tuple[float, float]]], factor: float) -> None:
    if not any(queries):
        return
    dense, sparse = zip(*map(arrays, queries), strict=True)
    one = measure(dense, sparse)
    other = measure(dense, [factor * scores for scores in sparse])
    if one.sparse_std == 1.0 or one.sparse_std < 1e-6:  # no spread: nothing to undo
        return
    for mine, theirs in zip(dense, sparse, strict=True):
        np.testing.assert_allclose(
            calibrated(mine, factor * theirs, calibration=other),
            calibrated(mine, theirs, calibration=one),
            rtol=1e-4,
            atol=1e-4,
        )


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidates to measure"):
        measure([], [])
    with pytest.raises(ValueError, match="no candidates to measure"):
        measure([np.empty(0)], [np.empty(0)])
    with pytest.raises(ValueError, match="1 arrays of dense and 2 of sparse"):
        measure([np.zeros(1)], [np.zeros(1), np.zeros(1)])
    with pytest.raises(ValueError, match=r"dense has the shape \(1,\)"):
        measure([np.zeros(1)], [np.zeros(2)])
    with pytest.raises(ValueError, match="a sparse score is nan"):
        measure([np.zeros(1)], [np.array([np.nan])])


def test_a_calibration_survives_json() -> None:
    found = measure([np.array([0.1, 0.2, 0.35])], [np.array([0.0, 1.0 / 3, 7.0])])
    assert Calibration.from_json(found.to_json()) == found
    assert "\n" not in found.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"dense_std": 0.0},
        {"sparse_std": -1.0},
        {"dense_mean": math.nan},
        {"sparse_mean": math.inf},
        {"dense_mean": "0.5"},
        {"sparse_std": True},
        {"queries": 0},
        {"candidates": 1.5},
        {"queries": True},
        {"extra": 1},
    ],
)
def test_a_wrong_calibration_is_refused(change: dict[str, object]) -> None:
    text = json.dumps({**json.loads(CALIBRATION.to_json()), **change})
    with pytest.raises(ValueError, match=r"not a calibration: .+; measure the collection again"):
        Calibration.from_json(text)
    if "extra" not in change:
        with pytest.raises((TypeError, ValueError), match=next(iter(change))):
            Calibration(**{**json.loads(CALIBRATION.to_json()), **change})


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"dense_mean": 1}', "nonsense"])
def test_other_text_is_no_calibration(text: str) -> None:
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json(text)
