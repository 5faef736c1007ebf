"""The lexical index of one collection: a cache of its records, never the truth.

Chroma cannot be asked "what changed?", so a token tells a changed collection from an unchanged one: for a local database size
and time of its file (looked at, never opened: a second SQLite in one process would release the locks of Chroma's), elsewhere
the number of records and a stamp that gte-rag's writers leave. This process's own writes are taken over one by one; after any
other change the index is built anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from gte_rag.lexical import SparseIndex
from gte_rag.vectors import SparseMatrix

# An index is written to disk when it has this many records and a tenth of them is not in the file yet.
_SAVE_FROM = 2000
_SAVE_CHANGED = 0.1

Token = tuple[Hashable, ...]


@dataclass(frozen=True)
class Source:
    """Where a view gets its records from.

    Attributes:
        fetch: Returns ids and sparse vectors of all records, in parts.
        token: Returns a cheap value that differs when the collection has changed, as far as can be told.
    """

    fetch: Callable[[], Iterator[tuple[list[str], SparseMatrix]]]
    token: Callable[[], Token]


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
            file: Where to keep the index between processes, without suffix; None keeps it in memory only.
            stamp: Names the model; a file with another stamp is not used.
        """
        self._vocab_size = vocab_size
        self._file, self._stamp = file, stamp
        self._index: SparseIndex | None = None
        self._token: Token = ()
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

    @property
    def built(self) -> bool:
        """Whether there is an index, which has to be told of writes."""
        return self._index is not None

    def fresh(self, source: Source) -> SparseIndex:
        """Return the index after bringing it up to date with the collection."""
        with self.writing, self._lock:
            token = source.token()
            if self._index is None or token != self._token:
                index = self._load(token)
                if index is None:
                    index = SparseIndex(self._vocab_size)
                    for ids, vectors in source.fetch():
                        index.upsert(ids, vectors)
                    self._unsaved = len(index)
                self._index, self._token = index, token
            self._save()
            return self._index

    def invalidate(self) -> None:
        """Forget the index; the next search builds it anew, from the file if that is of the present state."""
        with self._lock:
            self._index, self._token = None, ()

    def wrote(
        self, before: Token, after: Token, ids: Sequence[str], vectors: Callable[[], SparseMatrix] | None
    ) -> None:
        """Take over a write of this process without reading it back.

        Args:
            before: The source's token before the write; if it is not the one the index was built at, someone else has
                written as well and the index is rebuilt at the next search.
            after: The token after the write; an empty one if it is unknown, and the index is rebuilt at the next search.
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
            self._unsaved += len(ids)
            self._token = after

    def _path(self, token: Token) -> Path | None:
        return (
            None
            if self._file is None
            else self._file.with_name(f"{self._file.name}-{'-'.join(map(str, token))}.lexical")
        )

    def _load(self, token: Token) -> SparseIndex | None:
        """Return the index of exactly this state from disk, if it is there."""
        path = self._path(token)
        index = None if path is None else SparseIndex.load(path, stamp=self._stamp)
        if index is None or index.vocab_size != self._vocab_size:
            return None
        self._unsaved = 0
        return index

    def _save(self) -> None:
        path, index = self._path(self._token), self._index
        if path is None or index is None or len(index) < _SAVE_FROM or self._unsaved < _SAVE_CHANGED * len(index):
            return
        old = list(path.parent.glob(f"{self._file.name}-*.lexical")) if self._file else []
        try:
            path.parent.mkdir(exist_ok=True)
            index.save(path, stamp=self._stamp)
        except OSError:  # a cache that cannot be written is no reason to fail a search
            return
        self._unsaved = 0
        for file in old:
            if file != path:
                file.unlink(missing_ok=True)
