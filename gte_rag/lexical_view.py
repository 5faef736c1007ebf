"""The lexical index of one collection: a cache of its records, never the truth.

Chroma cannot be asked "what changed?", but a local database can: every write advances a sequence number that SQLite shows.
So the index of a local persistent collection follows every write, by whatever program, record by record. Elsewhere (in
memory, or behind a server) it is rebuilt when the number of records or the stamp that gte-rag's writers leave has changed.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from gte_rag.lexical import SparseIndex
from gte_rag.vectors import SparseMatrix

# Returns the sparse vectors of those of the given ids that exist, all that exist for None, in parts.
Fetch = Callable[[Sequence[str] | None], Iterator[tuple[list[str], SparseMatrix]]]

# An index is written to disk when it has this many records and a tenth of them is not in the file yet.
_SAVE_FROM = 2000
_SAVE_CHANGED = 0.1


class LocalLog:
    """The sequence numbers of one collection in a local Chroma database, read beside Chroma.

    Read-only. The three tables used have been the same since Chroma 0.4; where they are not as expected, `open` returns
    None and the caller does without.
    """

    def __init__(self, database: Path, segment: str) -> None:
        self._uri = f"{database.absolute().as_uri()}?mode=ro"
        self._segment = segment
        self._local = threading.local()

    @classmethod
    def open(cls, folder: Path, collection_id: str) -> LocalLog | None:
        """Return the log of a collection, or None if this is no database as expected."""
        database = folder / "chroma.sqlite3"
        if not database.is_file():
            return None
        try:
            with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                rows = connection.execute(
                    "SELECT id FROM segments WHERE collection = ? AND scope = 'METADATA'", (collection_id,)
                ).fetchall()
                if len(rows) != 1:
                    return None
                log = cls(database, rows[0][0])
                log.changed(0)
                return log
        except (sqlite3.Error, TypeError, ValueError):
            return None

    def position(self) -> int:
        """Return the sequence number of the last write to the collection; 0 before the first."""
        row = (
            self._connection()
            .execute("SELECT seq_id FROM max_seq_id WHERE segment_id = ?", (self._segment,))
            .fetchone()
        )
        return int(row[0]) if row else 0

    def changed(self, position: int) -> tuple[int, int, list[str]]:
        """Return the last position, the number of records, and the ids written after `position`, from one snapshot."""
        connection = self._connection()
        connection.execute("BEGIN")
        try:
            last = self.position()
            count = connection.execute(
                "SELECT COUNT(*) FROM embeddings WHERE segment_id = ?", (self._segment,)
            ).fetchone()[0]
            rows = connection.execute(
                "SELECT embedding_id FROM embeddings WHERE segment_id = ? AND seq_id > ?", (self._segment, position)
            ).fetchall()
        finally:
            connection.execute("COMMIT")
        return last, int(count), [row[0] for row in rows]

    def ids(self) -> set[str]:
        """Return the ids of all records."""
        rows = self._connection().execute("SELECT embedding_id FROM embeddings WHERE segment_id = ?", (self._segment,))
        return {row[0] for row in rows}

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._uri, uri=True, isolation_level=None, timeout=30)
            self._local.connection = connection
        return connection


@dataclass(frozen=True)
class Source:
    """Where a view gets its records from.

    Attributes:
        fetch: Reads sparse vectors.
        token: A cheap value that differs when the collection has changed, as far as can be told.
        log: The local log, which can tell exactly; None where there is none.
    """

    fetch: Fetch
    token: Callable[[], object]
    log: LocalLog | None = None


class LexicalView:
    """A `SparseIndex` that follows a collection.

    One view serves all handles on a collection in this process. Safe to share between threads.

    Attributes:
        writing: Held by a handle while it replaces records, so that two threads do not interleave.
    """

    _shared: ClassVar[WeakValueDictionary[str, LexicalView]] = WeakValueDictionary()
    _sharing: ClassVar = threading.Lock()

    def __init__(self, vocab_size: int, *, file: Path | None = None, stamp: str = "") -> None:
        """Start an empty view.

        Args:
            vocab_size: Number of token ids.
            file: Where to keep the index between processes; None keeps it in memory only.
            stamp: Names the model; a file with another stamp is not used.
        """
        self._vocab_size = vocab_size
        self._file, self._stamp = file, stamp
        self._index: SparseIndex | None = None
        self._token: object = None
        self._position = 0
        self._unsaved = 0
        self._lock = threading.RLock()
        self.writing = threading.RLock()

    @classmethod
    def of(cls, collection_id: str, vocab_size: int, *, file: Path | None, stamp: str) -> LexicalView:
        """Return the one view of a collection in this process."""
        with cls._sharing:
            view = cls._shared.get(f"{collection_id}:{stamp}")
            if view is None:
                view = cls._shared[f"{collection_id}:{stamp}"] = cls(vocab_size, file=file, stamp=stamp)
            return view

    def fresh(self, source: Source) -> SparseIndex:
        """Return the index after bringing it up to date with the collection."""
        with self._lock:
            if source.log is not None:
                return self._follow(source.log, source.fetch)
            token = source.token()
            if self._index is None or token != self._token:
                self._index = self._build(source.fetch)
                self._token = token
            return self._index

    def invalidate(self) -> None:
        """Forget the index; the next search builds it anew."""
        with self._lock:
            self._index, self._token, self._position = None, None, 0

    def wrote(
        self, before: object, after: object, ids: Sequence[str], vectors: Callable[[], SparseMatrix] | None
    ) -> None:
        """Take over a write of this process without reading it back; for collections without a local log.

        Args:
            before: The source's token before the write; if it is not the one the index was built at, someone else has
                written as well and the index is rebuilt at the next search.
            after: The token after the write.
            ids: The records written or deleted.
            vectors: Gives their sparse vectors as stored; None for a deletion.
        """
        with self._lock:
            if self._index is None or before != self._token:
                return
            if vectors is None:
                self._index.delete(ids)
            else:
                self._index.upsert(ids, vectors())
            self._token = after

    def _build(self, fetch: Fetch) -> SparseIndex:
        index = SparseIndex(self._vocab_size)
        for ids, vectors in fetch(None):
            index.upsert(ids, vectors)
        return index

    def _follow(self, log: LocalLog, fetch: Fetch) -> SparseIndex:
        index = self._index
        if index is None:
            index = self._load()
        elif log.position() == self._position:
            return index
        elif log.position() < self._position:  # the database was replaced by an older copy
            index, self._position = SparseIndex(self._vocab_size), 0
        last, count, changed = log.changed(self._position)
        if changed:
            for ids, vectors in fetch(None if len(changed) == count else changed):
                index.upsert(ids, vectors)
        if len(index) != count:  # records were deleted
            index.delete(sorted(set(index.ids()) - log.ids()))
        self._index, self._position = index, last
        self._unsaved += len(changed)
        self._save(index)
        return index

    def _load(self) -> SparseIndex:
        """Return the index of the newest usable file and remember its position, or an empty one."""
        self._position = 0
        for file in sorted(self._files(), key=lambda path: -_position_of(path)):
            index = SparseIndex.load(file, stamp=self._stamp)
            if index is not None:
                self._position = _position_of(file)
                return index
        return SparseIndex(self._vocab_size)

    def _save(self, index: SparseIndex) -> None:
        if self._file is None or len(index) < _SAVE_FROM or self._unsaved < _SAVE_CHANGED * len(index):
            return
        old = self._files()
        target = self._file.with_name(f"{self._file.name}-{self._position}.lexical")
        try:
            target.parent.mkdir(exist_ok=True)
            index.save(target, stamp=self._stamp)
        except OSError:  # a cache that cannot be written is no reason to fail a search
            return
        self._unsaved = 0
        for file in old:
            if file != target:
                file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        if self._file is None:
            return []
        return [path for path in self._file.parent.glob(f"{self._file.name}-*.lexical") if _position_of(path) > 0]


def _position_of(file: Path) -> int:
    digits = file.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
