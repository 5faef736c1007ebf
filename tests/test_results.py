"""Results are compared query by query, paired by what they measure, and survive a file."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gte_rag.results import Result, compare, paired, read, save

SCORES = {"ndcg@10": 0.5, "recall@20": 0.5, "recall@100": 0.5, "mrr@10": 0.5}


def result(values: dict[str, float] | None = None, **changes: object) -> Result:
    per_query = {"ndcg@10": values} if values else {}
    mean = {"ndcg@10": float(np.mean(list(values.values())))} if values else {}
    base = Result(
        "set", "retrieval", "m", "float32", "dense", 8, None, None, None, None, 4, 9, 0, SCORES | mean, per_query
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_the_p_value_agrees_with_all_permutations() -> None:
    before = dict(zip("abcdefgh", [0.1, 0.4, 0.3, 0.9, 0.5, 0.2, 0.7, 0.6], strict=True))
    after = dict(zip("abcdefgh", [0.5, 0.6, 0.2, 1.0, 0.9, 0.3, 0.6, 0.9], strict=True))
    comparison = compare(result(before), result(after))
    differences = np.array([after[query] - before[query] for query in before])
    flips = np.array(list(itertools.product([1, -1], repeat=8))) @ differences
    exact = float((np.abs(flips) >= abs(differences.sum()) - 1e-9).mean())
    assert comparison.p_value == pytest.approx(exact, abs=0.02)  # 10,000 draws: standard error at most 0.005
    assert comparison.difference == pytest.approx(differences.mean())
    assert comparison.error == pytest.approx(differences.std(ddof=1) / math.sqrt(8))
    assert comparison.queries == 8


def test_equal_results_are_no_improvement_and_only_common_queries_count() -> None:
    one, other = result({"a": 0.5, "b": 1.0, "c": 0.0}), result({"b": 1.0, "a": 0.5, "d": 1.0})
    comparison = compare(one, other)
    assert (comparison.queries, comparison.difference, comparison.p_value) == (2, 0.0, 1.0)
    assert (comparison.first_score, comparison.second_score) == (0.75, 0.75)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(result(), result(dataset="other"))
    with pytest.raises(ValueError, match="no query in common"):
        compare(result({"a": 1.0}), result({"b": 1.0}))
    with pytest.raises(ValueError, match="has no score 'f1'; it has: ndcg@10"):
        compare(result(), result(), score="f1")
    assert math.isnan(compare(result(), result()).p_value)


def test_runs_are_paired_by_set_mode_fusion_and_dimension() -> None:
    first = [result(), result(dimension=4), result(mode="union", fusion="weighted"), result(dataset="x", dimension=8)]
    second = [result(dimension=4), result(mode="union"), result(dataset="x", dimension=16), result()]
    assert [(first.index(one), second.index(other)) for one, other in paired(first, second)] == [(1, 0), (3, 2), (0, 3)]


def test_results_survive_a_file(tmp_path: Path) -> None:
    kept = [result({"ü": 0.25}), result(mode="union", fusion="weighted", dense_weight=1.0, sparse_weight=0.3)]
    save(kept, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == kept
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "gte_rag evaluation 1", "results": [{}]}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.json holds no results of an evaluation"):
        read(tmp_path / "r.json")


def test_a_result_says_how_it_was_made() -> None:
    one = result(mode="union", fusion="weighted", dense_weight=1.0, sparse_weight=0.3, precision="bf16")
    assert str(one) == "set, m: union weighted 1:0.3 8d bf16"
    assert one.main_score == 0.5
