"""Hybrid retrieval beside what it stands on and what it replaces, on synthetic vectors.

    python benchmarks/retrieval.py --sizes 1000 10000 100000 --out benchmarks/results/retrieval.json

Vectors are made beforehand, so that only storing and searching is timed. In one run, on the same records: a plain Chroma
collection, `langchain_chroma` over it, gte-rag in each mode, and Qdrant's local mode (dense + sparse, RRF) if `qdrant-client`
is installed. Latencies are of single queries, the systems taking turns, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import chromadb
import numpy as np
from chromadb.config import Settings

from gte_rag import HybridCollection, HybridRetriever
from gte_rag.retriever import MODES
from gte_rag.vectors import Encoding
from synthetic import VOCAB_SIZE, SyntheticEncoder

BATCH = 1000
CANDIDATES = 100
RECALL_CANDIDATES = (10, 20, 50, 100, 200, 500)


class Precomputed(SyntheticEncoder):
    """Looks vectors up that were made before the clock started."""

    def __init__(self, texts: Sequence[str], queries: Sequence[str]) -> None:
        super().__init__()
        self.documents = super().encode_documents(texts)
        self.queries = super().encode_queries(queries)
        self._rows = {text: row for row, text in enumerate(texts)} | {text: row for row, text in enumerate(queries)}

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, **_: object
    ) -> Encoding:
        """Return the vectors made before."""
        return self._pick(self.documents, texts)

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, **_: object) -> Encoding:
        """Return the vectors made before."""
        return self._pick(self.queries, texts)

    def _pick(self, encoding: Encoding, texts: Sequence[str]) -> Encoding:
        rows = np.array([self._rows[text] for text in texts], dtype=np.int64)
        assert encoding.dense is not None
        assert encoding.sparse is not None
        return Encoding(encoding.dense[rows], encoding.sparse.take(rows))


def body(number: int) -> str:
    """Return a text of about the length of a passage."""
    return f"record {number}: " + "lorem ipsum dolor sit amet consectetur " * 10


def disk_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50 and p95 in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1000 * statistics.median(ordered), 3),
        "p95_ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))], 3),
    }


def in_turns(calls: dict[str, Callable[[int], object]], queries: int) -> dict[str, dict[str, float]]:
    """Time each call on each query, the calls taking turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for query in range(queries):
        for name, call in calls.items():
            started = time.perf_counter()
            call(query)
            times[name].append(time.perf_counter() - started)
    return {name: percentiles(seconds) for name, seconds in times.items()}


def client_at(folder: Path) -> Any:  # noqa: ANN401
    """Open a Chroma database."""
    return chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))


