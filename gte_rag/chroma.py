"""A Chroma collection whose records carry text, dense vector and sparse vector together.

Local Chroma has no sparse vectors, so each record keeps its own, sealed, under a reserved metadata key (see
`gte_rag.records`). A seal that does not fit the stored text is stale: the vector is computed anew instead of being trusted.
The key never shows in what is returned.
"""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from gte_rag.errors import CollectionMismatchError, DamagedCollectionError, missing_extra
from gte_rag.fusion import Calibration
from gte_rag.interface import PROGRESS_DELAY_S, TextEncoder
from gte_rag.lexical import SparseIndex
from gte_rag.lexical_view import LexicalView, Source, Token
from gte_rag.records import (
    RESERVED_KEY,
    Metadata,
    MetadataValue,
    Record,
    check_ids,
    check_records,
    open_seal,
    records_of,
    seal,
    some_ids,
)
from gte_rag.segments import DATABASE_FILE, find_segment, settled, torn_folders
from gte_rag.vectors import (
    FloatArray,
    SparseMatrix,
    SparseVector,
    is_packed,
    pack_sparse_rows,
    unpack_sparse_rows,
)

try:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.errors import InvalidArgumentError, NotFoundError
except ImportError as error:
    raise missing_extra("chromadb", "chroma") from error

