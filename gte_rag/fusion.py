"""How dense and sparse scores become one: pure functions over the scores of one query's candidates.

All take ``(dense, sparse, *, dense_weight, sparse_weight)``, two arrays of shape (n,), and return float32 of shape (n,).
`FUSIONS` lists them by name, `fusion_named` looks one up. Which to take:

=====================  ============================================  =========================================================
name                   a score depends on                            for
=====================  ============================================  =========================================================
weighted               the candidate alone                           the reference's figures; weights are the model's
calibrated             the candidate and figures of the collection   weights that mean the same for every model and corpus
relative_score         the best and worst of the candidates          one scale per query, distances between scores kept
distribution_based     mean and spread of the candidates             the same, less moved by single very high scores
reciprocal_rank        ranks among the candidates                    scores that cannot be compared at all
=====================  ============================================  =========================================================

In the last three a candidate that shares no token with the query (sparse score 0) is not in the sparse list at all, as in an
engine that searches twice: it gets nothing from that side, and the others are normalised without it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gte_rag.vectors import FloatArray

Scores: TypeAlias = NDArray[np.floating[Any]]
_Doubles: TypeAlias = NDArray[np.float64]


class Fusion(Protocol):
    """A function of this module with everything but scores and weights given; weights left out are its own defaults."""

    def __call__(
        self, dense: Scores, sparse: Scores, *, dense_weight: float = ..., sparse_weight: float = ...
    ) -> FloatArray:
        """Return fused scores, float32 (n,)."""


def weighted(dense: Scores, sparse: Scores, *, dense_weight: float = 1.0, sparse_weight: float = 0.3) -> FloatArray:
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

    Raises:
        ValueError: Shapes differ, a score is not finite, or a weight is negative or not finite.
    """
    dense, sparse = _check(dense, sparse, dense_weight, sparse_weight)
    return (dense_weight * dense + sparse_weight * sparse).astype(np.float32)


def reciprocal_rank(
    dense: Scores, sparse: Scores, *, dense_weight: float = 1.0, sparse_weight: float = 1.0, k: float = 60.0
) -> FloatArray:
    """Return ``dense_weight / (k + dense rank) + sparse_weight / (k + sparse rank)``: reciprocal rank fusion.

    Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009; 60 is theirs. Ranks start at 1. Candidates with equal scores share the better rank, so that the order in
    which they are given does not matter. A candidate with sparse score 0 gets nothing from the sparse side.

    Args:
        dense: Cosines, shape (n,).
        sparse: Sparse scores, shape (n,).
        dense_weight: Weight of the dense ranks.
        sparse_weight: Weight of the sparse ranks.
        k: 0 or more; the smaller, the more the first ranks count.

    Returns:
        float32, shape (n,).

    Raises:
        ValueError: Shapes differ, a score is not finite, or a weight or `k` is negative or not finite.
    """
    dense, sparse = _check(dense, sparse, dense_weight, sparse_weight)
    _check_number("k", k)
    sparse_part = np.where(sparse > 0, sparse_weight / (k + _ranks(sparse)), 0.0)
    return (dense_weight / (k + _ranks(dense)) + sparse_part).astype(np.float32)


def relative_score(
    dense: Scores, sparse: Scores, *, dense_weight: float = 1.0, sparse_weight: float = 1.0
) -> FloatArray:
    """Return the weighted sum of both scores, each stretched so that the query's worst is 0 and its best 1.

    Weaviate's relative score fusion; "min-max" normalisation in Bruch, Gai and Ingber, "An analysis of fusion functions for
    hybrid retrieval", arXiv:2210.11934. Scores that are all equal become 1. A candidate with sparse score 0 gets 0.

    Args:
        dense: Cosines, shape (n,).
        sparse: Sparse scores, shape (n,).
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side.

    Returns:
        float32, shape (n,), between 0 and the sum of the weights.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a weight is negative or not finite.
    """
    dense, sparse = _check(dense, sparse, dense_weight, sparse_weight)
    return (dense_weight * _stretched(dense) + sparse_weight * _of_matches(_stretched, sparse)).astype(np.float32)


