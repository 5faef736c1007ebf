"""Choosing fusion and weights from judged queries: a grid search by nDCG on one half, checked on the other.

Everything here is a pure function over scores that somebody else computed, so that a few hundred choices cost seconds and no
model. The half that chooses and the half that reports are apart, because the best of many choices always looks
good on the queries it was chosen by.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gte_rag.fusion import FUSIONS, Calibration, Scores, fusion_named
from gte_rag.vectors import FloatArray

# With fewer, a half has less than ten queries, and its mean moves more from query to query than fusions differ.
MIN_QUERIES = 20

# (dense weight, sparse weight). Every fusion ranks by the ratio of the two alone, so one of them is always 1 or 0. The
# raw sparse score is several times the cosine and the paper goes down to 0.001; the other fusions have equal scales.
_RAW_WEIGHTS = (
    *((1.0, sparse) for sparse in (0.3, 0.1, 0.2, 0.5, 1.0, 0.05, 0.03, 0.01, 0.003, 0.001)),
    (1.0, 0.0),
    (0.0, 1.0),
)
_EVEN_WEIGHTS = tuple((1.0, sparse) for sparse in (1.0, 0.5, 0.75, 1.5, 2.0, 0.3, 0.2, 0.1, 3.0, 5.0))
_OPTIONS: Mapping[str, tuple[Mapping[str, float], ...]] = {"reciprocal_rank": ({"k": 60.0}, {"k": 10.0}, {"k": 2.0})}
# Differences of nDCG below this are roundings, not gains.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class ScoredQuery:
    """One query's candidates with both scores.

    Attributes:
        query: The query's id, as in the judgements.
        ids: Ids of the candidates, each once; of equally good ones the earlier is ranked first.
        dense: Their cosines, shape (n,).
        sparse: Their sparse scores, shape (n,).
    """

    query: str
    ids: Sequence[str]
    dense: Scores
    sparse: Scores

    def __post_init__(self) -> None:
        """Check that there is one score of each kind per id."""
        if isinstance(self.ids, (str, bytes)):
            raise TypeError(f"ids is {type(self.ids).__name__}; give a list of strings")
        shape = (len(self.ids),)
        if np.shape(self.dense) != shape or np.shape(self.sparse) != shape:
            raise ValueError(
                f"query {self.query!r} has {len(self.ids)} ids, dense scores of shape {np.shape(self.dense)} and sparse "
                f"scores of shape {np.shape(self.sparse)}; give one score of each per id"
            )
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"query {self.query!r} has a candidate more than once; give each id once")


@dataclass(frozen=True)
class Trial:
    """A fusion with its weights, and how good it was on the training queries.

    Attributes:
        fusion: Name of the fusion, a key of `gte_rag.fusion.FUSIONS`.
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side.
        options: Options of the fusion, for example ``{"k": 60}``.
        train_ndcg: Mean nDCG on the training queries.
    """

    fusion: str
    dense_weight: float
    sparse_weight: float
    options: Mapping[str, float] = field(default_factory=dict)
    train_ndcg: float = math.nan

    def __str__(self) -> str:
        """Return fusion, options and weights in one phrase."""
        options = "".join(f", {name}={value:g}" for name, value in self.options.items())
        return f"{self.fusion}(dense_weight={self.dense_weight:g}, sparse_weight={self.sparse_weight:g}{options})"


@dataclass(frozen=True)
class Tuning:
    """What `tune` recommends, and what it is worth on queries that had no part in the choice.

    Attributes:
        fusion: Name of the recommended fusion.
        dense_weight: Its dense weight.
        sparse_weight: Its sparse weight.
        options: Its options, for example ``{"k": 60}``.
        train_ndcg: Its mean nDCG on the training queries.
        heldout_ndcg: Its mean nDCG on the held-out queries.
        baseline_heldout_ndcg: The baseline's mean nDCG on them.
        gain: ``heldout_ndcg - baseline_heldout_ndcg``; 0 when the baseline was kept.
        gain_error: Standard error of the gain, from the differences per held-out query. A gain below two of them
            may well be chance.
        table: All trials, the best on the training queries first; without held-out figures, so that nobody picks by them.
        baseline: What the recommendation was compared with.
        best: The best trial on the training queries.
        best_heldout_ndcg: Its mean nDCG on the held-out queries; when it is no better than the baseline's, the baseline is
            what is recommended.
        train_queries: Number of training queries.
        heldout_queries: Number of held-out queries.
        without_relevant: Number of queries, of both kinds, none of whose candidates is relevant. No fusion can help them;
            they count with nDCG 0, and more candidates may.
        depth: The k of nDCG@k.
    """

    fusion: str
    dense_weight: float
    sparse_weight: float
    options: Mapping[str, float]
    train_ndcg: float
    heldout_ndcg: float
    baseline_heldout_ndcg: float
    gain: float
    gain_error: float
    table: tuple[Trial, ...]
    baseline: Trial
    best: Trial
    best_heldout_ndcg: float
    train_queries: int
    heldout_queries: int
    without_relevant: int
    depth: int

    @property
    def kept_baseline(self) -> bool:
        """Whether the recommendation is the baseline."""
        return self.gain == 0

    def __str__(self) -> str:
        """Return the result in a few sentences, the disappointing ones included."""
        name, queries = f"nDCG@{self.depth}", f"{self.heldout_queries} held-out queries"
        if not self.kept_baseline:
            text = (
                f"Use {self.best}: {name} {self.heldout_ndcg:.4f} on {queries}, the baseline {self.baseline} has "
                f"{self.baseline_heldout_ndcg:.4f}; gain {self.gain:+.4f}, standard error {self.gain_error:.4f}."
            )
            if self.gain < 2 * self.gain_error:
                text += " The gain is less than two standard errors: it may be chance."
        elif self.best == self.baseline:
            text = (
                f"Keep {self.baseline}: none of {len(self.table)} choices was better on {self.train_queries} training "
                f"queries; {name} {self.heldout_ndcg:.4f} on {queries}."
            )
        else:
            text = (
                f"Keep {self.baseline}: {name} {self.baseline_heldout_ndcg:.4f} on {queries}. {self.best} was the best of "
                f"{len(self.table)} choices on {self.train_queries} training queries and is no better on the held-out "
                f"ones: {self.best_heldout_ndcg:.4f}."
            )
        if self.without_relevant:
            total = self.train_queries + self.heldout_queries
            text += f" {self.without_relevant} of {total} queries have no relevant candidate."
        return text


def ndcg(ranking: Sequence[str], grades: Mapping[str, float], *, k: int = 10) -> float:
    """Return the normalised discounted cumulative gain of a ranking, nDCG@k.

    Jaervelin and Kekaelaeinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 2002, in the form of trec_eval's
    ``ndcg_cut``: the gain of a document is its grade, the discount log2(rank + 1), and the ideal ranking is made of all
    judged documents, found or not. Grades below 0 count as 0, documents without a grade too.

    Args:
        ranking: Ids, best first, each once.
        grades: Grade of each judged id, 0 for not relevant.
        k: How many ranks count.

    Returns:
        0 to 1; 0 when no judged document is relevant.

    Raises:
        ValueError: `k` is less than 1, an id is ranked twice, or a grade is not finite.
    """
    _check_depth(k)
    if len(set(ranking)) < len(ranking):
        raise ValueError("an id is ranked more than once; give each id once")
    ideal = _ideal(grades, k)
    gains = np.array([max(grades.get(record_id, 0), 0) for record_id in ranking[:k]], dtype=np.float64)
    return float(gains @ _discounts(len(gains)) / ideal) if ideal else 0.0


def tune(
    queries: Sequence[ScoredQuery],
    qrels: Mapping[str, Mapping[str, float]],
    *,
    fusions: Sequence[str] | None = None,
    weights: Sequence[tuple[float, float]] | None = None,
    calibration: Calibration | None = None,
    baseline: Trial | None = None,
    heldout: float = 0.5,
    k: int = 10,
) -> Tuning:
    """Choose fusion and weights by nDCG, and measure what the choice is worth.

    A fixed share of the queries, those with the lowest hash of their id, is held out. All choices are ranked on the others;
    the best is recommended if it is better than the baseline on the held-out ones as well, else the baseline is. Of
    equally good choices the simplest is taken: the baseline, then fusions in the order of `fusions`.

    Args:
        queries: The candidates of each query with both scores; `MIN_QUERIES` at least.
        qrels: For each query id the grades of judged record ids. Judged records that are no candidates count as missed.
        fusions: Names from `gte_rag.fusion.FUSIONS`, simplest first. None: all, ``"calibrated"`` only with a calibration.
        weights: (dense weight, sparse weight) to try with every fusion. None: grids suited to each fusion.
        calibration: Scales of the collection, for the fusion ``"calibrated"``.
        baseline: What has to be beaten. None: ``"weighted"`` with 1.0 and 0.3.
        heldout: Share of the queries that is held out, greater than 0 and less than 1.
        k: The depth of nDCG@k.

    Returns:
        The recommendation and the figures behind it; ``str()`` of it says it in words.

    Raises:
        ValueError: There are too few queries, one is given twice or has no judgements, or an argument is out of range.
    """
    _check_depth(k)
    if not 0 < heldout < 1:
        raise ValueError(f"heldout is {heldout}; it is a share, greater than 0 and less than 1")
    _check_queries(queries, qrels)
    baseline = Trial("weighted", 1.0, 0.3) if baseline is None else baseline
    choices = [baseline, *_choices(fusions, weights, calibration, baseline)]
    judged = [
        _Judged.of(query, qrels[query.query], k) for query in sorted(queries, key=lambda query: _hash(query.query))
    ]
    split = min(max(round(heldout * len(judged)), 1), len(judged) - 1)
    held_out, training = judged[:split], judged[split:]

    train = [_scores(choice, training, calibration).mean() for choice in choices]
    trials = [
        Trial(choice.fusion, choice.dense_weight, choice.sparse_weight, choice.options, float(value))
        for choice, value in zip(choices, train, strict=True)
    ]
    best = trials[0]
    for trial in trials[1:]:
        if trial.train_ndcg > best.train_ndcg + _ROUNDING:
            best = trial
    of_best, of_baseline = _scores(best, held_out, calibration), _scores(trials[0], held_out, calibration)
    differences = of_best - of_baseline
    better = bool(differences.mean() > _ROUNDING)
    chosen = best if better else trials[0]
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    return Tuning(
        fusion=chosen.fusion,
        dense_weight=chosen.dense_weight,
        sparse_weight=chosen.sparse_weight,
        options=chosen.options,
        train_ndcg=chosen.train_ndcg,
        heldout_ndcg=float((of_best if better else of_baseline).mean()),
        baseline_heldout_ndcg=float(of_baseline.mean()),
        gain=float(differences.mean()) if better else 0.0,
        gain_error=error if better else 0.0,
        table=tuple(sorted(trials, key=lambda trial: -trial.train_ndcg)),
        baseline=trials[0],
        best=best,
        best_heldout_ndcg=float(of_best.mean()),
        train_queries=len(training),
        heldout_queries=len(held_out),
        without_relevant=sum(not query.gains.any() for query in judged),
        depth=k,
    )


@dataclass(frozen=True, eq=False)
class _Judged:
    """A query's candidates with scores and gains, and the ideal DCG."""

    dense: Scores
    sparse: Scores
    gains: NDArray[np.float64]
    ideal: float
    depth: int

    @classmethod
    def of(cls, query: ScoredQuery, grades: Mapping[str, float], k: int) -> _Judged:
        gains = np.array([max(grades.get(record_id, 0), 0) for record_id in query.ids], dtype=np.float64)
        return cls(np.asarray(query.dense), np.asarray(query.sparse), gains, _ideal(grades, k), k)

    def ndcg(self, scores: FloatArray) -> float:
        if not self.ideal:
            return 0.0
        gains = self.gains[np.argsort(-scores, kind="stable")[: self.depth]]
        return float(gains @ _discounts(len(gains)) / self.ideal)