# What a collection remembers of its model, and that its repair has begun and not ended.
FINGERPRINT_KEY, MODEL_KEY, DIMENSION_KEY = "gte_rag:fingerprint", "gte_rag:model_name", "gte_rag:dimension"
REPAIR_KEY = "gte_rag:repair"
_CALIBRATION_KEY, _STAMP_KEY = "gte_rag:calibration", "gte_rag:stamp"
# Records encoded and written together: an interrupted run keeps every group that was finished.
GROUP = 1024
_MOST = 2**31 - 1  # records that Chroma can be asked for
# Texts of somebody else's collection that are encoded to see whether its vectors come from this model, and how close their
# cosines must be: other precisions and dtypes stay above 0.99, other models far below.
_ADOPTION_SAMPLE = 8
ADOPTION_COSINE = 0.98
# The cosine of unit vectors is 1 - scale * distance.
_DISTANCE_SCALE = {"cosine": 1.0, "l2": 0.5, "ip": 1.0}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A record that a search considers.

    Attributes:
        record: The record.
        dense_score: Cosine of its dense vector with the query's, -1 to 1.
        sparse: Its sparse vector, which fits its text.
    """

    record: Record
    dense_score: float
    sparse: SparseVector


@dataclass(frozen=True, eq=False)
class Candidates(Sequence[Candidate]):
    """The records that the search for one query considers.

    Attributes:
        records: The records, n of them.
        dense_scores: Cosines with the query, float32, shape (n,).
        sparse: Sparse vectors, shape (n, vocabulary size).
    """

    records: list[Record]
    dense_scores: FloatArray
    sparse: SparseMatrix

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Candidate:  # type: ignore[override]  # single candidates, no slices
        """Return one of them."""
        return Candidate(self.records[index], float(self.dense_scores[index]), self.sparse[index])

    def __add__(self, other: Candidates) -> Candidates:
        """Return these and then the others."""
        return Candidates(
            self.records + other.records,
            np.concatenate([self.dense_scores, other.dense_scores]),
            SparseMatrix.stack([self.sparse, other.sparse], self.sparse.shape[1]),
        )

    def take(self, rows: Sequence[int]) -> Candidates:
        """Return some of them, in the given order."""
        chosen = np.array(rows, dtype=np.int64)
        return Candidates([self.records[row] for row in rows], self.dense_scores[chosen], self.sparse.take(chosen))


class HybridCollection:
    """Texts with dense and sparse vectors in one Chroma collection.

    Opens the collection of this name, or creates it with cosine distance. The collection remembers the model and the
    dimension that made it. Safe to share between threads.

    Attributes:
        name: Name of the collection.
        encoder: The encoder of its texts.
        collection: The Chroma collection itself.
    """

    def __init__(
        self,
        client: ClientAPI,
        name: str,
        *,
        encoder: TextEncoder,
        adopt: bool = False,
        encoded_text: Callable[[str, Metadata], str] | None = None,
    ) -> None:
        """Open or create a collection.

        Args:
            client: A Chroma client: ephemeral, persistent or HTTP.
            name: Name of the collection, as Chroma allows it (three characters at least).
            encoder: A model with a sparse head; its `dimension` is the collection's.
            adopt: Open a collection that another program filled with dense vectors of this very model, such as
                `langchain_chroma` or LlamaIndex. A sample of its texts is encoded and compared first. Nothing is written;
                sparse vectors are computed when they are needed, or once and for all by `backfill`.
            encoded_text: Gives what is encoded of a record from its text and its metadata, for programs that encode more
                than the text, such as LlamaIndex; None encodes the text.

        Raises:
            CollectionMismatchError: The collection was made by another model, dimension or distance.
            DamagedCollectionError: Chroma was killed while it wrote the collection's graph, or a repair was; the message
                names the command that mends it.
            TypeError: `name` is not a string.
            ValueError: The encoder gives no sparse vectors, or Chroma refuses the name.
        """
        if not isinstance(name, str):
            raise TypeError(f"name is {type(name).__name__}; give a string")
        if not name:  # a server answers this one with an empty error
            raise ValueError("name is empty; Chroma takes names of at least three characters")
        if not encoder.has_sparse:
            raise ValueError(
                f"{encoder.name} gives no sparse vectors; hybrid retrieval needs a model with a sparse head"
            )
        self.name = name
        self.encoder = encoder
        self._encoded_text = encoded_text
        self._marks: dict[str, str | int] = {
            FINGERPRINT_KEY: encoder.fingerprint,
            MODEL_KEY: encoder.name,
            DIMENSION_KEY: encoder.dimension,
        }
        self._client = client
        try:
            self.collection: Collection = client.get_collection(name, embedding_function=None)
        except NotFoundError:
            try:
                self.collection = client.get_or_create_collection(
                    name, embedding_function=None, metadata=self._marks, configuration={"hnsw": {"space": "cosine"}}
                )
            except InvalidArgumentError as error:
                raise ValueError(f"name is {name!r}; Chroma refuses it: {error}") from error
        refuse_damaged(client, self.collection, own_texts=encoded_text is not None)
        self._max_batch: int = client.get_max_batch_size()
        folder = folder_of(client)
        identity = str(self.collection.id)
        self._database = None if folder is None else folder / DATABASE_FILE
        self._view = LexicalView.of(
            identity,
            encoder.vocab_size,
            file=None if folder is None else folder / "gte_rag" / identity,
            stamp=encoder.fingerprint,
        )
        self._space = self._check_marks(adopt)

    def __repr__(self) -> str:
        """Return name and encoder."""
        return f"HybridCollection({self.name!r}, encoder={self.encoder!r})"

    def add(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        show_progress: bool = False,
    ) -> None:
        """Add new texts; arguments and errors as for `upsert`.

        Raises:
            ValueError: Some ids exist already; nothing is written then.
        """
        ids, texts, metadatas = check_records(ids, texts, metadatas)
        for part in self._parts(ids):
            existing = self.collection.get(part, include=[])["ids"]
            if existing:
                raise ValueError(f"{some_ids(existing)} exist already; use upsert to replace them. Nothing was added")
        self._write(ids, texts, metadatas, show_progress, new=True)

    def upsert(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        *,
        metadatas: Sequence[Metadata | None] | None = None,
        show_progress: bool = False,
    ) -> None:
        """Add texts, or replace the ones that exist: text, both vectors and all of the metadata.

        All arguments are checked before anything is written. Texts are encoded and written in groups, each of them
        complete; an interruption keeps the finished groups, and repeating the call completes the rest.

        Args:
            ids: A unique, non-empty id for each text.
            texts: The texts.
            metadatas: For each text None or a mapping from strings to str, int, float, bool or a non-empty list of one of
                these. A value of None is left out.
            show_progress: Show a progress bar on stderr once the work has taken two seconds.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: Lengths differ, ids repeat, or a text or metadata value cannot be stored.
        """
        ids, texts, metadatas = check_records(ids, texts, metadatas)
        self._write(ids, texts, metadatas, show_progress)

    def get(
        self,
        ids: Sequence[str] | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> list[Record]:
        """Return records by id, by filter, or all of them.

        Args:
            ids: Ids to return, in this order; ids that do not exist are left out. None: all records, in Chroma's order.
            where: Chroma's filter on metadata.
            where_document: Chroma's filter on texts.
            limit: Return at most so many.
            offset: Skip so many first.

        Raises:
            TypeError: `ids` is not a list of strings, or `limit` or `offset` is not a whole number.
            ValueError: An id is asked for twice, `limit` or `offset` is negative, or Chroma refuses the filter.
        """
        for option, number in (("limit", limit), ("offset", offset)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise TypeError(f"{option} is {number!r}; give a whole number or None")
            if number is not None and number < 0:
                raise ValueError(f"{option} is {number}; it must be 0 or more, or None")
        limit, offset = (None if number is None else min(number, _MOST) for number in (limit, offset))
        filters: dict[str, Any] = {"where": where, "where_document": where_document}
        if ids is None:
            return records_of(self.collection.get(limit=limit, offset=offset, **filters))
        checked = check_ids(ids)
        records: dict[str, Record] = {}
        for part in self._parts(checked):
            records |= {record.id: record for record in records_of(self.collection.get(part, **filters))}
        first = offset or 0
        ordered = [records[record_id] for record_id in checked if record_id in records]
        return ordered[first : None if limit is None else first + limit]

    def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> None:
        """Delete records by id, by filter, or by both together; ids that do not exist are no error.

        Raises:
            ValueError: Neither ids nor a filter is given, or Chroma refuses the filter.
        """
        filters: dict[str, Any] = {"where": where, "where_document": where_document}
        if ids is None:
            if where is None and where_document is None:
                raise ValueError("delete needs ids or a filter; delete(collection.matching_ids()) deletes everything")
            with self._writing():
                self.collection.delete(**filters)
                self._stamp()
            return
        for part in self._parts(check_ids(ids)):
            with self._writing():
                before = self._before()
                self.collection.delete(part, **filters)
                if where is None and where_document is None:
                    self._wrote(before, part, None)
                else:
                    self._stamp()

    def count(self) -> int:
        """Return the number of records."""
        return self.collection.count()

    def __len__(self) -> int:
        """Return the number of records."""
        return self.count()

    def backfill(self, *, show_progress: bool = False) -> int:
        """Store the sparse vectors of all records that lack a fitting one, as after `adopt` or foreign writes.

        Texts, dense vectors and other metadata stay as they are.

        Args:
            show_progress: Show a progress bar on stderr once the work has taken two seconds.

        Returns:
            How many records got a sparse vector.
        """
        written = 0
        with tqdm(total=self.count(), unit="text", disable=not show_progress, delay=PROGRESS_DELAY_S) as progress:
            for found in self._pages(["documents", "metadatas"]):
                texts, metadatas = _texts(found), _metadatas(found)
                fingerprint = self.encoder.fingerprint
                _, stale = self._stored_sparse(texts, metadatas)
                if stale:
                    vectors = self._sparse_of([texts[index] for index in stale], [metadatas[index] for index in stale])
                    values = [
                        {RESERVED_KEY: value} for value in seal(vectors, [texts[index] for index in stale], fingerprint)
                    ]
                    with self._writing():
                        self.collection.update(
                            ids=[found["ids"][index] for index in stale], metadatas=cast(Any, values)
                        )
                    written += len(stale)
                progress.update(len(texts))
        if FINGERPRINT_KEY not in (self._metadata() or {}) and self._space == "cosine":
            self._remember(self._marks)
        return written

    def nearest(
        self,
        vectors: FloatArray,
        n: int,
        *,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[Candidates]:
        """Return for each query vector the `n` records whose dense vectors are nearest.

        Args:
            vectors: Unit vectors, float32, shape (queries, dimension).
            n: How many records to return at most.
            where: Chroma's filter on metadata.
            where_document: Chroma's filter on texts.

        Returns:
            For each query its candidates, nearest first.
        """
        n = min(n, _MOST)
        found = self.collection.query(
            query_embeddings=vectors,
            n_results=n,
            where=cast(Any, where),
            where_document=cast(Any, where_document),
            include=["metadatas", "documents", "distances"],
        )
        if any(len(ids) < n for ids in found["ids"]):
            # Either no more records match, or Chroma's approximate search has missed some, as it does among many equal
            # vectors. If all that match are candidates, score them all: then nothing is missed.
            matching = self.matching_ids(where, where_document, limit=n + 1)
            if len(matching) <= n and any(len(ids) < len(matching) for ids in found["ids"]):
                return [self._all_of(matching, vector) for vector in vectors]
        scale = _DISTANCE_SCALE[self._space]
        return [
            self._candidates(
                {"ids": ids, "documents": documents, "metadatas": metadatas},
                1 - scale * np.array(distances, dtype=np.float32),
            )
            for ids, documents, metadatas, distances in zip(
                found["ids"],
                cast(Any, found["documents"]),
                cast(Any, found["metadatas"]),
                cast(Any, found["distances"]),
                strict=True,
            )
        ]

    def _all_of(self, ids: Sequence[str], vector: FloatArray) -> Candidates:
        """Return the records of these ids, nearest first."""
        scored = self.candidates(ids, vector)
        return scored.take(np.argsort(-scored.dense_scores, kind="stable").tolist())

    def candidates(self, ids: Sequence[str], vector: FloatArray) -> Candidates:
        """Return the records of these ids that exist, scored against one query vector, in the order of `ids`."""
        found_all = Candidates([], np.empty(0, dtype=np.float32), SparseMatrix.stack([], self.encoder.vocab_size))
        for part in self._parts(list(ids)):
            found = self.collection.get(part, include=["documents", "metadatas", "embeddings"])
            if not found["ids"]:
                continue
            stored = np.asarray(found["embeddings"], dtype=np.float32)
            cosines = stored @ vector / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
            found_all += self._candidates(cast(Any, found), cosines)
        row_of = {record.id: row for row, record in enumerate(found_all.records)}
        return found_all.take([row_of[record_id] for record_id in ids if record_id in row_of])

    def lexical_index(self) -> SparseIndex:
        """Return the exact index over all sparse vectors, brought up to date; see `gte_rag.lexical_view`."""
        return self._view.fresh(Source(self._fetch_sparse, self._token))

    def refresh(self) -> None:
        """Build the lexical index anew at the next search.

        Needed only after another program has replaced texts, without changing their number, in an in-memory collection or
        behind a server, or has written to a local database within a few milliseconds of a write of this process.
        """
        self._view.invalidate()

    def matching_ids(
        self,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
        *,
        limit: int | None = None,
    ) -> list[str]:
        """Return the ids of the records that pass the filters: all of them, or `limit` at most."""
        filters: dict[str, Any] = {"where": where, "where_document": where_document}
        return self.collection.get(limit=limit, include=[], **filters)["ids"]

    def sample(self, n: int) -> list[Record]:
        """Return up to `n` records, evenly spaced over the collection."""
        ids = self.matching_ids()
        return self.get(ids if len(ids) <= n else [ids[index * len(ids) // n] for index in range(n)])

    @property
    def calibration(self) -> Calibration | None:
        """The scales of the scores that `HybridRetriever.calibrate` measured, or None; stored with the collection."""
        stored = (self._metadata() or {}).get(_CALIBRATION_KEY)
        return Calibration.from_json(stored) if isinstance(stored, str) else None

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        self._remember({_CALIBRATION_KEY: calibration.to_json()})

    def _metadata(self) -> dict[str, Any]:
        """Return the collection's metadata as it is now; another process may have changed it."""
        return dict(self._client.get_collection(self.name, embedding_function=None).metadata or {})

    def _remember(self, values: Mapping[str, str | int]) -> None:
        with self._view.writing:  # a write of another thread leaves its stamp in the same metadata
            self._replace_metadata({**self._metadata(), **values})

    def _replace_metadata(self, metadata: Mapping[str, Any]) -> None:
        # Chroma hands out its old settings of the index as metadata and takes none back.
        self.collection.modify(metadata={key: value for key, value in metadata.items() if not key.startswith("hnsw:")})

    def _check_marks(self, adopt: bool) -> str:
        """Refuse a collection of another model, dimension or distance; return its distance."""
        collection, stored, marks = self.collection, dict(self.collection.metadata or {}), self._marks
        raw = collection.configuration_json
        space = str((raw.get("hnsw") or raw.get("spann") or {}).get("space"))
        check_model(self.name, stored, self.encoder)
        if space != "cosine" and not (adopt and space in _DISTANCE_SCALE):
            adopting = (
                "; if this model filled it, open it with adopt=True, each time" if space in _DISTANCE_SCALE else ""
            )
            raise CollectionMismatchError(
                f"collection {self.name!r} uses the distance {space!r}; gte-rag needs 'cosine'. Index into another "
                f'collection, or create this one with configuration={{"hnsw": {{"space": "cosine"}}}}{adopting}'
            )
        if FINGERPRINT_KEY not in stored:
            if not collection.count():
                self._remember(marks)
            elif adopt:
                self._check_sample(space)
            else:
                raise CollectionMismatchError(
                    f"collection {self.name!r} was not made by gte-rag, so nobody can tell which model its vectors come "
                    "from. If it was this one, open it with adopt=True; otherwise index its texts into a new collection"
                )
        return space

    def _check_sample(self, space: str) -> None:
        """Encode some of a foreign collection's texts and refuse it if its vectors are not this model's."""
        found = self.collection.get(limit=_ADOPTION_SAMPLE, include=["documents", "metadatas", "embeddings"])
        stored = np.asarray(found["embeddings"], dtype=np.float32)
        texts = _texts(cast(Any, found))
        if stored.shape[1] != self.encoder.dimension:
            raise CollectionMismatchError(
                f"collection {self.name!r} holds vectors of dimension {stored.shape[1]}; this encoder gives "
                f"{self.encoder.dimension}. Load the encoder with dimension={stored.shape[1]} if it can give that"
            )
        if not any(texts):
            raise CollectionMismatchError(
                f"collection {self.name!r} stores no texts, so sparse vectors cannot be computed"
            )
        norms = np.linalg.norm(stored, axis=1)
        if space != "cosine" and not np.allclose(norms, 1, atol=1e-3):
            raise CollectionMismatchError(
                f"collection {self.name!r} uses the distance {space!r} with vectors that are not of unit length, which is no "
                "cosine; index its texts into a new collection"
            )
        dense = self.encoder.encode_documents(self._as_encoded(texts, _metadatas(cast(Any, found))), sparse=False).dense
        assert dense is not None
        cosine = float(np.median(np.einsum("nd,nd->n", stored, dense) / np.maximum(norms, 1e-12)))
        if cosine < ADOPTION_COSINE:
            raise CollectionMismatchError(
                f"collection {self.name!r} was filled by another model than {self.encoder.name!r}: the median cosine between "
                f"its vectors and this model's is {cosine:.3f}. Open it with the model that filled it"
            )

    def _parts(self, ids: list[str]) -> Iterator[list[str]]:
        return (ids[start : start + self._max_batch] for start in range(0, len(ids), self._max_batch))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the collection for a write. One that fails may have been applied all the same: a server's answer can be lost."""
        with self._view.writing:
            try:
                yield
            except BaseException as error:
                is_refused = isinstance(error, (ValueError, InvalidArgumentError))  # before anything was written
                if not is_refused or isinstance(error, json.JSONDecodeError):  # a server's answer that was cut off
                    self._view.invalidate()
                    with suppress(Exception):
                        self._stamp()
                raise

    def _write(
        self,
        ids: list[str],
        texts: list[str],
        metadatas: list[dict[str, MetadataValue]],
        show_progress: bool,
        *,
        new: bool = False,
    ) -> None:
        """Encode and write groups of records; `new`: refuse those that someone else has added meanwhile."""
        size = min(GROUP, self._max_batch)
        fingerprint = self.encoder.fingerprint
        with tqdm(total=len(ids), unit="text", disable=not show_progress, delay=PROGRESS_DELAY_S) as progress:
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                encoding = self.encoder.encode_documents(self._as_encoded(texts[part], metadatas[part]))
                assert encoding.dense is not None
                assert encoding.sparse is not None
                stored: list[dict[str, Any]] = [
                    {**metadata, RESERVED_KEY: value}
                    for metadata, value in zip(
                        metadatas[part], seal(encoding.sparse, texts[part], fingerprint), strict=True
                    )
                ]
                with self._writing():
                    before = self._before()
                    known = self._drop_old_keys(ids[part], stored)
                    if new and known:
                        raise ValueError(
                            f"some of {some_ids(ids[part])} have been added by another thread or process meanwhile; of "
                            f"this call the first {start} are added. Use upsert to replace those that exist"
                        )
                    self.collection.upsert(
                        ids=ids[part], documents=texts[part], embeddings=encoding.dense, metadatas=cast(Any, stored)
                    )
                    self._wrote(before, ids[part], partial(_as_stored, encoding.sparse), added=len(stored) - known)
                progress.update(len(stored))

    def _drop_old_keys(self, ids: list[str], metadatas: list[dict[str, Any]]) -> int:
        """Mark for removal what existing records have and the new metadata lacks: Chroma's upsert merges.

        Returns:
            How many of the records exist.
        """
        old = self.collection.get(ids, include=["metadatas"])
        place = {record_id: index for index, record_id in enumerate(ids)}
        for record_id, metadata in zip(old["ids"], old["metadatas"] or [], strict=True):
            new = metadatas[place[record_id]]
            new.update({key: None for key in metadata or {} if key not in new})
        return len(old["ids"])

    def _token(self, stamp: str | None = None) -> Token:
        """Return what tells a changed collection: the database file's time, or the number of records and a stamp."""
        if self._database is not None:
            status = self._database.stat()
            return status.st_mtime_ns, status.st_size
        return self.collection.count(), str(self._metadata().get(_STAMP_KEY)) if stamp is None else stamp

    def _before(self) -> Token | None:
        """Return the token before a write; None if no lexical index has to follow, which spares requests to a server."""
        return self._token() if self._view.built else None

    def _stamp(self) -> tuple[str, str]:
        """Let gte-rag in other processes know of a write; return the stamp that was there and the one that is there now.

        Those of a local database see its file change, and an adopted collection is not written to.
        """
        if self._database is not None:
            return "", ""
        metadata = self._metadata()
        found = left = str(metadata.get(_STAMP_KEY))
        if FINGERPRINT_KEY in metadata:
            left = uuid.uuid4().hex
            self._replace_metadata({**metadata, _STAMP_KEY: left})
        return found, left

    def _wrote(
        self,
        before: Token | None,
        ids: Sequence[str],
        vectors: Callable[[], SparseMatrix] | None,
        *,
        added: int | None = None,
    ) -> None:
        """Stamp the collection, and let the lexical index follow a write.

        Args:
            before: What `_before` returned.
            ids: The records written or deleted.
            vectors: Gives their sparse vectors as stored; None for a deletion.
            added: How many of them are new, if that is known.
        """
        found, left = self._stamp()
        if before is None:
            return
        after = self._token(left)
        if self._database is None:
            grown = cast(int, after[0]) - cast(int, before[0])
            if found != before[1] or added not in (None, grown):
                after = ()  # someone else has written meanwhile: the index fits no state
        self._view.wrote(before, after, ids, vectors)

    def _pages(self, include: list[str]) -> Iterator[dict[str, Any]]:
        """Read all records in pages; records written meanwhile may or may not be among them."""
        ids = self.matching_ids()
        for part in self._parts(ids):
            found = self.collection.get(part, include=cast(Any, include))
            if found["ids"]:
                yield cast(dict[str, Any], found)

    def _fetch_sparse(self) -> Iterator[tuple[list[str], SparseMatrix]]:
        for found in self._pages(["documents", "metadatas"]):
            yield found["ids"], self._fresh_sparse(found)

    def _candidates(self, found: Mapping[str, Any], cosines: FloatArray) -> Candidates:
        # Rounding takes Chroma's distance a little below 0.
        return Candidates(records_of(found), np.clip(cosines, -1, 1).astype(np.float32), self._fresh_sparse(found))

    def _fresh_sparse(self, found: Mapping[str, Any]) -> SparseMatrix:
        """Return sparse vectors that fit the texts: the stored ones where they do, computed ones elsewhere."""
        texts, metadatas = _texts(found), _metadatas(found)
        stored, stale = self._stored_sparse(texts, metadatas)
        if not stale:
            return stored
        rows = np.arange(len(texts))
        rows[stale] = len(texts) + np.arange(len(stale))
        computed = self._sparse_of([texts[row] for row in stale], [metadatas[row] for row in stale])
        return SparseMatrix.stack([stored, computed], self.encoder.vocab_size).take(rows)

    def _stored_sparse(self, texts: Sequence[str], metadatas: Sequence[Metadata]) -> tuple[SparseMatrix, list[int]]:
        """Return the stored sparse vectors, and the rows that have none that fits the text: they are empty."""
        packed = [
            open_seal(metadata.get(RESERVED_KEY), text, self.encoder.fingerprint)
            for text, metadata in zip(texts, metadatas, strict=True)
        ]
        vocab_size = self.encoder.vocab_size
        try:
            stored = unpack_sparse_rows([value or "" for value in packed], vocab_size)
        except ValueError:  # sealed, and yet no encoder writes it: a forgery, as good as none
            packed = [value if value and is_packed(value, vocab_size) else None for value in packed]
            stored = unpack_sparse_rows([value or "" for value in packed], vocab_size)
        return stored, [row for row, value in enumerate(packed) if value is None]

    def _sparse_of(self, texts: Sequence[str], metadatas: Sequence[Metadata]) -> SparseMatrix:
        computed = self.encoder.encode_documents(self._as_encoded(texts, metadatas), dense=False).sparse
        assert computed is not None
        return computed

    def _as_encoded(self, texts: Sequence[str], metadatas: Sequence[Metadata]) -> Sequence[str]:
        return texts if self._encoded_text is None else list(map(self._encoded_text, texts, metadatas))


