"""Texts in Parquet, JSONL and text files: which rows there are, how they are cut into parts, and what is wrong with a row.

A part is a range of rows of one file, small enough to be encoded at a stretch. `scan` cuts a file into parts, which stay as
they are however often a run is interrupted; `read_part` reads one and sets aside the rows that cannot be used, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_rag.errors import missing_extra
from gte_rag.tokenization import check_unicode

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise missing_extra("pyarrow", "ray") from error

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
"""Suffixes of the files that are read, and what is in them."""

METADATA_COLUMN = "metadata"
"""Column with the further fields of a JSONL row, as one JSON object."""

# A part of long texts ends here, whatever its number of rows.
_PART_BYTES = 64 * 2**20
# Rows of a Parquet file that are decoded together.
_BATCH = 1024
_WHOLE_64 = 2**63


class DamagedFileError(ValueError):
    """A file, or a range of its rows, cannot be read because of what is in it."""


@dataclass(frozen=True)
class Columns:
    """Where a row's id and text are, and which other columns are kept.

    Attributes:
        id: Column or field of the id.
        text: Column or field of the text.
        kept: Names of the other columns that are kept; None keeps all.
    """

    id: str = "id"
    text: str = "text"
    kept: tuple[str, ...] | None = None

    def keeps(self, name: str) -> bool:
        """Whether a column of this name is kept beside id and text."""
        return name not in (self.id, self.text) and (self.kept is None or name in self.kept)


@dataclass(frozen=True)
class SourceFile:
    """A file that texts are read from.

    Attributes:
        path: Absolute path.
        name: Path below the folder that was given, or the file's name: the beginning of the ids of a text file.
        kind: ``"parquet"``, ``"jsonl"`` or ``"text"``.
        size: Bytes.
        modified: Nanoseconds since the epoch.
    """

    path: str
    name: str
    kind: str
    size: int
    modified: int


@dataclass(frozen=True)
class Part:
    """A range of rows of one file.

    Attributes:
        start: Its first row in a Parquet file, counted from 0; its first byte in another one.
        stop: The row or byte after its last one.
        first: Number of its first row or line as people count, from 1.
        rows: How many rows it has, without blank lines.
    """

    start: int
    stop: int
    first: int
    rows: int


@dataclass(frozen=True)
class Rejected:
    """A row, or a whole file, that is set aside.

    Attributes:
        file: Path of the file.
        row: Number of the row or line, from 1; None stands for the whole file.
        id: The row's id if it has a usable one.
        reason: What is wrong with it.
    """

    file: str
    row: int | None
    id: str | None
    reason: str


@dataclass(frozen=True)
class Rows:
    """The usable rows of a part.

    Attributes:
        file: Path of the file.
        numbers: Numbers of the rows or lines, from 1.
        ids: Their ids.
        texts: Their texts.
        columns: The other columns that are kept, each as long as `ids`.
        rejected: The rows that are not usable.
    """

    file: str
    numbers: list[int]
    ids: list[str]
    texts: list[str]
    columns: dict[str, pa.Array]
    rejected: list[Rejected] = field(default_factory=list)

    def without(self, reasons: Mapping[int, str]) -> Rows:
        """Return the rows with some of them, given by position, set aside for these reasons."""
        if not reasons:
            return self
        positions = [position for position in range(len(self.ids)) if position not in reasons]
        refused = [
            Rejected(self.file, self.numbers[position], self.ids[position], reason)
            for position, reason in reasons.items()
        ]
        return Rows(
            self.file,
            [self.numbers[position] for position in positions],
            [self.ids[position] for position in positions],
            [self.texts[position] for position in positions],
            _take(self.columns, positions),
            sorted([*self.rejected, *refused], key=lambda row: row.row or 0),
        )


@dataclass(frozen=True, eq=False)
class Scan:
    """What `scan` found in a file.

    Attributes:
        parts: Its parts, in order; together they hold every row once.
        digests: 128 bits of each usable id, uint64, shape (n, 2); empty for a text file, whose ids cannot repeat.
        numbers: The row or line of each of these ids, from 1, int64, shape (n,).
    """

    parts: list[Part]
    digests: NDArray[np.uint64]
    numbers: NDArray[np.int64]


def select_sources(paths: Iterable[str | os.PathLike[str]]) -> list[SourceFile]:
    """Find the files with texts among files and in folders, which are searched with all their folders, sorted by name.

    Files and folders whose names begin with ``.`` or ``_`` are passed over, as Parquet's own tools do, and so are files of
    other kinds in a folder.

    Args:
        paths: Files and folders. A file is read once, however often it is named.

    Raises:
        TypeError: `paths` is a single path.
        FileNotFoundError: A path does not exist.
        ValueError: A named file is of another kind, there is no file, a name is no valid Unicode, or two text files would give
            the same ids.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(f"paths is the single path {os.fspath(paths)!r}; give a list of files and folders")
    found: dict[str, SourceFile] = {}
    kinds = ", ".join(KINDS)
    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{os.fspath(path)!r} does not exist; give files and folders that do")
        for file in _below(path) if path.is_dir() else [path]:
            kind = KINDS.get(file.suffix.lower())
            if kind is None:
                if file == path:
                    raise ValueError(f"{os.fspath(file)!r} is of no kind that is read: {kinds}")
                continue
            check_unicode(str(file), f"the file name {os.fspath(file)!r}")
            resolved = str(file.resolve())
            name = file.relative_to(path).as_posix() if file != path else file.name
            status = file.stat()
            found.setdefault(resolved, SourceFile(resolved, name, kind, status.st_size, status.st_mtime_ns))
    if not found:
        raise ValueError(f"there are no files of the kinds {kinds} in {', '.join(map(str, given)) or 'an empty list'}")
    named: dict[str, str] = {}
    for source in found.values():
        other = named.setdefault(source.name, source.path) if source.kind == "text" else source.path
        if other != source.path:
            raise ValueError(
                f"{other!r} and {source.path!r} would give the same ids ({source.name}:1, …): an id is the path below the "
                "folder that was given and the line. Give a folder that holds both"
            )
    return list(found.values())