def _scores(trial: Trial, queries: Sequence[_Judged], calibration: Calibration | None) -> NDArray[np.float64]:
    """Return the nDCG of each query, float64, shape (len(queries),)."""
    fuse = fusion_named(trial.fusion, options=trial.options, calibration=calibration)
    return np.array(
        [
            query.ndcg(
                fuse(query.dense, query.sparse, dense_weight=trial.dense_weight, sparse_weight=trial.sparse_weight)
            )
            for query in queries
        ]
    )


def _choices(
    fusions: Sequence[str] | None,
    weights: Sequence[tuple[float, float]] | None,
    calibration: Calibration | None,
    baseline: Trial,
) -> list[Trial]:
    """Return everything to try beside the baseline, simplest first."""
    if isinstance(fusions, str):
        raise TypeError(f"fusions is the string {fusions!r}; give a list of names")
    if fusions is None:
        fusions = [name for name in FUSIONS if name != "calibrated" or calibration is not None]
    choices = []
    for name in fusions:
        fusion_named(name, calibration=calibration)  # refuses unknown names, and "calibrated" without a calibration
        grid = weights if weights is not None else _RAW_WEIGHTS if name == "weighted" else _EVEN_WEIGHTS
        for dense_weight, sparse_weight in grid:
            for options in _OPTIONS.get(name, ({},)):
                choice = Trial(name, float(dense_weight), float(sparse_weight), options)
                if str(choice) != str(baseline):
                    choices.append(choice)
    return choices


