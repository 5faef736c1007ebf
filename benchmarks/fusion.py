"""How much each mode and fusion finds on labelled data: nDCG@10 of BEIR-layout folders with one encoder.

    python benchmarks/fusion.py DATA/xquad-en DATA/cranfield --out benchmarks/results/fusion.json

The systems side by side, without tuning, are in quality.py.

Scores are computed exactly, over all
passages; ``rescore`` fuses the 100 best dense ones, ``union`` these and the 100 best sparse ones. ``tuned`` is what
`HybridRetriever.tune` would choose; its figure is that of the held-out half of the queries, beside the default's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gte_rag import GTEEncoder
from gte_rag.datasets import RetrievalSet, load
from gte_rag.exact import best_rows
from gte_rag.fusion import FUSIONS, fusion_named, measure
from gte_rag.tuning import ScoredQuery, ndcg, tune

DEPTH = 100


def evaluate(folder: Path, encoder: GTEEncoder, max_queries: int) -> dict[str, Any]:
    """Return nDCG@10 by mode and fusion."""
    dataset = load(folder)
    assert isinstance(dataset, RetrievalSet)
    qrels, queries = dataset.qrels, list(dataset.queries)[:max_queries]
    ids = np.array(list(dataset.corpus))
    documents = encoder.encode_documents(list(dataset.corpus.values()), show_progress=True)
    asked = encoder.encode_queries([dataset.queries[query] for query in queries])
    assert documents.dense is not None
    assert documents.sparse is not None
    assert asked.dense is not None
    assert asked.sparse is not None
    dense = [documents.dense @ vector for vector in asked.dense]
    sparse = [documents.sparse.dot(vector) for vector in asked.sparse]
    pools = {"rescore": [best_rows(scores, DEPTH) for scores in dense]}
    pools["union"] = [
        np.unique(np.concatenate([pool, [row for row in best_rows(scores, DEPTH) if scores[row] > 0]]))
        for pool, scores in zip(pools["rescore"], sparse, strict=True)
    ]
    calibration = measure(
        [scores[pool] for scores, pool in zip(dense, pools["rescore"], strict=True)],
        [scores[pool] for scores, pool in zip(sparse, pools["rescore"], strict=True)],
    )

    def mean(rankings: list[Any]) -> float:
        found = [ndcg(ranking, qrels[query]) for ranking, query in zip(rankings, queries, strict=True)]
        return round(float(np.mean(found)), 4)

    result: dict[str, Any] = {
        "passages": len(dataset.corpus),
        "queries": len(queries),
        "dense": mean([ids[best_rows(scores, 10)].tolist() for scores in dense]),
        "sparse": mean([ids[best_rows(scores, 10)].tolist() for scores in sparse]),
    }
    for mode, pool in pools.items():
        for name in FUSIONS:
            fuse = fusion_named(name, calibration=calibration)
            weights = (0.3,) if name == "weighted" else (1.0,)
            for weight in weights:
                rankings = [
                    ids[rows[best_rows(fuse(d[rows], s[rows], dense_weight=1.0, sparse_weight=weight), 10)]]
                    for rows, d, s in zip(pool, dense, sparse, strict=True)
                ]
                result[f"{mode} {name}"] = mean([ranking.tolist() for ranking in rankings])
    scored = [
        ScoredQuery(query, ids[rows].tolist(), d[rows], s[rows])
        for query, rows, d, s in zip(queries, pools["union"], dense, sparse, strict=True)
    ]
    tuning = tune(scored, qrels, calibration=calibration)
    result["tuned"] = {
        "best": str(tuning.best),
        "heldout": round(tuning.best_heldout_ndcg, 4),
        "default_heldout": round(tuning.baseline_heldout_ndcg, 4),
        "gain_error": round(tuning.gain_error, 4),
    }
    return result


def main() -> None:
    """Evaluate the folders and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default="gte-mini")
    parser.add_argument("--max-queries", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    encoder = GTEEncoder.from_pretrained(options.model, max_length=options.max_length)
    sets = {}
    for folder in options.folders:
        sets[folder.name] = evaluate(folder, encoder, options.max_queries)
        print(folder.name, json.dumps(sets[folder.name]), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/fusion.py", *(f.name for f in options.folders)]),
        "model": f"{encoder.name} ({encoder.fingerprint}), texts cut at {options.max_length} tokens",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "torch": version("torch"),
        "ndcg@10": sets,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