def kept_schema(sources: Iterable[SourceFile], columns: Columns) -> tuple[pa.Schema, list[Rejected]]:
    """Return the one schema of the kept columns of all files, and the files that cannot be read.

    Raises:
        ValueError: Two files have a column of one name and of different types.
    """
    schema = pa.schema([])
    rejected = []
    for source in sources:
        own = pa.schema([])
        if source.kind == "jsonl":
            own = pa.schema([(METADATA_COLUMN, pa.string())])
        elif source.kind == "parquet":
            try:
                whole = pq.read_schema(source.path)
            except (OSError, pa.ArrowException) as error:
                rejected.append(Rejected(source.path, None, None, f"cannot be read as Parquet: {_line(error)}"))
                continue
            lacking = [name for name in (columns.id, columns.text) if whole.get_field_index(name) < 0]
            if lacking:
                reason = f"has no column {lacking[0]!r}, or several; its columns: {', '.join(whole.names)}"
                rejected.append(Rejected(source.path, None, None, reason))
                continue
            own = pa.schema([part.remove_metadata() for part in whole if columns.keeps(part.name)])
        try:
            schema = pa.unify_schemas([schema, own])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{source.path!r} and the files before it disagree about a column ({_line(error)}); convert one of them, or "
                "choose the columns that are kept without it"
            ) from error
    return schema, rejected


def scan(source: SourceFile, columns: Columns, rows_per_part: int) -> Scan:
    """Cut a file into parts and take a digest of every id.

    Args:
        source: The file.
        columns: Where ids are.
        rows_per_part: The largest number of rows of a part.

    Raises:
        DamagedFileError: It is no such file.
        OSError: The file cannot be read.
    """
    digests: list[bytes] = []
    numbers: list[int] = []

    def note(number: int, value: object) -> None:
        row_id, _ = _check_id(value)
        if row_id is not None:
            digests.append(hashlib.blake2b(row_id.encode("utf-8"), digest_size=16).digest())
            numbers.append(number)

    if source.kind == "parquet":
        with _parquet(source) as file:
            total = file.metadata.num_rows
            number = 0
            for batch in file.iter_batches(_BATCH, columns=[columns.id]):
                for value in _values(batch.column(0)):
                    number += 1
                    note(number, value)
        parts = [
            Part(start, min(start + rows_per_part, total), start + 1, min(rows_per_part, total - start))
            for start in range(0, total, rows_per_part)
        ]
    else:
        parts = []
        start, stop, first, rows = 0, 0, 1, 0
        for number, (stop, line) in enumerate(_lines_of(source.path), start=1):
            if line.strip():
                rows += 1
                if source.kind == "jsonl":
                    value, _ = _parse(line)
                    note(number, None if value is None else value.get(columns.id))
            if rows and (rows == rows_per_part or stop - start >= _PART_BYTES):
                parts.append(Part(start, stop, first, rows))
                start, first, rows = stop, number + 1, 0
        if rows:
            parts.append(Part(start, stop, first, rows))
    table = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return Scan(parts, table, np.array(numbers, dtype=np.int64))


