"""Fusion formulas as plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from gte_rag.fusion import weighted

DENSE = np.array([0.85, -0.25, 1.0, 0.0])
SPARSE = np.array([0.0, 4.5, 1.5, 0.0])


def test_weighted_adds_the_weighted_scores() -> None:
    np.testing.assert_allclose(
        weighted(DENSE, SPARSE, dense_weight=2.0, sparse_weight=0.1), [1.7, -0.05, 2.15, 0.0], atol=1e-7
    )


def test_weighted_reproduces_the_card_example_with_its_default_weights() -> None:
    dense = np.array([0.85302734375, 0.257568359375, 0.76953125, 0.325439453125])
    sparse = np.array([0.0, 0.0, 4.600879669189453, 1.570279598236084])
    expected = [0.85302734375, 0.257568359375, 2.1497951507568356, 0.7965233325958252]
    np.testing.assert_allclose(weighted(dense, sparse), expected, rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weighted_returns_float32_whatever_it_is_given(dtype: type[np.floating]) -> None:
    scores = weighted(DENSE.astype(dtype), SPARSE.astype(dtype))
    assert scores.dtype == np.float32
    assert scores.shape == DENSE.shape


def test_a_weight_of_zero_leaves_the_other_score() -> None:
    np.testing.assert_array_equal(weighted(DENSE, SPARSE, sparse_weight=0.0), DENSE.astype(np.float32))
    np.testing.assert_array_equal(
        weighted(DENSE, SPARSE, dense_weight=0.0, sparse_weight=1.0), SPARSE.astype(np.float32)
    )
    np.testing.assert_array_equal(weighted(DENSE, SPARSE, dense_weight=0.0, sparse_weight=0.0), np.zeros(4))


def test_no_scores_fuse_to_no_scores() -> None:
    assert weighted(np.empty(0), np.empty(0)).shape == (0,)


def test_fusion_leaves_its_arguments_alone() -> None:
    dense, sparse = DENSE.copy(), SPARSE.copy()
    weighted(dense, sparse)
    np.testing.assert_array_equal(dense, DENSE)
    np.testing.assert_array_equal(sparse, SPARSE)
