"""The model card's own numbers, which need the real weights.

Set GTE_RAG_REFERENCE_MODEL to a folder or hub id of gte-multilingual-base. The card's figures were computed in float16, hence
the tolerance.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from gte_rag import GTEEncoder

REFERENCE = os.environ.get("GTE_RAG_REFERENCE_MODEL")
TEXTS = ["what is the capital of China?", "how to implement quick sort in python?", "北京", "快排算法介绍"]
QUERY = "中国的首都在哪儿"
TOLERANCE = 5e-3

pytestmark = pytest.mark.skipif(
    not REFERENCE,
    reason="needs the weights of gte-multilingual-base: set GTE_RAG_REFERENCE_MODEL to a folder or hub id",
)


@pytest.fixture(scope="module")
def reference_encoder() -> GTEEncoder:
    return GTEEncoder.from_pretrained(str(REFERENCE))


def test_dense_similarities_of_the_card(reference_encoder: GTEEncoder) -> None:
    dense = reference_encoder.encode_queries(TEXTS, sparse=False).dense
    assert dense is not None
    expected = [0.3016996383666992, 0.7503870129585266, 0.3203084468841553]
    np.testing.assert_allclose(dense[0] @ dense[1:].T, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("dense_weight", "sparse_weight", "expected"),
    [
        (1.0, 0.0, [0.85302734375, 0.257568359375, 0.76953125, 0.325439453125]),
        (0.0, 1.0, [0.0, 0.0, 4.600879669189453, 1.570279598236084]),
        (1.0, 0.3, [0.85302734375, 0.257568359375, 2.1497951507568356, 0.7965233325958252]),
    ],
    ids=["dense", "sparse", "hybrid"],
)
def test_pair_scores_of_the_card(
    reference_encoder: GTEEncoder, dense_weight: float, sparse_weight: float, expected: list[float]
) -> None:
    pairs = [(QUERY, text) for text in TEXTS]
    scores = reference_encoder.score_pairs(pairs, dense_weight=dense_weight, sparse_weight=sparse_weight)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE, rtol=TOLERANCE)