def repeated_ids(scans: Sequence[Scan]) -> Iterator[tuple[int, int, int, int]]:
    """Find ids that occur more than once; the first row of an id, in the order of files and rows, is the one that counts.

    Args:
        scans: The scan of each file.

    Yields:
        File and row of a repetition, file and row of the first occurrence, in the order of the repetitions.
    """
    digests = np.concatenate([np.empty((0, 2), np.uint64), *(found.digests for found in scans)])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ids stay in the order of the rows
    ordered = digests[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    leaders = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    repeats = np.flatnonzero(~fresh)
    ends = np.cumsum([len(found.digests) for found in scans])
    starts = ends - [len(found.digests) for found in scans]
    for place in repeats[np.argsort(order[repeats])]:
        where = []
        for position in (int(order[place]), int(leaders[place])):
            file = int(np.searchsorted(ends, position, side="right"))
            where += [file, int(scans[file].numbers[position - starts[file]])]
        yield where[0], where[1], where[2], where[3]


def read_part(source: SourceFile, part: Part, columns: Columns, schema: pa.Schema) -> Rows:
    """Read the rows of a part; those that cannot be used are among the rejected ones.

    Args:
        source: The file.
        part: The part.
        columns: Where ids and texts are.
        schema: The columns that every part has; one that this file lacks is null.

    Raises:
        DamagedFileError: None of the rows can be read.
        OSError: The file cannot be read, or is not the one that was scanned.
    """
    status = os.stat(source.path)
    if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
        raise OSError(f"{source.path!r} has changed since the run was planned; give a new folder for a new run")
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl, "text": _read_text}[source.kind]
    return read(source, part, columns, schema)


