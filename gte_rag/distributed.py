"""Bulk encoding on Ray Data: files in, Parquet or a vector store out, on one machine or many.

The input is cut into parts once, and the cut is written down before anything is encoded (`_gte_rag/plan.json`). Ray Data hands
the parts to a pool of workers, each with one model; a worker reads its part itself, encodes it, writes it and then leaves a
mark (`_gte_rag/done`). A part with a mark is never touched again, and one without is done anew and replaces what it left
behind, so that a run may be killed anywhere, in a worker or as a whole, and what comes out holds every id once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from gte_rag.cluster import Cluster
from gte_rag.corpus import (
    Columns,
    DamagedFileError,
    Part,
    Rejected,
    Rows,
    Scan,
    SourceFile,
    kept_schema,
    read_part,
    repeated_ids,
    scan,
    select_sources,
)
from gte_rag.encoder import GTEEncoder
from gte_rag.errors import BulkError, missing_extra
from gte_rag.sinks import (
    ChromaSink,
    MilvusSink,
    ParquetSink,
    QdrantSink,
    Sink,
    Writer,
    output_collisions,
    part_file,
    replace_file,
)

__all__ = ["BulkReport", "ChromaSink", "MilvusSink", "ParquetSink", "QdrantSink", "Sink", "encode_files"]

ROWS_PER_PART = 4096
"""Rows encoded at a stretch unless the caller says otherwise: what a killed worker loses at most."""

ERRORS_FILE = "_errors.jsonl"
"""Rows that were set aside; Parquet readers pass over names that begin with ``_``."""

_STATE = "_gte_rag"
_FORMAT = 1
# How many workers a part may take along: a text that kills its worker would otherwise do so for ever.
_ATTEMPTS = 3

Progress = Callable[[int, int], None]
"""Called with the rows done so far, those of earlier runs included, and all rows."""


@dataclass(frozen=True)
class BulkReport:
    """What a run has done.

    Attributes:
        rows: Rows of the input, without blank lines.
        written: Rows that are in the output, those of earlier runs included.
        set_aside: Rows, and files that cannot be read, listed in `errors_file`.
        truncated: Texts that were longer than `max_length` and were cut.
        parts: Parts of the input.
        earlier: Parts that earlier runs had finished.
        abandoned: Parts that killed their worker every time; their rows are neither in the output nor set aside.
        seconds: Duration of this run.
        errors_file: One JSON object a line: file, row, id, reason.
    """

    rows: int
    written: int
    set_aside: int
    truncated: int
    parts: int
    earlier: int
    abandoned: int
    seconds: float
    errors_file: str


def encode_files(
    paths: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    to: Sink | None = None,
    model: str | os.PathLike[str] = "gte-mini",
    precision: str = "auto",
    dimension: int | None = None,
    max_length: int = 8192,
    id_column: str = "id",
    text_column: str = "text",
    columns: Sequence[str] | None = None,
    rows_per_part: int = ROWS_PER_PART,
    workers: int | None = None,
    cpus_per_worker: int | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    on_progress: Progress | None = None,
) -> BulkReport:
    """Encode the texts of many files on Ray, one model per worker, and write Parquet or fill a vector store.

    Call it again, with the same arguments, after an interruption of any kind: finished parts are not encoded again. Every id is
    in the output once; of rows with the same id the first counts, in the order of files and rows, and the others are set
    aside, also when the first one turns out to be unusable. Rows that cannot be used are set aside with the reason and hold up
    nothing. On several machines all paths, and the model if it is a folder, must be the same on all of them.

    Args:
        paths: Parquet files (``.parquet``), JSONL files (``.jsonl``, ``.ndjson``: one object a line), text files (``.txt``: one
            text a line, whose id is the file's path and the number of the line), and folders with such files.
        folder: The output folder; also with `to`, because plan, marks and errors are kept there.
        to: A `QdrantSink`, `MilvusSink` or `ChromaSink`; None writes Parquet into `folder` (see `ParquetSink`).
        model: As for `GTEEncoder.from_pretrained`.
        precision: Likewise.
        dimension: Likewise.
        max_length: Likewise.
        id_column: Column or field with the ids: strings or whole numbers.
        text_column: Column or field with the texts.
        columns: Other columns or fields to keep; None keeps all.
        rows_per_part: Rows that are encoded at a stretch.
        workers: How many; None is as many as the cluster has room for.
        cpus_per_worker: Cores and threads of each; None is one with a GPU, else up to eight.
        gpus_per_worker: GPUs of each, parts of one allowed; None is one if the cluster has any.
        address: A Ray cluster, as for `ray.init`; None takes the environment's (``RAY_ADDRESS``) or starts Ray on this machine,
            on the loopback interface, without dashboard and usage statistics, and stops it at the end. A Ray that is connected
            already is used as it is.
        on_progress: Called after every part.

    Raises:
        BulkError: The run stopped, for example because the store went away; called again, it goes on. Or `folder` belongs to
            another run, or another run is at work there.
        CheckpointError: There is no such model.
        CollectionMismatchError: The store's collection was made by another model.
        FileNotFoundError: A path does not exist.
        MissingExtraError: A package is missing.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the files' columns do not fit together.
    """
    started = time.monotonic()
    for name, number, least in (
        ("rows_per_part", rows_per_part, 1),
        ("workers", workers, 1),
        ("cpus_per_worker", cpus_per_worker, 1),
    ):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"{name} is {number!r}; give a whole number")
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}; it must be at least {least}")
    if gpus_per_worker is not None and not 0 <= gpus_per_worker < float("inf"):
        raise ValueError(f"gpus_per_worker is {gpus_per_worker}; it must be a number of at least 0")
    if to is not None and not isinstance(to, Sink):
        raise TypeError(f"to is {type(to).__name__}; give a QdrantSink, a MilvusSink, a ChromaSink or None")
    if isinstance(columns, str):
        raise TypeError(f"columns is the string {columns!r}; give a list of names")
    if id_column == text_column:
        raise ValueError(f"id_column and text_column are both {id_column!r}; ids and texts are in columns of their own")
    chosen = Columns(id_column, text_column, None if columns is None else tuple(sorted(columns)))
    sources = select_sources(paths)
    target = Path(folder).absolute()
    sink = to or ParquetSink(str(target))
    model = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    options = {"precision": precision, "dimension": dimension, "max_length": max_length}
    encoder = GTEEncoder.from_pretrained(model, device="cpu", **options)  # type: ignore[arg-type]
    schema, unreadable = kept_schema(sources, chosen)
    taken = output_collisions(schema.names)
    if taken:
        raise ValueError(
            f"the input has a column {taken[0]!r}, which the output uses itself; rename it, or choose the others with columns"
        )
    unusable = {entry.file for entry in unreadable}
    wanted = {
        "format": _FORMAT,
        "model": encoder.fingerprint,
        "precision": encoder.precision,
        "dimension": encoder.dimension,
        "max_length": encoder.max_length,
        "id_column": id_column,
        "text_column": text_column,
        "columns": None if columns is None else sorted(columns),
        "rows_per_part": rows_per_part,
        "to": sink.describe(),
        "files": [asdict(source) for source in sources],
    }
    with _locked(target) as state, Cluster(address, workers, cpus_per_worker, gpus_per_worker) as cluster:
        readable = [source for source in sources if source.path not in unusable]
        plan = _plan(state, wanted, readable, chosen, cluster)
        marks = _marks(target, plan.tasks, sink)
        earlier = len(marks)
        waiting = [task for task in plan.tasks if task.number not in marks]
        if waiting:
            try:
                sink.prepare(encoder)
            except sink.faults() as error:
                raise BulkError(f"the store cannot be prepared: {_line(error)}") from error
        job = _Job(str(target), sink, schema, chosen, model, options, encoder.fingerprint)
        del encoder
        _run(job, waiting, plan.tasks, cluster, on_progress)
        marks = _marks(target, plan.tasks, sink)
        files = [*unreadable, *plan.damaged]
        replace_file(target / ERRORS_FILE, lambda draft: _collect_errors(draft, files, state, marks))
    return BulkReport(
        rows=sum(task.part.rows for task in plan.tasks),
        written=sum(mark["written"] for mark in marks.values()),
        set_aside=sum(mark["set_aside"] for mark in marks.values()) + len(files),
        truncated=sum(mark["truncated"] for mark in marks.values()),
        parts=len(plan.tasks),
        earlier=earlier,
        abandoned=len(plan.tasks) - len(marks),
        seconds=time.monotonic() - started,
        errors_file=str(target / ERRORS_FILE),
    )


def _run(
    job: _Job, waiting: Sequence[_Task], tasks: Sequence[_Task], cluster: Cluster, on_progress: Progress | None
) -> None:
    """Let the workers encode the parts that wait."""
    begun = Path(job.folder) / _STATE / "begun"
    for leftover in begun.glob("*"):
        leftover.unlink()
    total = sum(task.part.rows for task in tasks)
    done = total - sum(task.part.rows for task in waiting)
    items = [
        {
            "number": task.number,
            "source": asdict(task.source),
            "part": asdict(task.part),
            "repeats": list(task.repeats.items()),
        }
        for task in waiting
    ]
    for result in cluster.pool(_Worker, (job,), items):
        if result.get("failure"):
            raise BulkError(f"stopped: {result['failure']}. Called again, it goes on")
        done += result["rows"]
        if on_progress is not None:
            on_progress(done, total)


# --- the folder --------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Make the output folder and hold it; yield its folder of plan and marks."""
    try:
        from filelock import FileLock, Timeout  # a dependency of Ray
    except ImportError as error:
        raise missing_extra("ray[data]", "ray") from error
    state = folder / _STATE
    if folder.is_dir() and not state.is_dir() and any(folder.iterdir()):
        raise BulkError(f"{folder} holds other files; give a new or empty folder, or that of an earlier run")
    for name in ("begun", "done", "errors"):
        (state / name).mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BulkError(f"another run is at work in {folder}; wait for it, or give another folder") from None
    try:
        yield state
    finally:
        lock.release()


def _marks(folder: Path, tasks: Sequence[_Task], sink: Sink) -> dict[int, dict[str, Any]]:
    """Return the marks of the finished parts; a part whose Parquet file is gone or cut is not finished."""
    marks = {}
    for task in tasks:
        path = folder / _STATE / "done" / f"{task.number:05d}.json"
        if not path.exists():
            continue
        mark = json.loads(path.read_text(encoding="utf-8"))
        part = part_file(folder, task.number)
        size = part.stat().st_size if part.exists() else 0
        if isinstance(sink, ParquetSink) and size != mark["bytes"]:
            continue
        marks[task.number] = mark
    return marks


def _collect_errors(draft: Path, files: Sequence[Rejected], state: Path, marks: Mapping[int, Any]) -> None:
    with draft.open("wb") as file:
        for rejected in files:
            file.write(_error_line(rejected))
        for number in sorted(marks):
            part = state / "errors" / f"{number:05d}.jsonl"
            if marks[number]["set_aside"]:
                file.write(part.read_bytes())


def _error_line(rejected: Rejected) -> bytes:
    return json.dumps(asdict(rejected), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _replace_json(path: Path, value: object) -> None:
    replace_file(path, lambda draft: draft.write_text(json.dumps(value), encoding="utf-8"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- the plan ----------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """One part to encode, and which of its rows have an id that was there before, and where."""

    number: int
    source: SourceFile
    part: Part
    repeats: dict[int, str]


class _Plan(NamedTuple):
    tasks: list[_Task]
    damaged: list[Rejected]


def _plan(
    state: Path, wanted: Mapping[str, Any], sources: Sequence[SourceFile], columns: Columns, cluster: Cluster
) -> _Plan:
    """Read the plan of an earlier run, or scan the files and make one."""
    path = state / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        for key, value in json.loads(json.dumps(wanted)).items():
            if plan["wanted"].get(key) != value:
                raise BulkError(
                    f"{state.parent} holds a run {_difference(key, plan['wanted'].get(key), value)}. Call it as it was called "
                    "at first, or give a new folder"
                )
    else:
        plan = {"wanted": wanted, **_cut(state / "scan", sources, columns, wanted["rows_per_part"], cluster)}
        _replace_json(path, plan)
    for leftover in (state / "scan").glob("*"):
        leftover.unlink()
    tasks = [
        _Task(number, sources[file], Part(*part), dict(plan["repeats"].get(str(number), [])))
        for number, (file, *part) in enumerate(plan["parts"])
    ]
    return _Plan(tasks, [Rejected(sources[file].path, None, None, reason) for file, reason in plan["damaged"]])


def _cut(
    folder: Path, sources: Sequence[SourceFile], columns: Columns, rows_per_part: int, cluster: Cluster
) -> dict[str, Any]:
    """Scan every file, on the cluster, and number the parts; what an interrupted run has scanned is kept."""
    folder.mkdir(exist_ok=True)
    drafts = [folder / f"{_digest([asdict(source), asdict(columns), rows_per_part])}.npz" for source in sources]
    waiting = [
        {"source": asdict(source), "columns": asdict(columns), "rows": rows_per_part, "to": str(draft)}
        for source, draft in zip(sources, drafts, strict=True)
        if not draft.exists()
    ]
    for failure in cluster.map(_scan, waiting):
        if failure:
            raise BulkError(f"stopped while reading the input: {failure}. Called again, it goes on")
    scans, damaged = [], []
    for file, draft in enumerate(drafts):
        with np.load(draft, allow_pickle=False) as found:
            parts = [Part(*row) for row in found["parts"].tolist()]
            scans.append(Scan(parts, found["digests"], found["numbers"]))
            if found["damage"].size:
                damaged.append([file, found["damage"].tobytes().decode("utf-8")])
    numbers: dict[tuple[int, int], int] = {}
    for file, found_scan in enumerate(scans):
        for part in found_scan.parts:
            numbers[file, part.first] = len(numbers)
    firsts = [np.array([part.first for part in found_scan.parts], dtype=np.int64) for found_scan in scans]
    repeats: dict[str, list[tuple[int, str]]] = {}
    for file, row, first_file, first_row in repeated_ids(scans):
        first = int(firsts[file][np.searchsorted(firsts[file], row, side="right") - 1])
        where = f"{sources[first_file].path}:{first_row}"
        repeats.setdefault(str(numbers[file, first]), []).append((row, where))
    return {
        "parts": [
            [file, part.start, part.stop, part.first, part.rows]
            for file, found_scan in enumerate(scans)
            for part in found_scan.parts
        ],
        "repeats": repeats,
        "damaged": damaged,
    }


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    """Scan one file, in a worker, into a file of arrays."""
    item = json.loads(row["item"])
    columns = item["columns"]
    damage = ""
    try:
        try:
            found = scan(SourceFile(**item["source"]), _columns(columns), item["rows"])
        except DamagedFileError as error:
            found, damage = Scan([], np.empty((0, 2), np.uint64), np.empty(0, np.int64)), str(error)
        parts = np.array([[part.start, part.stop, part.first, part.rows] for part in found.parts], dtype=np.int64)
        arrays = {
            "parts": parts.reshape(-1, 4),
            "digests": found.digests,
            "numbers": found.numbers,
            "damage": np.frombuffer(damage.encode("utf-8"), dtype=np.uint8),
        }

        def write(draft: Path) -> None:
            with draft.open("wb") as file:  # given a path, NumPy would add a suffix
                np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes every name for its own option

        replace_file(Path(item["to"]), write)
    except OSError as error:
        return {"result": json.dumps(str(error))}
    return {"result": json.dumps(None)}


def _columns(value: Mapping[str, Any]) -> Columns:
    return Columns(value["id"], value["text"], None if value["kept"] is None else tuple(value["kept"]))


def _difference(key: str, before: object, now: object) -> str:
    if key != "files" or not isinstance(before, list) or not isinstance(now, list):
        return f"with {key} {before!r}, and this call has {now!r}"
    old, new = ({entry["path"]: entry for entry in files} for files in (before, now))
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    if not changed:
        return "that named the input in another order"
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"of other input: {changed[0]}{more} came, went or changed since"


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode("utf-8"), digest_size=12).hexdigest()


# --- the workers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a worker must know."""

    folder: str
    sink: Sink
    schema: pa.Schema
    columns: Columns
    model: str
    options: dict[str, Any]
    fingerprint: str


class _Worker:
    """One model in a process of its own; encodes a part at a time."""

    def __init__(self, cpus: int, gpus: float, job: _Job) -> None:
        self._cpus = cpus
        self._device = "cuda" if gpus else "cpu"  # Ray shows a worker the GPUs that are its own
        self._job = job
        self._state = Path(job.folder) / _STATE
        self._encoder: GTEEncoder | None = None
        self._writer: Writer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the part of ``row["item"]``, unless it has a mark or has killed too many workers."""
        item = json.loads(row["item"])
        task = _Task(item["number"], SourceFile(**item["source"]), Part(**item["part"]), dict(item["repeats"]))
        begun = self._state / "begun" / f"{task.number:05d}"
        attempts = begun.read_bytes().count(b"\n") if begun.exists() else 0
        result: dict[str, Any] = {"number": task.number, "rows": task.part.rows}
        if attempts < _ATTEMPTS:
            with begun.open("ab") as file:
                file.write(f"{os.getpid()}\n".encode())
            result["failure"] = self._encode(task)
        return {"result": json.dumps(result)}

    def _encode(self, task: _Task) -> str:
        """Encode and write a part and leave its mark; return why that cannot be done."""
        started = time.monotonic()
        faults = self._job.sink.faults()
        try:
            encoder, writer = self._opened()
        except faults + (ValueError,) as error:  # noqa: RUF005  # the type checker follows this form
            return f"a worker cannot begin: {_line(error)}"
        try:
            rows = read_part(task.source, task.part, self._job.columns, self._job.schema)
        except DamagedFileError as error:
            damage = f"this row and all others of its part, {task.part.rows} in all, cannot be used: the file {error}"
            rows = Rows(task.source.path, [], [], [], {}, [Rejected(task.source.path, task.part.first, None, damage)])
        except OSError as error:
            return str(error)
        firsts = {
            position: f"its id is that of {task.repeats[number]}, which comes first"
            for position, number in enumerate(rows.numbers)
            if number in task.repeats
        }
        rows = writer.check(rows.without(firsts))
        number = task.number
        try:
            if rows.ids:
                writer.write(number, rows)
            if rows.rejected:
                lines = b"".join(map(_error_line, rows.rejected))
                replace_file(self._state / "errors" / f"{number:05d}.jsonl", lambda draft: draft.write_bytes(lines))
            part = part_file(Path(self._job.folder), number)
            mark = {
                "written": len(rows.ids),
                "set_aside": task.part.rows - len(rows.ids),
                "truncated": _count_long(encoder, rows.texts),
                "bytes": part.stat().st_size if part.exists() else 0,
                "seconds": round(time.monotonic() - started, 3),
                "worker": os.getpid(),
            }
            _replace_json(self._state / "done" / f"{number:05d}.json", mark)
        except faults as error:
            return f"part {number} ({task.source.path}, row {task.part.first} on) cannot be written: {_line(error)}"
        return ""

    def _opened(self) -> tuple[GTEEncoder, Writer]:
        """Load the model and connect, at the first part."""
        if self._encoder is None or self._writer is None:
            os.environ["RAYON_NUM_THREADS"] = str(self._cpus)  # the tokenizer's threads
            torch.set_num_threads(self._cpus)
            encoder = GTEEncoder.from_pretrained(self._job.model, device=self._device, **self._job.options)
            if encoder.fingerprint != self._job.fingerprint:
                raise ValueError(
                    f"{self._job.model} is another model on this machine (fingerprint {encoder.fingerprint}) than where the "
                    f"run was started ({self._job.fingerprint}); copy it there"
                )
            self._writer = self._job.sink.open(encoder, self._job.schema)
            self._encoder = encoder
        return self._encoder, self._writer


def _count_long(encoder: GTEEncoder, texts: Sequence[str]) -> int:
    """Return how many texts are cut; a character has at most four tokens."""
    return sum(4 * len(text) + 2 > encoder.max_length < encoder.count_tokens(text) for text in texts)