def folder_of(client: ClientAPI) -> Path | None:
    """Return the folder of a local database; None in memory and behind a server."""
    settings = client.get_settings()
    return Path(settings.persist_directory) if settings.is_persistent and not settings.chroma_server_host else None


def check_model(name: str, stored: Mapping[str, Any], encoder: TextEncoder) -> None:
    """Refuse an encoder that is not the one a collection remembers; one that remembers none passes.

    Raises:
        CollectionMismatchError: Model or dimension is another one.
    """
    if FINGERPRINT_KEY not in stored:
        return
    if stored[FINGERPRINT_KEY] != encoder.fingerprint:
        raise CollectionMismatchError(
            f"collection {name!r} was made by the model {stored.get(MODEL_KEY)!r} (fingerprint "
            f"{stored[FINGERPRINT_KEY]}); this encoder is {encoder.name!r} (fingerprint "
            f"{encoder.fingerprint}). Open it with the model that made it, or index into another collection"
        )
    if stored.get(DIMENSION_KEY) != encoder.dimension:
        raise CollectionMismatchError(
            f"collection {name!r} holds vectors of dimension {stored.get(DIMENSION_KEY)}; this encoder gives "
            f"{encoder.dimension}. Load it with dimension={stored.get(DIMENSION_KEY)}, or use another collection"
        )


