"""How dense and sparse scores become one: pure functions over scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gte_rag.vectors import FloatArray


def weighted(
    dense: NDArray[np.floating],
    sparse: NDArray[np.floating],
    *,
    dense_weight: float = 1.0,
    sparse_weight: float = 0.3,
) -> FloatArray:
    """Return ``dense_weight * dense + sparse_weight * sparse``, the reference's hybrid score.

    The sparse score is not normalised and several times larger than the cosine, hence the small weight; the defaults are
    those of the model card's example, and the paper evaluates with 0.001 to 0.01 (arXiv:2407.19669, appendix).

    Args:
        dense: Cosines, shape (n,).
        sparse: Sparse scores, shape (n,).
        dense_weight: Weight of the cosines.
        sparse_weight: Weight of the sparse scores.

    Returns:
        float32, shape (n,).
    """
    scores: FloatArray = (dense_weight * dense + sparse_weight * sparse).astype(np.float32)
    return scores