def metadata_rows(rows: Rows) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the kept columns of each row as a mapping, nulls left out, and what is wrong with it (mostly nothing).

    The further fields of a JSONL row, and those of every column that holds such objects, are the mapping's own fields.
    """
    for position in range(len(rows.ids)):
        metadata: dict[str, Any] = {}
        reason = ""
        for name, column in rows.columns.items():
            try:
                value = column[position].as_py()
            except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a date beyond Python's
                reason = f"its column {name!r} cannot be read: {_line(error)}"
                break
            if value is None:
                continue
            if name == METADATA_COLUMN and isinstance(value, str):
                fields, reason = _parse(value.encode("utf-8"))
                metadata |= {key: entry for key, entry in (fields or {}).items() if entry is not None}
                reason = f"its column {name!r} {reason}" if reason else ""
            else:
                metadata[name] = value
        yield metadata, reason


def _read_parquet(source: SourceFile, part: Part, columns: Columns, schema: pa.Schema) -> Rows:
    with _parquet(source) as file:
        groups, start = [], 0
        begin: int | None = None
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if start < part.stop and stop > part.start:
                groups.append(group)
                begin = start if begin is None else begin
            start = stop
        own = set(file.schema_arrow.names)
        names = [columns.id, columns.text, *(name for name in schema.names if name in own)]
        batches, at = [], begin or 0
        for batch in file.iter_batches(_BATCH, row_groups=groups, columns=names):
            first, last = max(part.start - at, 0), min(part.stop - at, len(batch))
            if first < last:
                batches.append(batch.slice(first, last - first))
            at += len(batch)
            if at >= part.stop:
                break
    table = pa.Table.from_batches(batches)
    kept = {
        entry.name: table.column(entry.name).cast(entry.type) if entry.name in own else pa.nulls(len(table), entry.type)
        for entry in schema
    }
    given = zip(_values(table.column(columns.id)), _values(table.column(columns.text)), strict=True)
    numbers = range(part.first, part.first + len(table))
    return _checked(source, zip(numbers, given, strict=True), lambda positions: _take(kept, positions))


def _read_jsonl(source: SourceFile, part: Part, columns: Columns, schema: pa.Schema) -> Rows:
    rows: list[tuple[int, tuple[object, object]]] = []
    rest: list[str] = []
    rejected = []
    for number, line in _lines_of_part(source, part):
        value, reason = _parse(line)
        if value is None:
            rejected.append(Rejected(source.path, number, None, reason))
            continue
        rows.append((number, (value.get(columns.id), value.get(columns.text))))
        rest.append(_json({key: entry for key, entry in value.items() if columns.keeps(key)}))

    def kept(positions: list[int]) -> dict[str, pa.Array]:
        own = {METADATA_COLUMN: pa.array([rest[position] for position in positions], pa.string())}
        return {entry.name: own.get(entry.name, pa.nulls(len(positions), entry.type)) for entry in schema}

    return _checked(source, rows, kept, rejected)


def _read_text(source: SourceFile, part: Part, columns: Columns, schema: pa.Schema) -> Rows:
    rows: list[tuple[int, tuple[object, object]]] = []
    rejected = []
    for number, line in _lines_of_part(source, part):
        row_id = f"{source.name}:{number}"
        try:
            rows.append((number, (row_id, line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            rejected.append(Rejected(source.path, number, row_id, _not_utf8(line, error)))
    return _checked(
        source,
        rows,
        lambda positions: {entry.name: pa.nulls(len(positions), entry.type) for entry in schema},
        rejected,
    )


def _checked(
    source: SourceFile,
    rows: Iterable[tuple[int, tuple[object, object]]],
    kept: Callable[[list[int]], dict[str, pa.Array]],
    rejected: Sequence[Rejected] = (),
) -> Rows:
    numbers, ids, texts, positions, refused = [], [], [], [], list(rejected)
    for position, (number, (given_id, given_text)) in enumerate(rows):
        row_id, reason = _check_id(given_id)
        reason = reason or _check_text(given_text)
        if reason:
            refused.append(Rejected(source.path, number, row_id, reason))
            continue
        assert row_id is not None
        assert isinstance(given_text, str)
        numbers.append(number)
        ids.append(row_id)
        texts.append(given_text)
        positions.append(position)
    return Rows(source.path, numbers, ids, texts, kept(positions), sorted(refused, key=lambda row: row.row or 0))


@contextmanager
def _parquet(source: SourceFile) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(source.path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # the system's; damaged pages are OSErrors without one
            raise
        raise DamagedFileError(f"cannot be read as Parquet: {_line(error)}") from error


def _take(columns: Mapping[str, pa.Array], positions: list[int]) -> dict[str, pa.Array]:
    chosen = pa.array(positions, pa.int64())
    return {name: column.take(chosen) for name, column in columns.items()}


def _check_id(value: object) -> tuple[str | None, str]:
    """Return a usable id as a string, or None and the reason."""
    if isinstance(value, int) and not isinstance(value, bool) and -_WHOLE_64 <= value < 2 * _WHOLE_64:
        return str(value), ""
    if value is None:
        return None, "it has no id"
    if not isinstance(value, str):
        return None, f"its id is {_kind(value)}, not a string or a whole number of 64 bits"
    if not value:
        return None, "its id is empty"
    reason = _check_characters(value, "its id")
    return (None if reason else value), reason


def _check_text(value: object) -> str:
    if value is None:
        return "it has no text"
    if not isinstance(value, str):
        return f"its text is {_kind(value)}, not a string"
    return _check_characters(value, "its text")


def _check_characters(value: str, where: str) -> str:
    try:
        check_unicode(value, where)
    except ValueError as error:
        return str(error)
    return ""


def _kind(value: object) -> str:
    if isinstance(value, _Undecodable):
        return value.reason
    return f"of type {type(value).__name__}"


class _Undecodable:
    """Stands for a Parquet string that is no UTF-8."""

    def __init__(self, error: UnicodeDecodeError) -> None:
        self.reason = f"no UTF-8 ({_line(error)})"


def _values(column: pa.Array | pa.ChunkedArray) -> list[object]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        value: object = scalar.as_py()
    except UnicodeDecodeError as error:
        return _Undecodable(error)
    return value


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON object in a line, or None and the reason."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return None, _not_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON ({_line(error)})"
    if not isinstance(value, dict):
        return None, f"is a JSON {type(value).__name__}, not an object"
    return value, ""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start})"


def _json(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)  # a lone surrogate stays an escape
    return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _below(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        yield from (Path(here, name) for name in sorted(names) if name[0] not in "._")


def _lines_of(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield each line without its end, and the byte after it."""
    stop = 0
    with open(path, "rb") as file:
        for line in file:
            yield stop + len(line), _bare(line, stop)
            stop += len(line)


def _lines_of_part(source: SourceFile, part: Part) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the lines of a part that are not blank."""
    with open(source.path, "rb") as file:
        file.seek(part.start)
        at, number = part.start, part.first
        while at < part.stop:
            line = file.readline()
            if not line:
                raise OSError(f"{source.path!r} ends before byte {part.stop}; it has changed since the run was planned")
            bare = _bare(line, at)
            if bare.strip():
                yield number, bare
            at += len(line)
            number += 1


def _bare(line: bytes, start: int) -> bytes:
    return (line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line).rstrip(b"\r\n")