def distribution_based(
    dense: Scores, sparse: Scores, *, dense_weight: float = 1.0, sparse_weight: float = 1.0
) -> FloatArray:
    """Return the weighted sum of both scores, each mapped so that mean - 3 sigma is 0 and mean + 3 sigma is 1.

    Distribution-based score fusion as in Qdrant: sigma is the sample's standard deviation, and scores that are all equal
    become 0.5. What lies below 0 is set to 0. What lies above 1 stays: a single strong match among 100 candidates often
    does, and cutting it would make it equal to the next. A candidate with sparse score 0 gets 0.

    Args:
        dense: Cosines, shape (n,).
        sparse: Sparse scores, shape (n,).
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side.

    Returns:
        float32, shape (n,).

    Raises:
        ValueError: Shapes differ, a score is not finite, or a weight is negative or not finite.
    """
    dense, sparse = _check(dense, sparse, dense_weight, sparse_weight)
    return (dense_weight * _spread(dense) + sparse_weight * _of_matches(_spread, sparse)).astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """The scales of both scores on one collection, measured without labels by `measure`.

    Attributes:
        dense_mean: Mean of the cosines.
        dense_std: Their standard deviation within a query, greater than 0.
        sparse_mean: Mean of the sparse scores.
        sparse_std: Their standard deviation within a query, greater than 0.
        queries: Number of pseudo-queries that were measured.
        candidates: Number of candidates of all of them together.
    """

    dense_mean: float
    dense_std: float
    sparse_mean: float
    sparse_std: float
    queries: int
    candidates: int

    def __post_init__(self) -> None:
        """Check the kinds and ranges of all figures."""
        for name in ("dense_mean", "dense_std", "sparse_mean", "sparse_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; give a number")
            if not math.isfinite(value) or (name.endswith("_std") and value <= 0):
                raise ValueError(f"{name} is {value}; it must be finite, and a standard deviation greater than 0")
        for name in ("queries", "candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; give a whole number")
            if value < 1:
                raise ValueError(f"{name} is {value}; a calibration comes from at least 1")

    def to_json(self) -> str:
        """Return the calibration as one line of JSON, readable by `from_json`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no calibration; measure it again.
        """
        try:
            values = json.loads(text)
            names = {field.name for field in fields(cls)}
            if not isinstance(values, dict) or values.keys() != names:
                raise ValueError(f"it must have the keys {', '.join(sorted(names))} and no others")
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a calibration: {error}; measure the collection again") from error


def measure(dense: Sequence[Scores], sparse: Sequence[Scores]) -> Calibration:
    """Measure the scales of both scores on a collection, without labels.

    The standard deviations are pooled within queries: the differences between a query's candidates decide its ranking,
    while differences between queries (a long one has higher sparse scores throughout) do not. A score that never differs
    has no scale; its standard deviation is set to 1.

    Args:
        dense: Cosines of each pseudo-query with its candidates: arrays of shape (n_i,).
        sparse: The sparse scores of the same pairs, in the same order.

    Returns:
        The calibration, for `calibrated`.

    Raises:
        ValueError: There is no candidate at all, the shapes do not fit, or a score is not finite.
    """
    if len(dense) != len(sparse):
        raise ValueError(f"{len(dense)} arrays of dense and {len(sparse)} of sparse scores; give one of each per query")
    pairs = [_check(one, other, 1.0, 1.0) for one, other in zip(dense, sparse, strict=True)]
    pairs = [pair for pair in pairs if pair[0].size]
    if not pairs:
        raise ValueError("there are no candidates to measure; a collection needs records before it can be calibrated")
    dense_mean, dense_std = _pooled([pair[0] for pair in pairs])
    sparse_mean, sparse_std = _pooled([pair[1] for pair in pairs])
    return Calibration(dense_mean, dense_std, sparse_mean, sparse_std, len(pairs), sum(pair[0].size for pair in pairs))


def calibrated(
    dense: Scores,
    sparse: Scores,
    *,
    calibration: Calibration,
    dense_weight: float = 1.0,
    sparse_weight: float = 1.0,
) -> FloatArray:
    """Return the weighted sum of both scores in standard deviations of the collection (z-scores).

    It ranks like `weighted` with both weights divided by the standard deviations. Unlike the fusions that normalise by the
    query's own candidates, a score does not depend on what else was found, and can be compared between queries.

    Args:
        dense: Cosines, shape (n,).
        sparse: Sparse scores, shape (n,).
        calibration: The scales, from `measure`.
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side; 1 lets both sides separate the candidates equally.

    Returns:
        float32, shape (n,).

    Raises:
        ValueError: Shapes differ, a score is not finite, or a weight is negative or not finite.
    """
    dense, sparse = _check(dense, sparse, dense_weight, sparse_weight)
    dense_part = dense_weight * (dense - calibration.dense_mean) / calibration.dense_std
    return (dense_part + sparse_weight * (sparse - calibration.sparse_mean) / calibration.sparse_std).astype(np.float32)


