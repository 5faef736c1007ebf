"""The files in which a local Chroma keeps a collection's graph, and whether they can be whole.

Chroma 1.5 keeps texts, metadata and its log in SQLite, and the graph of the dense vectors (HNSW) in a folder of its own,
named by a segment id. It writes those files over in place. A process that is killed meanwhile can leave some of them too
short, and Chroma then refuses the graph, ends the process with a signal, or reads what is missing as zeros
(chroma-core/chroma#7678).

This file is also run as a program, by its path. What Chroma may crash on, and what only SQLite knows, is looked at in a
process of its own: two SQLite libraries in one process release each other's locks. So nothing of gte-rag is imported here.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import re
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

DATABASE_FILE = "chroma.sqlite3"
HEADER, VECTORS, LENGTHS, LINKS, IDS = FILES = (
    "header.bin",
    "data_level0.bin",
    "length.bin",
    "link_lists.bin",
    "index_metadata.pickle",
)
# hnswlib's header: version; offset of level 0, capacity, elements, bytes of an element, offsets of label and vector; highest
# level, entry point; most links above level 0 and on it, M; 1/ln(M); ef_construction.
_HEADER = struct.Struct("<iQQQQQQiIQQQdQ")
_VERSION = 1
_LABEL_BYTES = 8
# While another thread of this process has Chroma write, the files look torn; damage stays as it is.
_SETTLED_S, _LOOK_S, _PATIENCE_S = 1.0, 0.05, 30.0
# Logged vectors that are compared with what an encoder makes of their texts.
_SAMPLE = 16
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class LoggedRecord:
    """A record that Chroma's log still holds.

    Attributes:
        text: Its text.
        metadata: Its metadata.
        vector: Its dense vector as it was given, float32 in little-endian bytes.
    """

    text: str
    metadata: dict[str, Any]
    vector: bytes


@dataclass(frozen=True)
class Segment:
    """What SQLite says of a collection's graph.

    Attributes:
        folder: The folder of its files, which need not exist.
        persisted: Whether Chroma has recorded that the graph was written, so that its log holds only what came later.
        records: Number of records.
        texts: Number of records that have a text.
        dimension: Length of the dense vectors, None before the first one.
        logged: Some of the records that the log still holds, newest first.
    """

    folder: Path
    persisted: bool
    records: int
    texts: int
    dimension: int | None
    logged: tuple[LoggedRecord, ...] = ()

    def fault(self, *, thorough: bool = False) -> str | None:
        """Return what is wrong with the files, or None; see `fault` and `thorough_fault`."""
        if (self.folder / IDS).exists():
            return thorough_fault(self.folder) if thorough else fault(self.folder)
        # Without ids Chroma starts an empty graph and fills it from the log, which is complete until it records a write.
        return f"{IDS} is missing" if self.persisted else None


def fault(folder: Path) -> str | None:
    """Return what is wrong with the files of a graph, as far as their lengths and the header tell; None if nothing is.

    A few file sizes and 100 bytes are read, so this is no proof that the graph is whole.
    """
    try:
        header = _read_header(folder / HEADER)
    except FileNotFoundError:
        return f"{HEADER} is missing" if any((folder / name).exists() for name in FILES) else None
    except ValueError as error:
        return str(error)
    if not header.elements:
        return None
    expected = (
        (VECTORS, header.elements * header.element_bytes),
        (LENGTHS, header.elements * 4),
        (LINKS, header.elements * 4),
    )
    for name, least in expected:
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size < least:
            return f"{name} has {size:,} bytes; its {header.elements:,} elements need at least {least:,}"
    return _fault_of_ids(folder / IDS)


def thorough_fault(folder: Path) -> str | None:
    """Return what is wrong with a graph, after reading the links of all its elements; None if nothing is."""
    found = fault(folder)
    if found or not (folder / HEADER).exists():
        return found
    header = _read_header(folder / HEADER)
    return _fault_of_vectors(folder / VECTORS, header) or _fault_of_links(folder / LINKS, header)


def torn_folders(database: Path) -> list[Path]:
    """Return the folders of a database whose graphs look torn; some of them may be of no use to Chroma any more."""
    with os.scandir(database) as entries:
        folders = [Path(entry.path) for entry in entries if _UUID.fullmatch(entry.name) and entry.is_dir()]
    return [folder for folder in folders if fault(folder)]


def settled(folder: Path) -> bool:
    """Wait until the files of a torn graph have not changed for a second; return whether it is still torn then."""
    before, since, deadline = _state(folder), time.monotonic(), time.monotonic() + _PATIENCE_S
    while fault(folder):
        time.sleep(_LOOK_S)
        now = time.monotonic()
        if (state := _state(folder)) != before:
            before, since = state, now
        elif now - since >= _SETTLED_S:
            return True
        if now >= deadline:
            return False
    return False


def find_segment(database: Path, collection_id: str) -> Segment:
    """Ask SQLite, in a process of its own, for the graph of a collection.

    Args:
        database: Folder of the database.
        collection_id: Chroma's id of the collection.

    Raises:
        OSError: The database cannot be read, or its segment has no id that Chroma makes.
    """
    found = json.loads(_run("find", database, collection_id).stdout)
    folder = _segment_folder(database, found["id"])
    logged = (
        LoggedRecord(item["text"], item["metadata"], base64.b64decode(item["vector"])) for item in found.pop("logged")
    )
    return Segment(folder, found["persisted"], found["records"], found["texts"], found["dimension"], tuple(logged))


def forget_graph(database: Path, segment: Segment) -> None:
    """Let Chroma start an empty graph: take back, in SQLite, that the graph has been written.

    Raises:
        OSError: The database cannot be written.
    """
    _run("forget", database, segment.folder.name)


def probe(database: Path, collection_id: str, *, unit: bool, complete: bool, timeout_s: float) -> str | None:
    """Let Chroma read every dense vector of a collection, in a process that it may crash.

    Args:
        database: Folder of the database.
        collection_id: Chroma's id of the collection.
        unit: Whether all vectors must be of unit length.
        complete: Whether every record must have a vector.
        timeout_s: Seconds after which it counts as damaged.

    Returns:
        What is wrong, or None.

    Raises:
        OSError: The database cannot be opened for a reason that has nothing to do with the graph.
    """
    options = [*(["unit"] if unit else []), *(["complete"] if complete else [])]
    try:
        done = _run("probe", database, collection_id, *options, timeout_s=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"Chroma has not read it within {timeout_s:.0f} seconds"
    if done.returncode < 0 or done.returncode > 128:
        number = -done.returncode if done.returncode < 0 else done.returncode - 128
        return f"Chroma ends the process when it reads it (signal {number})"
    if done.returncode:
        raise OSError(f"{database} cannot be examined: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1]) or None


# --- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    elements: int
    element_bytes: int
    vector_offset: int
    label_offset: int
    highest_level: int
    entry_point: int
    max_links: int
    max_links_level0: int


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size:
        raise ValueError(f"{HEADER} has {len(data)} bytes instead of {_HEADER.size}")
    fields = _HEADER.unpack(data)
    version, level0, capacity, elements, element_bytes, label_offset, vector_offset = fields[:7]
    highest_level, entry_point, max_links, max_links_level0 = fields[7:11]
    consistent = (
        version == _VERSION
        and level0 == 0
        and elements <= capacity
        and vector_offset == 4 + 4 * max_links_level0
        and vector_offset < label_offset == element_bytes - _LABEL_BYTES
        and (not elements or entry_point < elements)
    )
    if not consistent:
        raise ValueError(f"{HEADER} contradicts itself")
    return _Header(
        elements,
        element_bytes,
        vector_offset,
        label_offset,
        highest_level,
        entry_point,
        max_links,
        max_links_level0,
    )


def _fault_of_ids(path: Path) -> str | None:
    """Look at both ends of the pickle, which is never loaded."""
    try:
        with path.open("rb") as file:
            start = file.read(1)
            file.seek(-1, os.SEEK_END)
            end = file.read(1)
    except FileNotFoundError:
        return f"{IDS} is missing"
    except OSError:  # nothing to seek in
        return f"{IDS} is empty"
    return None if start == b"\x80" and end == b"." else f"{IDS} is cut off"


def _fault_of_vectors(path: Path, header: _Header) -> str | None:
    """Check labels and links on the lowest level, where all elements are."""
    import numpy as np

    if not header.elements:
        return None
    rows = np.memmap(path, dtype=np.uint8, mode="r", shape=(header.elements, header.element_bytes))
    labels: list[np.ndarray[Any, Any]] = []
    for start in range(0, header.elements, 10_000):
        part = np.ascontiguousarray(rows[start : start + 10_000])
        links = part[:, : header.vector_offset].copy().view("<u4")
        counts = links[:, 0] & 0xFFFF  # the third byte marks a deleted element
        used = np.arange(header.max_links_level0) < counts[:, None]
        if counts.max() > header.max_links_level0 or (links[:, 1:][used] >= header.elements).any():
            return f"{VECTORS} holds links that lead nowhere"
        if not np.isfinite(part[:, header.vector_offset : header.label_offset].copy().view("<f4")).all():
            return f"{VECTORS} holds vectors that are no numbers"
        labels.append(part[:, header.label_offset :].copy().view("<u8")[:, 0])
    if len(np.unique(np.concatenate(labels))) < header.elements:
        return f"{VECTORS} holds elements without a label of their own"
    return None


def _fault_of_links(path: Path, header: _Header) -> str | None:
    """Check the links above the lowest level: for each element their length in bytes, and that many bytes."""
    if not header.elements:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _fault_of_link_data(data, header)


def _fault_of_link_data(data: mmap.mmap, header: _Header) -> str | None:
    import numpy as np

    level_bytes = 4 + 4 * header.max_links
    position = 0
    for _ in range(header.elements):
        if position + 4 > len(data):
            return f"{LINKS} is cut off"
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if not size:
            continue
        if size % level_bytes or size // level_bytes > header.highest_level:
            return f"{LINKS} holds something else than links"
        if position + size > len(data):
            return f"{LINKS} is cut off"
        levels = np.frombuffer(data[position : position + size], dtype="<u4").reshape(-1, level_bytes // 4)
        position += size
        for level in levels:
            count = level[0] & 0xFFFF
            if count > header.max_links or (level[1 : 1 + count] >= header.elements).any():
                return f"{LINKS} holds links that lead nowhere"
    return None


def _state(folder: Path) -> list[tuple[int, int] | None]:
    """Return size and time of every file."""

    def of(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return status.st_size, status.st_mtime_ns

    return [of(folder / name) for name in FILES]


def _segment_folder(database: Path, segment_id: str) -> Path:
    """Return the folder of a segment, whose id comes from a file that anyone may have made."""
    if not _UUID.fullmatch(segment_id):
        raise OSError(f"{database / DATABASE_FILE} names the segment {segment_id!r}, which is no id that Chroma makes")
    folder = database / segment_id
    if folder.is_symlink():
        raise OSError(f"{folder} is a link; it must be a folder of the database itself")
    return folder


# --- processes ---------------------------------------------------------------------------------------------------------


def _run(
    task: str, database: Path, *arguments: str, timeout_s: float | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "utf8", os.path.abspath(__file__), task, os.path.abspath(database), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the packages of this process
    done = subprocess.run(  # noqa: S603  # this very file
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise OSError(f"{database / DATABASE_FILE} cannot be used: {_last_line(done.stderr)}")
    return done


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[-1]


def _connect(database: Path, mode: str) -> sqlite3.Connection:
    uri = (database / DATABASE_FILE).absolute().as_uri()
    return sqlite3.connect(f"{uri}?mode={mode}", uri=True, timeout=30)


def _find(database: Path, collection_id: str) -> dict[str, Any]:
    with closing(_connect(database, "ro")) as connection:

        def one(query: str, *values: object) -> Any:  # noqa: ANN401  # what SQLite holds
            row = connection.execute(query, values).fetchone()
            return None if row is None else row[0]

        segments = "SELECT id FROM segments WHERE collection = ? AND scope = ?"
        vectors, texts = (one(segments, collection_id, scope) for scope in ("VECTOR", "METADATA"))
        return {
            "id": str(vectors),
            "persisted": bool(one("SELECT seq_id FROM max_seq_id WHERE segment_id = ?", vectors)),
            "records": one("SELECT count(*) FROM embeddings WHERE segment_id = ?", texts),
            "texts": one(
                "SELECT count(*) FROM embeddings JOIN embedding_metadata USING (id) "
                "WHERE segment_id = ? AND key = 'chroma:document' AND string_value IS NOT NULL",
                texts,
            ),
            "dimension": one("SELECT dimension FROM collections WHERE id = ?", collection_id),
            "logged": list(_logged(connection, collection_id)),
        }


def _logged(connection: sqlite3.Connection, collection_id: str) -> Iterator[dict[str, Any]]:
    """Read additions and upserts that brought text and vector together."""
    rows = connection.execute(
        "SELECT vector, metadata FROM embeddings_queue WHERE topic LIKE ? AND operation IN (0, 2) AND vector IS NOT NULL "
        "AND encoding = 'FLOAT32' AND metadata LIKE '%chroma:document%' ORDER BY seq_id DESC LIMIT ?",
        (f"%/{collection_id}", _SAMPLE),
    )
    for vector, packed in rows:
        metadata = json.loads(packed)
        text = metadata.pop("chroma:document", None)
        if isinstance(text, str):
            yield {"text": text, "metadata": metadata, "vector": base64.b64encode(vector).decode()}


def _forget(database: Path, segment_id: str) -> None:
    with closing(_connect(database, "rw")) as connection, connection:
        connection.execute("DELETE FROM max_seq_id WHERE segment_id = ?", (segment_id,))


def _probe(database: Path, collection_id: str, unit: bool, complete: bool) -> str:
    import chromadb
    from chromadb.config import Settings
    from chromadb.errors import InternalError

    client = chromadb.PersistentClient(str(database), settings=Settings(anonymized_telemetry=False))
    name = next(found.name for found in client.list_collections() if str(found.id) == collection_id)
    collection = client.get_collection(name, embedding_function=None)
    size = min(1000, client.get_max_batch_size())
    try:
        ids = collection.get(include=[])["ids"]
        for start in range(0, len(ids), size):
            try:
                if not _reads(collection, ids[start : start + size], unit):
                    return "it holds dense vectors that are not those that were stored"
            except InternalError as error:
                if complete or "finding id" not in str(error):
                    raise
    except InternalError as error:
        message = str(error)
        if not re.search("hnsw|pickle|finding id|getting embedding|knn", message, flags=re.IGNORECASE):
            raise
        return f"Chroma cannot read it ({message.rsplit(': ', 1)[-1]})"
    return ""


def _reads(collection: Collection, ids: list[str], unit: bool) -> bool:
    """Return whether Chroma gives sound vectors for records, and finds something by the first of them."""
    import numpy as np

    vectors = np.asarray(collection.get(ids, include=["embeddings"])["embeddings"], dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    collection.query(query_embeddings=vectors[:1], n_results=min(10, len(ids)), include=[])
    return bool(len(vectors) == len(ids) and np.isfinite(norms).all() and not (unit and (abs(norms - 1) > 0.01).any()))


def _main(task: str, database: str, *arguments: str) -> None:
    folder = Path(database)
    result: Any = None
    if task == "find":
        result = _find(folder, arguments[0])
    elif task == "forget":
        _forget(folder, arguments[0])
    else:
        result = _probe(folder, arguments[0], "unit" in arguments[1:], "complete" in arguments[1:])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    beside = os.path.dirname(os.path.abspath(__file__))  # its modules are named like other packages
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != beside]
    _main(*sys.argv[1:])
