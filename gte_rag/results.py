"""What an evaluation reached: kept, compared query by query, written and read as JSON.

Needs neither a model nor the data that was evaluated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The measure that speaks for each task.
MAIN_SCORES: Mapping[str, str] = {"retrieval": "ndcg@10", "bitext": "f1", "similarity": "spearman"}

_FORMAT = "gte_rag evaluation 1"
_PERMUTATIONS = 10_000
_BLOCK = 2**24  # signs drawn at a time


@dataclass(frozen=True)
class Result:
    """What one way of using an encoder reached on one data set.

    Attributes:
        dataset: Name of the data set.
        task: ``"retrieval"``, ``"bitext"`` or ``"similarity"``.
        model: Name of the encoder.
        precision: Its arithmetic, if it says so.
        mode: How passages were found, one of `MODES`; ``"dense"`` for the other tasks.
        dimension: Length of the dense vectors; None where they had no part.
        fusion: How two scores became one; None where there was one.
        dense_weight: Weight of the dense side; None where there was no fusion.
        sparse_weight: Weight of the sparse side; likewise.
        candidates: How many passages each side contributed; likewise.
        queries: Number of queries, or of pairs.
        passages: Number of passages searched; 0 for the other tasks.
        truncated: How many texts were longer than the encoder reads and were cut.
        scores: ``ndcg@10``, ``recall@20``, ``recall@100`` and ``mrr@10``; or ``f1`` and ``accuracy`` of finding the
            translation, and ``f1_back`` and ``accuracy_back`` in the other direction; or ``spearman`` and ``pearson``.
        per_query: For each measure that is a mean over queries or pairs, the value of each of them.
    """

    dataset: str
    task: str
    model: str
    precision: str | None
    mode: str
    dimension: int | None
    fusion: str | None
    dense_weight: float | None
    sparse_weight: float | None
    candidates: int | None
    queries: int
    passages: int
    truncated: int
    scores: Mapping[str, float]
    per_query: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return data set, model and the way of searching in one phrase."""
        return f"{self.dataset}, {self.model}: {self.method}"

    @property
    def method(self) -> str:
        """The way of searching in one phrase: mode, dimension, fusion and weights."""
        parts = [self.mode]
        if self.fusion is not None:
            parts.append(f"{self.fusion} {self.dense_weight:g}:{self.sparse_weight:g}")
        if self.dimension is not None:
            parts.append(f"{self.dimension}d")
        if self.precision not in (None, "float32"):
            parts.append(str(self.precision))
        return " ".join(parts)

    @property
    def main_score(self) -> float:
        """The measure that speaks for the task; see `MAIN_SCORES`."""
        return self.scores[MAIN_SCORES[self.task]]


@dataclass(frozen=True)
class Comparison:
    """The difference between two results on the queries that both have.

    Attributes:
        first: The baseline.
        second: What is compared with it.
        score: Name of the measure.
        queries: Number of queries that both have; 0 where there are no values per query.
        first_score: The baseline's mean on these queries.
        second_score: The other's mean on them.
        difference: ``second_score - first_score``.
        error: Standard error of the difference, from the differences per query; nan without values per query.
        p_value: Two-sided p-value of the paired randomisation test; nan likewise.
    """

    first: Result
    second: Result
    score: str
    queries: int
    first_score: float
    second_score: float
    difference: float
    error: float
    p_value: float


def compare(first: Result, second: Result, *, score: str | None = None) -> Comparison:
    """Compare two results on one data set, query by query.

    The p-value is that of the paired randomisation test: how often would the difference be as large if for each query it
    were chance which of the two results is whose (Smucker, Allan and Carterette, CIKM 2007). Its 10,000 permutations are
    the same ones each time.

    Args:
        first: The baseline.
        second: What is compared with it.
        score: The measure; None is the task's main one.

    Raises:
        ValueError: The results are of different data sets, or have no query in common.
    """
    if (first.dataset, first.task) != (second.dataset, second.task):
        raise ValueError(f"{first.dataset} ({first.task}) cannot be compared with {second.dataset} ({second.task})")
    score = MAIN_SCORES[first.task] if score is None else score
    for result in (first, second):
        if score not in result.scores:
            raise ValueError(f"{result} has no score {score!r}; it has: {', '.join(result.scores)}")
    ours, theirs = first.per_query.get(score, {}), second.per_query.get(score, {})
    if not ours or not theirs:
        one, other = first.scores[score], second.scores[score]
        return Comparison(first, second, score, 0, one, other, other - one, math.nan, math.nan)
    common = [query for query in ours if query in theirs]
    if not common:
        raise ValueError(f"{first} and {second} have no query in common; evaluate them with the same queries and seed")
    one_by_one = np.array([[ours[query], theirs[query]] for query in common])
    one, other = one_by_one.mean(axis=0).tolist()
    differences = one_by_one[:, 1] - one_by_one[:, 0]
    error = float(differences.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else math.nan
    return Comparison(first, second, score, len(common), one, other, other - one, error, _p_value(differences))


def paired(first: Iterable[Result], second: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Pair the results of two runs that say the same thing: one data set, mode, fusion and dimension.

    Where the dimensions of two models differ and each has one result for a data set, mode and fusion, these are paired.
    """

    def grouped(results: Iterable[Result], *, closely: bool) -> dict[tuple[Any, ...], list[Result]]:
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for result in results:
            key = (result.task, result.dataset, result.mode, result.fusion, *([result.dimension] if closely else []))
            groups.setdefault(key, []).append(result)
        return groups

    first, second = list(first), list(second)
    pairs: list[tuple[Result, Result]] = []
    left = {id(result) for result in second}
    for closely in (True, False):
        ours, theirs = grouped(first, closely=closely), grouped(second, closely=closely)
        for key, results in theirs.items():
            open_results = [result for result in results if id(result) in left]
            if len(ours.get(key, [])) == 1 and len(open_results) == 1 and (closely or len(results) == 1):
                pairs.append((ours[key][0], open_results[0]))
                left.discard(id(open_results[0]))
    order = {id(result): place for place, result in enumerate(second)}
    return sorted(pairs, key=lambda pair: order[id(pair[1])])


def save(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write results as one JSON file, complete or not at all."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        draft.write_text(to_json(results) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def to_json(results: Sequence[Result]) -> str:
    """Return results as one JSON document, readable by `read`."""
    return json.dumps({"format": _FORMAT, "results": [asdict(result) for result in results]}, ensure_ascii=False)


def read(path: str | os.PathLike[str]) -> list[Result]:
    """Read results that `save` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no file of results.
    """
    names = {entry.name for entry in fields(Result)}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["format"] != _FORMAT or any(set(result) != names for result in document["results"]):
            raise ValueError(f"its format is not {_FORMAT!r}")
        return [Result(**result) for result in document["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of an evaluation ({error}); write one with --json") from error


def _p_value(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of the paired randomisation test."""
    random = np.random.default_rng(0)
    observed = abs(float(differences.sum())) - 1e-9  # roundings are no differences
    step = max(1, min(_PERMUTATIONS, _BLOCK // len(differences)))
    extreme = 0
    for start in range(0, _PERMUTATIONS, step):
        signs = random.integers(0, 2, (min(step, _PERMUTATIONS - start), len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (_PERMUTATIONS + 1)