FUSIONS: Mapping[str, Callable[..., FloatArray]] = MappingProxyType(
    {
        "weighted": weighted,
        "reciprocal_rank": reciprocal_rank,
        "relative_score": relative_score,
        "distribution_based": distribution_based,
        "calibrated": calibrated,
    }
)
_OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({"reciprocal_rank": ("k",)})


def default_sparse_weight(fusion: str) -> float:
    """Return the sparse weight beside a dense weight of 1: the model card's 0.3 for raw scores, else 1."""
    return 0.3 if fusion == "weighted" else 1.0


def opening(text: str) -> str:
    """Return the beginning of a text, about as long as a question: a pseudo-query to calibrate with."""
    return " ".join(text.split()[:12])[:80]


def fusion_named(
    name: str, *, options: Mapping[str, float] | None = None, calibration: Calibration | None = None
) -> Fusion:
    """Return a fusion by its name, its options filled in.

    Args:
        name: A key of `FUSIONS`.
        options: ``{"k": 60}`` for ``"reciprocal_rank"``; the others have none.
        calibration: Needed for ``"calibrated"``, not used by the others.

    Raises:
        ValueError: The name or an option is unknown, or ``"calibrated"`` has no calibration.
    """
    if name not in FUSIONS:
        raise ValueError(f"fusion is {name!r}; available: {', '.join(map(repr, FUSIONS))}")
    given = dict(options or {})
    known = _OPTIONS.get(name, ())
    for option in given:
        if option not in known:
            raise ValueError(f"{name!r} has no option {option!r}; it has {', '.join(map(repr, known)) or 'none'}")
    if name == "calibrated":
        if calibration is None:
            raise ValueError("'calibrated' needs a calibration; measure the collection first, or take another fusion")
        return functools.partial(calibrated, calibration=calibration)
    fusion: Fusion = functools.partial(FUSIONS[name], **given)
    return fusion


def _ranks(scores: _Doubles) -> NDArray[np.int64]:
    """Return 1 + the number of higher scores."""
    return 1 + scores.size - np.searchsorted(np.sort(scores), scores, side="right")


def _stretched(scores: _Doubles) -> _Doubles:
    """Map the lowest score to 0 and the highest to 1; equal scores become 1."""
    low, high = scores.min(initial=math.inf), scores.max(initial=-math.inf)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def _spread(scores: _Doubles) -> _Doubles:
    """Map mean - 3 sigma to 0 and mean + 3 sigma to 1; equal scores become 0.5."""
    # The mean of equal numbers may be off by a rounding, and the square of a tiny difference may be 0: both are asked.
    sigma = scores.std(ddof=1) if scores.size > 1 and scores.min() < scores.max() else 0.0
    if sigma == 0:
        return np.full_like(scores, 0.5)
    mapped: _Doubles = np.maximum((scores - scores.mean()) / (6 * sigma) + 0.5, 0.0)
    return mapped


def _of_matches(normalise: Callable[[_Doubles], _Doubles], sparse: _Doubles) -> _Doubles:
    """Normalise the scores above 0 among themselves; 0 stays 0."""
    normalised = np.zeros_like(sparse)
    matches = sparse > 0
    if matches.any():
        normalised[matches] = normalise(sparse[matches])
    return normalised


def _pooled(groups: Sequence[_Doubles]) -> tuple[float, float]:
    """Return the mean of all numbers and their standard deviation within groups, 1 where they do not differ."""
    mean = float(np.concatenate(groups).mean())
    if all(group.min() == group.max() for group in groups):
        return mean, 1.0
    squares = sum(float(np.square(group - group.mean()).sum()) for group in groups)
    std = math.sqrt(squares / sum(group.size - 1 for group in groups))
    return mean, std if std > 0 else 1.0


def _check(dense: Scores, sparse: Scores, dense_weight: float, sparse_weight: float) -> tuple[_Doubles, _Doubles]:
    """Return both scores in float64, so that rounding happens once, at the end."""
    _check_number("dense_weight", dense_weight)
    _check_number("sparse_weight", sparse_weight)
    both = np.asarray(dense, dtype=np.float64), np.asarray(sparse, dtype=np.float64)
    if both[0].ndim != 1 or both[0].shape != both[1].shape:
        raise ValueError(
            f"dense has the shape {both[0].shape} and sparse {both[1].shape}; give one score of each per candidate"
        )
    for name, scores in zip(("dense", "sparse"), both, strict=True):
        if not np.isfinite(scores).all():
            raise ValueError(f"a {name} score is {scores[~np.isfinite(scores)][0]}; scores must be finite")
    return both


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value}; it must be finite and not negative")
