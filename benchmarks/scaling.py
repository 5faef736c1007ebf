"""What a million documents cost: measures bulk encoding here, and computes storage, memory and time from measured figures.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Documents are the bundled ones, each with a number before it, so that none is encoded twice. One worker on Ray encodes them with
gte-mini; time is taken from the workers' own marks, without the start of Ray. `docs/scaling.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from gte_rag import GTEEncoder
from gte_rag.demo import read_documents
from gte_rag.distributed import encode_files

_PARTS = 4


def measure(rows: int, cpus: int) -> dict[str, Any]:
    """Encode so many documents with one worker and return bytes and speed."""
    texts = [document.text for document in read_documents()]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.jsonl"), Path(folder, "out")
        lines = [json.dumps({"id": str(n), "text": f"{n} {texts[n % len(texts)]}"}) for n in range(rows)]
        source.write_text("\n".join(lines), encoding="utf-8")
        report = encode_files([source], out, workers=1, cpus_per_worker=cpus, rows_per_part=rows // _PARTS)
        done = sorted((out / "_gte_rag" / "done").glob("*"), key=lambda path: path.stat().st_mtime_ns)
        marks = [json.loads(path.read_text()) for path in done]
        size = sum(path.stat().st_size for path in out.glob("*.parquet"))
    encoder = GTEEncoder.from_pretrained()
    sample = [json.loads(line)["text"] for line in lines[: min(rows, 500)]]
    sparse = encoder.encode_documents(sample, dense=False).sparse
    assert sparse is not None
    tokens = sum(map(encoder.count_tokens, sample)) / len(sample)
    warm = marks[1:]  # the part that was done first has the loading of the model in its time
    per_second = sum(mark["written"] for mark in warm) / sum(mark["seconds"] for mark in warm)
    return {
        "rows": report.written,
        "dimension": encoder.dimension,
        "precision": encoder.precision,
        "tokens per text": round(tokens, 1),
        "sparse weights per text": round(sparse.indices.size / len(sample), 1),
        "text bytes per row": round(sum(len(text.encode()) for text in sample) / len(sample)),
        "parquet bytes per row": round(size / report.written),
        "texts per second": round(per_second, 1),
        "tokens per second": round(per_second * tokens),
    }


def per_million(dimension: int, weights: float, tokens: float, tokens_per_second: float) -> dict[str, float]:
    """Return GB and hours for a million documents.

    Dense: four bytes a number. A graph index (HNSW, 16 links a node in both directions) adds 128 bytes a document. Sparse: a
    token id and a weight of four bytes each, twice where an inverted index stands beside the stored vectors.
    """
    return {
        "dense GB": 4 * dimension / 1000,
        "graph index in memory GB": (4 * dimension + 128) / 1000,
        "sparse GB": 8 * weights / 1000,
        "encoding hours": 1e6 * tokens / tokens_per_second / 3600,
    }


def main() -> None:
    """Measure, compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.rows < _PARTS:
        parser.error(f"--rows {arguments.rows}: give at least {_PARTS}, one for each part")
    found = measure(arguments.rows, arguments.cpus)
    result = {
        "command": f"python benchmarks/scaling.py --rows {arguments.rows} --cpus {arguments.cpus}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "torch": torch.__version__,
        "model": "gte-mini",
        "measured": found,
        "a million such documents": {
            name: round(value, 3)
            for name, value in per_million(
                found["dimension"],
                found["sparse weights per text"],
                found["tokens per text"],
                found["tokens per second"],
            ).items()
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