def _check_queries(queries: Sequence[ScoredQuery], qrels: Mapping[str, Mapping[str, float]]) -> None:
    if len(queries) < MIN_QUERIES:
        raise ValueError(
            f"{len(queries)} queries are too few to choose by; at least {MIN_QUERIES} judged queries are needed, and a "
            "hundred or more to tell small gains from chance"
        )
    seen: set[str] = set()
    for query in queries:
        if query.query in seen:
            raise ValueError(f"query {query.query!r} is given more than once; give each query once")
        if query.query not in qrels:
            raise ValueError(f"query {query.query!r} has no judgements in qrels; add them, or leave the query out")
        seen.add(query.query)


def _hash(query: str) -> bytes:
    """Return a number that depends on nothing but the query's id, so that a query is always on the same side."""
    return hashlib.blake2b(query.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _ideal(grades: Mapping[str, float], k: int) -> float:
    """Return the DCG@k of the best ranking of all judged documents."""
    gains = np.sort(np.array([max(grade, 0) for grade in grades.values()], dtype=np.float64))[::-1][:k]
    if not np.isfinite(gains).all():
        raise ValueError("a grade is not finite; give numbers, 0 for not relevant")
    return float(gains @ _discounts(len(gains)))


def _discounts(count: int) -> NDArray[np.float64]:
    """Return 1 / log2(rank + 1) for the ranks 1 to `count`."""
    discounts: NDArray[np.float64] = 1 / np.log2(np.arange(2, count + 2))
    return discounts


def _check_depth(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; give a whole number")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
