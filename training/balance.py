"""How much the sparse weights should be scaled for the default fusion: cosine + 0.3 * sparse score.

A sparse score has no natural size. This tries factors on training pairs and prints the mean reciprocal rank of each; give the
best one to `export.py` as `--sparse-scale`.

    python training/balance.py --data FOLDER --model gte-mini/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import corpus
import numpy as np
from mixture import seeded

from gte_rag import GTEEncoder

_SPARSE_WEIGHT = 0.3  # of HybridRetriever
_FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4)


def reciprocal_rank(scores: np.ndarray) -> float:
    """Return the mean reciprocal rank of the diagonal."""
    ranks = 1 + (scores > np.diag(scores)[:, None]).sum(1)
    return float((1 / ranks).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--model", required=True, help="an exported checkpoint")
    parser.add_argument("--pairs", type=int, default=400, help="of each source")
    args = parser.parse_args()
    encoder = GTEEncoder.from_pretrained(args.model, max_length=256)
    rng = seeded(0)
    sources: dict[str, list[corpus.Pair]] = {}
    for pair in corpus.question_pairs(args.data):
        if "tldr" not in pair.source:
            sources.setdefault(f"{pair.source}.{pair.second_language}", []).append(pair)
    table = []
    for name in sorted(sources):
        pairs = list({pair.second: pair for pair in sources[name]}.values())
        if len(pairs) < args.pairs:
            continue
        pairs = rng.sample(pairs, args.pairs)
        q = encoder.encode_queries([pair.first for pair in pairs])
        p = encoder.encode_documents([pair.second for pair in pairs])
        assert q.dense is not None
        assert p.dense is not None
        assert q.sparse is not None
        assert p.sparse is not None
        dense = q.dense @ p.dense.T
        sparse = np.stack([p.sparse.dot(vector) for vector in q.sparse])
        row = [reciprocal_rank(dense), reciprocal_rank(sparse)]
        row += [reciprocal_rank(dense + _SPARSE_WEIGHT * factor**2 * sparse) for factor in _FACTORS]
        table.append(row)
        print(name, " ".join(f"{value:.3f}" for value in row), flush=True)
    print("dense, sparse, then factors", _FACTORS)
    print("mean", " ".join(f"{value:.4f}" for value in np.mean(table, axis=0)))


if __name__ == "__main__":
    main()