def refuse_damaged(client: ClientAPI, collection: Collection, *, own_texts: bool = False) -> None:
    """Refuse a collection whose graph Chroma cannot read; of a whole one, only a few file sizes are looked at.

    Args:
        client: The client that has opened it.
        collection: The collection, of which nothing has been read yet: Chroma can crash when it is.
        own_texts: Whether something else than the texts was encoded, which only the caller can do again.

    Raises:
        DamagedCollectionError: The graph is damaged, or its repair has not ended.
    """
    folder = folder_of(client)
    metadata = collection.metadata or {}
    if REPAIR_KEY in metadata:
        problem = "a repair of it was interrupted"
    else:
        torn = [] if folder is None else torn_folders(folder)
        if folder is None or not torn:
            return
        segment = find_segment(folder, str(collection.id))
        if segment.folder not in torn or not settled(segment.folder):
            return
        found = segment.fault()
        if not found:
            return
        problem = (
            f"{found}, as when a process is killed while Chroma writes (chroma-core/chroma#7678). Texts, metadata "
            "and sparse vectors are whole"
        )
    place = "DIR" if folder is None else shlex.quote(str(folder))
    command = f"gte-rag repair --db {place} --collection {shlex.quote(collection.name)}"
    if FINGERPRINT_KEY not in metadata:
        command += " --model NAME"
    if own_texts:
        command = "gte_rag.repair.repair_collection(folder, name, encoder=..., encoded_text=...)"
    raise DamagedCollectionError(
        f"collection {collection.name!r} cannot be opened: {problem}. Stop what uses the database, and mend it:  {command}"
    )


def _texts(found: Mapping[str, Any]) -> list[str]:
    return [text or "" for text in found["documents"]]


def _metadatas(found: Mapping[str, Any]) -> list[Metadata]:
    return [metadata or {} for metadata in found["metadatas"]]


def _as_stored(vectors: SparseMatrix) -> SparseMatrix:
    """Round the weights as packing does, so that an index fed directly equals one read back."""
    return unpack_sparse_rows(pack_sparse_rows(vectors), vectors.shape[1])
