"""Hybrid retrieval beside what it stands on and what it replaces, on synthetic vectors.

    python benchmarks/retrieval.py --sizes 1000 10000 100000 --out benchmarks/results/retrieval.json

Sizes may be run one by one: those in the file are kept if machine, versions and vectors are the same.
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
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import chromadb
import numpy as np
from chromadb.api.models.Collection import Collection
from chromadb.config import Settings

from gte_rag import HybridCollection, HybridRetriever
from gte_rag.records import RESERVED_KEY, seal
from gte_rag.retriever import MODES
from gte_rag.vectors import Encoding
from synthetic import VOCAB_SIZE, SyntheticEncoder

BATCH = 1000
# Smaller collections are indexed several times, until so many records have been written.
SMALL = 10_000
SYSTEMS = ("plain", "opaque", "hybrid")
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


@dataclass
class Spent:
    """What each batch of one system cost, in seconds: on the clock, and of all processors together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def time_indexing(
    folder: Path, encoder: Precomputed, ids: list[str], texts: list[str]
) -> tuple[Collection, HybridCollection, dict[str, Spent]]:
    """Index the same records in each system, batch by batch, so that all meet the same noise.

    `opaque` is plain Chroma storing the strings that gte-rag makes, made beforehand: what remains if nothing but them is
    stored in addition.

    Returns:
        The plain collection, the hybrid one, and what each system has spent.
    """
    assert encoder.documents.dense is not None
    cosine: Any = {"hnsw": {"space": "cosine"}}
    plain, opaque = (
        client_at(folder / name).create_collection(name, embedding_function=None, configuration=cosine)
        for name in ("plain", "opaque")
    )
    hybrid = HybridCollection(client_at(folder / "hybrid"), "hybrid", encoder=cast(Any, encoder))
    spent = {name: Spent() for name in SYSTEMS}
    for number, start in enumerate(range(0, len(ids), BATCH)):
        part = slice(start, start + BATCH)
        metadatas: Any = [{"n": number} for number in range(start, min(start + BATCH, len(ids)))]
        encoding = encoder.encode_documents(texts[part])
        assert encoding.sparse is not None
        sealed = seal(encoding.sparse, texts[part], encoder.fingerprint)
        longer: Any = [{**metadata, RESERVED_KEY: value} for metadata, value in zip(metadatas, sealed, strict=True)]
        records: dict[str, Any] = {"ids": ids[part], "documents": texts[part], "embeddings": encoding.dense}
        calls: dict[str, Callable[[], object]] = {
            "plain": partial(plain.upsert, **records, metadatas=metadatas),
            "opaque": partial(opaque.upsert, **records, metadatas=longer),
            "hybrid": partial(hybrid.upsert, ids[part], texts[part], metadatas=metadatas),
        }
        for turn in range(len(SYSTEMS)):
            name = SYSTEMS[(number + turn) % len(SYSTEMS)]
            began, began_cpu = time.perf_counter(), time.process_time()
            calls[name]()
            spent[name].wall.append(time.perf_counter() - began)
            spent[name].cpu.append(time.process_time() - began_cpu)
    return plain, hybrid, spent


def measure(size: int, queries: int, base: Path) -> dict[str, Any]:
    """Return all figures for one collection size."""
    texts = [body(number) for number in range(size)]
    questions = [f"query {number}" for number in range(queries)]
    encoder = Precomputed(texts, questions)
    assert encoder.documents.sparse is not None
    assert encoder.queries.dense is not None
    ids = [f"r{number}" for number in range(size)]
    result: dict[str, Any] = {"records": size}

    time_indexing(base / f"warm-up-{size}", encoder, ids[:BATCH], texts[:BATCH])
    runs = []
    for repeat in range(max(1, SMALL // size)):
        folder = base / f"{size}-{repeat}"
        plain, hybrid, run = time_indexing(folder, encoder, ids, texts)
        runs.append(run)
    spent = {name: sum(sum(run[name].wall) for run in runs) for name in SYSTEMS}
    cpu = {name: sum(sum(run[name].cpu) for run in runs) for name in SYSTEMS}
    result["index"] = {
        "runs": len(runs),
        "plain_records_per_s": round(size * len(runs) / spent["plain"]),
        "hybrid_records_per_s": round(size * len(runs) / spent["hybrid"]),
        "hybrid_over_plain_time": round(spent["hybrid"] / spent["plain"], 3),
        "opaque_over_plain_time": round(spent["opaque"] / spent["plain"], 3),
        "hybrid_over_plain_cpu_time": round(cpu["hybrid"] / cpu["plain"], 3),
        "opaque_over_plain_cpu_time": round(cpu["opaque"] / cpu["plain"], 3),
        **{f"last_over_first_batch_time_{name}": round(run[name].wall[-1] / run[name].wall[0], 2) for name in SYSTEMS},
    }

    began = time.perf_counter()
    lexical = hybrid.lexical_index()
    result["lexical_build_s"] = round(time.perf_counter() - began, 3)
    plain_folder, hybrid_folder = folder / "plain", folder / "hybrid"
    result["weights_per_record"] = round(encoder.documents.sparse.indices.size / size, 1)
    result["disk"] = {
        "plain_bytes_per_record": round(disk_bytes(plain_folder) / size),
        "opaque_bytes_per_record": round(disk_bytes(folder / "opaque") / size),
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
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": versions(),
        "vectors": f"synthetic: 256 dense dimensions, 100 of {VOCAB_SIZE:,} tokens on average (Zipf), 12 in queries",
        "sizes": [],
    }
    if options.out and options.out.exists():  # keep the other sizes if all else was the same
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        if all(earlier.get(key) == result[key] for key in ("machine", "versions", "vectors")):
            result["sizes"] = [entry for entry in earlier["sizes"] if entry["records"] not in options.sizes]
    base = Path(tempfile.mkdtemp())
    try:
        for size in options.sizes:
            print(f"{size:,} records …", file=sys.stderr)
            command = " ".join(["python", *sys.argv])
            result["sizes"].append({"command": command, **measure(size, options.queries, base)})
            print(json.dumps(result["sizes"][-1], indent=2), flush=True)
    finally:
        shutil.rmtree(base)
    result["sizes"].sort(key=lambda entry: entry["records"])
    first, last = result["sizes"][0]["index"], result["sizes"][-1]["index"]
    kept = {name: last[f"{name}_records_per_s"] / first[f"{name}_records_per_s"] for name in ("plain", "hybrid")}
    result["throughput_of_largest_over_smallest"] = {name: round(ratio, 3) for name, ratio in kept.items()}
    result["hybrid_keeps_of_plains_ratio"] = round(kept["hybrid"] / kept["plain"], 3)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
