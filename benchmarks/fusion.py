"""How much each mode and fusion finds on labelled data: nDCG@10 of BEIR-layout folders with one encoder.

    python benchmarks/fusion.py DATA/xquad-en DATA/cranfield --out benchmarks/results/fusion.json

Every folder holds corpus.jsonl, queries.jsonl (both may be gzipped) and qrels.tsv. Scores are computed exactly, over all
passages; ``rescore`` fuses the 100 best dense ones, ``union`` these and the 100 best sparse ones. ``tuned`` is what
`HybridRetriever.tune` would choose; its figure is that of the held-out half of the queries, beside the default's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gte_rag import GTEEncoder
from gte_rag.fusion import FUSIONS, fusion_named, measure
from gte_rag.tuning import ScoredQuery, ndcg, tune

DEPTH = 100


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read a JSON-lines file, gzipped or not."""
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else plain.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_qrels(folder: Path) -> dict[str, dict[str, float]]:
    """Read relevance judgements: query id, passage id, grade, after a header line."""
    qrels: dict[str, dict[str, float]] = {}
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines():
        query, passage, grade = line.split("\t")
        if grade.lstrip("-").isdigit():
            qrels.setdefault(query, {})[passage] = float(grade)
    return qrels


def evaluate(folder: Path, encoder: GTEEncoder, max_queries: int) -> dict[str, Any]:
    """Return nDCG@10 by mode and fusion."""
    corpus, qrels = read_lines(folder, "corpus"), read_qrels(folder)
    queries = [query for query in read_lines(folder, "queries") if query["_id"] in qrels][:max_queries]
    ids = np.array([passage["_id"] for passage in corpus])
    texts = [f"{passage.get('title', '')} {passage['text']}".strip() for passage in corpus]
    documents = encoder.encode_documents(texts, show_progress=True)
    asked = encoder.encode_queries([query["text"] for query in queries])
    assert documents.dense is not None
    assert documents.sparse is not None
    assert asked.dense is not None
    assert asked.sparse is not None
    dense = [documents.dense @ vector for vector in asked.dense]
    sparse = [documents.sparse.dot(vector) for vector in asked.sparse]
    pools = {"rescore": [np.argsort(-scores, kind="stable")[:DEPTH] for scores in dense]}
    pools["union"] = [
        np.unique(
            np.concatenate([pool, [row for row in np.argsort(-scores, kind="stable")[:DEPTH] if scores[row] > 0]])
        )
        for pool, scores in zip(pools["rescore"], sparse, strict=True)
    ]
    calibration = measure(
        [scores[pool] for scores, pool in zip(dense, pools["rescore"], strict=True)],
        [scores[pool] for scores, pool in zip(sparse, pools["rescore"], strict=True)],
    )

    def mean(rankings: list[Any]) -> float:
        found = [ndcg(ranking, qrels[query["_id"]]) for ranking, query in zip(rankings, queries, strict=True)]
        return round(float(np.mean(found)), 4)

    result: dict[str, Any] = {
        "passages": len(corpus),
        "queries": len(queries),
        "dense": mean([ids[np.argsort(-scores, kind="stable")[:10]].tolist() for scores in dense]),
        "sparse": mean([ids[np.argsort(-scores, kind="stable")[:10]].tolist() for scores in sparse]),
    }
    for mode, pool in pools.items():
        for name in FUSIONS:
            fuse = fusion_named(name, calibration=calibration)
            weights = (0.3,) if name == "weighted" else (1.0,)
            for weight in weights:
                rankings = [
                    ids[
                        rows[
                            np.argsort(-fuse(d[rows], s[rows], dense_weight=1.0, sparse_weight=weight), kind="stable")[
                                :10
                            ]
                        ]
                    ]
                    for rows, d, s in zip(pool, dense, sparse, strict=True)
                ]
                result[f"{mode} {name}"] = mean([ranking.tolist() for ranking in rankings])
    scored = [
        ScoredQuery(query["_id"], ids[rows].tolist(), d[rows], s[rows])
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