def measure(size: int, queries: int, base: Path) -> dict[str, Any]:
    """Return all figures for one collection size."""
    texts = [body(number) for number in range(size)]
    questions = [f"query {number}" for number in range(queries)]
    encoder = Precomputed(texts, questions)
    assert encoder.documents.dense is not None
    assert encoder.queries.dense is not None
    ids = [f"r{number}" for number in range(size)]
    result: dict[str, Any] = {"records": size}

    plain_folder, hybrid_folder = base / f"plain-{size}", base / f"hybrid-{size}"
    plain = client_at(plain_folder).create_collection(
        "plain", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    hybrid = HybridCollection(client_at(hybrid_folder), "hybrid", encoder=cast(Any, encoder))
    spent = {"plain": [0.0], "hybrid": [0.0]}
    for start in range(0, size, BATCH):  # in turns, so that both meet the same noise
        part = slice(start, start + BATCH)
        metadatas: Any = [{"n": number} for number in range(start, min(start + BATCH, size))]
        began = time.perf_counter()
        plain.upsert(
            ids=ids[part], documents=texts[part], embeddings=encoder.documents.dense[part], metadatas=metadatas
        )
        spent["plain"].append(time.perf_counter() - began)
        began = time.perf_counter()
        hybrid.upsert(ids[part], texts[part], metadatas=metadatas)
        spent["hybrid"].append(time.perf_counter() - began)
    totals = {name: sum(seconds) for name, seconds in spent.items()}
    result["index"] = {
        "plain_records_per_s": round(size / totals["plain"]),
        "hybrid_records_per_s": round(size / totals["hybrid"]),
        "hybrid_over_plain_time": round(totals["hybrid"] / totals["plain"], 3),
        "last_over_first_batch_time_plain": round(spent["plain"][-1] / spent["plain"][1], 2),
        "last_over_first_batch_time_hybrid": round(spent["hybrid"][-1] / spent["hybrid"][1], 2),
    }

    began = time.perf_counter()
    lexical = hybrid.lexical_index()
    result["lexical_build_s"] = round(time.perf_counter() - began, 3)
    result["disk"] = {
        "plain_bytes_per_record": round(disk_bytes(plain_folder) / size),
        "hybrid_bytes_per_record": round(disk_bytes(hybrid_folder) / size),
        "lexical_cache_bytes_per_record": round(disk_bytes(hybrid_folder / "gte_rag") / size)
        if (hybrid_folder / "gte_rag").exists()
        else 0,
    }
    hybrid.refresh()
    began = time.perf_counter()
    HybridCollection(client_at(hybrid_folder), "hybrid", encoder=cast(Any, encoder)).lexical_index()
    result["lexical_open_s"] = round(time.perf_counter() - began, 3)

    vectors = encoder.queries.dense
    retrievers = {mode: HybridRetriever(hybrid, k=10, candidates=CANDIDATES, mode=mode) for mode in MODES}
    calls: dict[str, Callable[[int], object]] = {
        "chroma query, 100 results": lambda i: plain.query(query_embeddings=vectors[i][None], n_results=CANDIDATES),
        "chroma query, 10 results": lambda i: plain.query(query_embeddings=vectors[i][None], n_results=10),
    }
    for mode, retriever in retrievers.items():
        calls[f"gte-rag {mode}"] = lambda i, retriever=retriever: retriever.search(questions[i])  # type: ignore[misc]
    add_langchain(calls, plain_folder, vectors)
    qdrant = add_qdrant(calls, encoder, ids, texts)
    result["latency"] = in_turns(calls, queries)
    raw = result["latency"]["chroma query, 100 results"]["p50_ms"]
    rescore = result["latency"]["gte-rag rescore"]["p50_ms"]
    result["rescore_over_raw_query"] = round(rescore / raw, 2)
    result["union_minus_rescore_ms"] = round(result["latency"]["gte-rag union"]["p50_ms"] - rescore, 2)
    result["recall_at_10_of_rescore"] = recall(hybrid, encoder, questions, ids)
    result["qdrant"] = qdrant
    del lexical
    return result


def add_langchain(calls: dict[str, Callable[[int], object]], folder: Path, vectors: np.ndarray[Any, Any]) -> None:
    """Add langchain-chroma over the plain collection, if it is installed."""
    try:
        from langchain_chroma import Chroma
    except ImportError:
        return
    store = Chroma("plain", client=client_at(folder), create_collection_if_not_exists=False)
    calls["langchain-chroma, 10 results"] = lambda i: store.similarity_search_by_vector(vectors[i].tolist(), k=10)


def add_qdrant(
    calls: dict[str, Callable[[int], object]], encoder: Precomputed, ids: list[str], texts: list[str]
) -> str:
    """Add Qdrant's local mode with dense and sparse vectors and RRF, if it is installed."""
    try:
        from qdrant_client import QdrantClient, models
    except ImportError:
        return "not installed"
    if len(ids) > 20_000:
        return "left out above 20,000 records: its local mode says itself that it is not made for them"
    assert encoder.documents.dense is not None
    assert encoder.documents.sparse is not None
    assert encoder.queries.dense is not None
    assert encoder.queries.sparse is not None
    client = QdrantClient(":memory:")
    client.create_collection(
        "hybrid",
        vectors_config={"dense": models.VectorParams(size=encoder.dimension, distance=models.Distance.COSINE)},
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    points = (
        models.PointStruct(
            id=row,
            payload={"text": texts[row]},
            vector={
                "dense": encoder.documents.dense[row].tolist(),
                "sparse": models.SparseVector(indices=sparse.indices.tolist(), values=sparse.values.tolist()),
            },
        )
        for row, sparse in enumerate(encoder.documents.sparse)
    )
    client.upload_points("hybrid", points, batch_size=BATCH)

    def search(i: int) -> object:
        assert encoder.queries.dense is not None
        assert encoder.queries.sparse is not None
        sparse = encoder.queries.sparse[i]
        return client.query_points(
            "hybrid",
            prefetch=[
                models.Prefetch(query=encoder.queries.dense[i].tolist(), using="dense", limit=CANDIDATES),
                models.Prefetch(
                    query=models.SparseVector(indices=sparse.indices.tolist(), values=sparse.values.tolist()),
                    using="sparse",
                    limit=CANDIDATES,
                ),
            ],
            query=models.FusionQuery(fusion=models.Fusion.RRF),
            limit=10,
        )

    calls["qdrant local hybrid, 10 results"] = search
    return version("qdrant-client")


def recall(
    hybrid: HybridCollection, encoder: Precomputed, questions: Sequence[str], ids: Sequence[str]
) -> dict[str, float]:
    """Return the share of the exact best ten (weighted, brute force) that `rescore` and `union` find."""
    assert encoder.documents.dense is not None
    assert encoder.documents.sparse is not None
    assert encoder.queries.dense is not None
    assert encoder.queries.sparse is not None
    sample = questions[:30]
    exact = []
    for row in range(len(sample)):
        scores = encoder.documents.dense @ encoder.queries.dense[row]
        scores = scores + 0.3 * encoder.documents.sparse.dot(encoder.queries.sparse[row])
        exact.append({ids[index] for index in np.argsort(-scores)[:10]})
    found: dict[str, float] = {}
    for mode in ("rescore", "union"):
        for candidates in RECALL_CANDIDATES:
            retriever = HybridRetriever(hybrid, k=10, candidates=candidates, mode=mode)
            hits = retriever.search_batch(sample)
            shares = [len({hit.id for hit in part} & best) / 10 for part, best in zip(hits, exact, strict=True)]
            found[f"{mode} {candidates}"] = round(statistics.mean(shares), 3)
    return found


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {}
    for package in ("gte-rag", "chromadb", "langchain-chroma", "qdrant-client", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Measure all sizes and print, and optionally write, the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": versions(),
        "vectors": f"synthetic: 256 dense dimensions, 100 of {VOCAB_SIZE:,} tokens on average (Zipf), 12 in queries",
        "sizes": [],
    }
    base = Path(tempfile.mkdtemp())
    try:
        for size in options.sizes:
            print(f"{size:,} records …", file=sys.stderr)
            result["sizes"].append(measure(size, options.queries, base))
            print(json.dumps(result["sizes"][-1], indent=2), flush=True)
    finally:
        shutil.rmtree(base)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
