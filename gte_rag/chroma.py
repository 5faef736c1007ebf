"""A Chroma collection whose records carry text, dense vector and sparse vector together.

Local Chroma has no sparse vectors, so each record keeps its own as one packed string under a reserved metadata key, with
the model's fingerprint and a digest of the text and the weights. A value whose fingerprint or digest does not fit is stale
(another program replaced the text) or damaged, and is computed anew instead of being trusted. The key never shows in what is
returned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from tqdm import tqdm

from gte_rag.encoder import GTEEncoder
from gte_rag.errors import CollectionMismatchError, missing_extra
from gte_rag.tokenization import check_texts
from gte_rag.vectors import FloatArray, SparseVector, pack_sparse, unpack_sparse

try:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.errors import InvalidArgumentError, NotFoundError
except ImportError as error:
    raise missing_extra("chromadb", "chroma") from error

MetadataValue: TypeAlias = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]
Metadata: TypeAlias = Mapping[str, MetadataValue]

RESERVED_KEY = "gte_rag:sparse"
_FORMAT = "1"
_FINGERPRINT_KEY, _MODEL_KEY, _DIMENSION_KEY = "gte_rag:fingerprint", "gte_rag:model_name", "gte_rag:dimension"
# Records encoded and written together: an interrupted run keeps every group that was finished.
_GROUP = 1024
_PROGRESS_DELAY_S = 2.0


@dataclass(frozen=True)
class Record:
    """A stored text.

    Attributes:
        id: Its id.
        text: The text.
        metadata: The caller's metadata.
    """

    id: str
    text: str
    metadata: dict[str, MetadataValue] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A record near a query vector.

    Attributes:
        record: The record.
        dense_score: Cosine of its dense vector with the query's, -1 to 1.
        sparse: Its sparse vector, which fits its text.
    """

    record: Record
    dense_score: float
    sparse: SparseVector


class HybridCollection:
    """Texts with dense and sparse vectors in one Chroma collection.

    Opens the collection of this name, or creates it with cosine distance. The collection remembers the model and the
    dimension that made it.

    Attributes:
        name: Name of the collection.
        encoder: The encoder of its texts.
        collection: The Chroma collection itself.
    """

    def __init__(self, client: ClientAPI, name: str, *, encoder: GTEEncoder) -> None:
        """Open or create a collection.

        Args:
            client: A Chroma client: ephemeral, persistent or HTTP.
            name: Name of the collection, as Chroma allows it (three characters at least).
            encoder: A model with a sparse head; its `dimension` is the collection's.

        Raises:
            CollectionMismatchError: The collection was made by another model, dimension or distance.
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
        marks: dict[str, str | int] = {
            _FINGERPRINT_KEY: encoder.fingerprint,
            _MODEL_KEY: encoder.name,
            _DIMENSION_KEY: encoder.dimension,
        }
        try:
            self.collection: Collection = client.get_collection(name, embedding_function=None)
        except NotFoundError:
            try:
                self.collection = client.get_or_create_collection(
                    name, embedding_function=None, metadata=marks, configuration={"hnsw": {"space": "cosine"}}
                )
            except InvalidArgumentError as error:
                raise ValueError(f"name is {name!r}; Chroma refuses it: {error}") from error
        self._check_marks(marks)
        self._max_batch: int = client.get_max_batch_size()

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
        ids, texts, metadatas = _check_records(ids, texts, metadatas)
        for start in range(0, len(ids), self._max_batch):
            existing = self.collection.get(ids[start : start + self._max_batch], include=[])["ids"]
            if existing:
                raise ValueError(f"{_some(existing)} exist already; use upsert to replace them. Nothing was added")
        self._write(ids, texts, metadatas, show_progress, replace=False)

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
        ids, texts, metadatas = _check_records(ids, texts, metadatas)
        self._write(ids, texts, metadatas, show_progress, replace=True)

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
        for name, number in (("limit", limit), ("offset", offset)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise TypeError(f"{name} is {number!r}; give a whole number or None")
            if number is not None and number < 0:
                raise ValueError(f"{name} is {number}; it must be 0 or more, or None")
        filters: dict[str, Any] = {"where": where, "where_document": where_document}
        if ids is None:
            found = self.collection.get(limit=limit, offset=offset, **filters)
            return _records(found)
        checked = _check_ids(ids)
        records: dict[str, Record] = {}
        for start in range(0, len(checked), self._max_batch):
            found = self.collection.get(checked[start : start + self._max_batch], **filters)
            records |= {record.id: record for record in _records(found)}
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
                raise ValueError("delete needs ids or a filter; client.delete_collection(name) deletes everything")
            self.collection.delete(**filters)
            return
        checked = _check_ids(ids)
        for start in range(0, len(checked), self._max_batch):
            self.collection.delete(checked[start : start + self._max_batch], **filters)

    def count(self) -> int:
        """Return the number of records."""
        return self.collection.count()

    def __len__(self) -> int:
        """Return the number of records."""
        return self.count()

    def nearest(
        self,
        vector: FloatArray,
        n: int,
        *,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
    ) -> list[Candidate]:
        """Return the `n` records whose dense vectors are nearest, each with its sparse vector.

        Args:
            vector: A unit vector, float32, shape (dimension,).
            n: How many records to return at most.
            where: Chroma's filter on metadata.
            where_document: Chroma's filter on texts.

        Returns:
            Candidates, nearest first.
        """
        found = self.collection.query(
            query_embeddings=vector[None],
            n_results=n,
            where=cast(Any, where),
            where_document=cast(Any, where_document),
            include=["metadatas", "documents", "distances"],
        )
        texts = [text or "" for text in (found["documents"] or [[]])[0]]
        metadatas = [dict(metadata or {}) for metadata in (found["metadatas"] or [[]])[0]]
        distances = (found["distances"] or [[]])[0]
        packed = [metadata.pop(RESERVED_KEY, None) for metadata in metadatas]
        sparse = self._fresh_sparse(texts, packed)
        return [
            # rounding takes Chroma's distance a little below 0
            Candidate(Record(record_id, text, cast(Any, metadata)), min(1.0, max(-1.0, 1.0 - distance)), vector_)
            for record_id, text, metadata, distance, vector_ in zip(
                found["ids"][0], texts, metadatas, distances, sparse, strict=True
            )
        ]

    def _check_marks(self, marks: Mapping[str, str | int]) -> None:
        """Refuse a collection of another model, dimension or distance; mark an empty one made elsewhere as ours."""
        collection, stored = self.collection, dict(self.collection.metadata or {})
        space = (collection.configuration_json.get("hnsw") or collection.configuration_json.get("spann") or {}).get(
            "space"
        )
        if space != "cosine":
            raise CollectionMismatchError(
                f"collection {self.name!r} uses the distance {space!r}; gte-rag needs 'cosine'. Index into another "
                'collection, or create this one with configuration={"hnsw": {"space": "cosine"}}'
            )
        if _FINGERPRINT_KEY not in stored:
            if collection.count():
                raise CollectionMismatchError(
                    f"collection {self.name!r} was not made by gte-rag, so nobody can tell which model its vectors come "
                    "from; index its texts into a new collection"
                )
            collection.modify(metadata={**{k: v for k, v in stored.items() if not k.startswith("hnsw:")}, **marks})
            return
        if stored[_FINGERPRINT_KEY] != marks[_FINGERPRINT_KEY]:
            raise CollectionMismatchError(
                f"collection {self.name!r} was made by the model {stored.get(_MODEL_KEY)!r} (fingerprint "
                f"{stored[_FINGERPRINT_KEY]}); this encoder is {marks[_MODEL_KEY]!r} (fingerprint {marks[_FINGERPRINT_KEY]}). "
                "Open it with the model that made it, or index into another collection"
            )
        if stored[_DIMENSION_KEY] != marks[_DIMENSION_KEY]:
            raise CollectionMismatchError(
                f"collection {self.name!r} holds vectors of dimension {stored[_DIMENSION_KEY]}; this encoder gives "
                f"{marks[_DIMENSION_KEY]}. Load it with dimension={stored[_DIMENSION_KEY]}, or use another collection"
            )

    def _write(
        self,
        ids: list[str],
        texts: list[str],
        metadatas: list[dict[str, MetadataValue]],
        show_progress: bool,
        *,
        replace: bool,
    ) -> None:
        size = min(_GROUP, self._max_batch)
        with tqdm(total=len(ids), unit="text", disable=not show_progress, delay=_PROGRESS_DELAY_S) as progress:
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                encoding = self.encoder.encode_documents(texts[part])
                assert encoding.dense is not None
                assert encoding.sparse is not None
                stored: list[dict[str, Any]] = [
                    {**metadata, RESERVED_KEY: self._seal(text, vector)}
                    for text, metadata, vector in zip(texts[part], metadatas[part], encoding.sparse, strict=True)
                ]
                if replace:  # Chroma merges metadata into what is there; a key set to None is removed
                    old = self.collection.get(ids[part], include=["metadatas"])
                    place = {record_id: index for index, record_id in enumerate(ids[part])}
                    for record_id, metadata in zip(old["ids"], old["metadatas"] or [], strict=True):
                        new = stored[place[record_id]]
                        new.update({key: None for key in metadata or {} if key not in new})
                self.collection.upsert(
                    ids=ids[part],
                    documents=texts[part],
                    embeddings=encoding.dense,
                    metadatas=cast(Any, stored),
                )
                progress.update(len(stored))

    def _seal(self, text: str, vector: SparseVector) -> str:
        """Return the stored form of a sparse vector: format, model, digest of text and weights, packed weights."""
        packed = pack_sparse(vector)
        return ":".join((_FORMAT, self.encoder.fingerprint, _digest(text, packed), packed))

    def _fresh_sparse(self, texts: Sequence[str], packed: Sequence[object]) -> list[SparseVector]:
        """Return sparse vectors that fit the texts: the stored ones where they do, computed ones elsewhere."""
        prefix = f"{_FORMAT}:{self.encoder.fingerprint}:"
        vectors: list[SparseVector | None] = []
        for text, value in zip(texts, packed, strict=True):
            vector = None
            if isinstance(value, str) and value.startswith(prefix):
                digest, _, weights = value[len(prefix) :].partition(":")
                # The weights count too: cut short, they may still unpack, to wrong weights.
                if digest == _digest(text, weights):
                    vector = unpack_sparse(weights)
            vectors.append(vector)
        stale = [index for index, vector in enumerate(vectors) if vector is None]
        if stale:
            computed = self.encoder.encode_documents([texts[index] for index in stale], dense=False).sparse
            assert computed is not None
            for index, vector in zip(stale, computed, strict=True):
                vectors[index] = vector
        return cast("list[SparseVector]", vectors)


def _digest(text: str, packed: str) -> str:
    return hashlib.blake2b(f"{text}\0{packed}".encode(), digest_size=8).hexdigest()


def _records(found: Mapping[str, Any]) -> list[Record]:
    """Return what Chroma's `get` found, without the reserved key."""
    return [
        Record(record_id, text or "", {key: value for key, value in (metadata or {}).items() if key != RESERVED_KEY})
        for record_id, text, metadata in zip(found["ids"], found["documents"], found["metadatas"], strict=True)
    ]


def _check_ids(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"ids is {type(ids).__name__}; give a list of strings")
    checked = list(ids)
    for position, record_id in enumerate(checked):
        if not isinstance(record_id, str):
            raise TypeError(f"ids[{position}] is {type(record_id).__name__}; every id must be a string")
        if not record_id:
            raise ValueError(f"ids[{position}] is empty; an id has at least one character")
        _check_unicode(record_id, f"ids[{position}]")
    if len(set(checked)) != len(checked):
        seen: set[str] = set()
        repeated = [record_id for record_id in checked if record_id in seen or seen.add(record_id)]  # type: ignore[func-returns-value]
        raise ValueError(f"{_some(repeated)} given more than once; every id must be unique")
    return checked


def _check_records(
    ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata | None] | None
) -> tuple[list[str], list[str], list[dict[str, MetadataValue]]]:
    """Check everything that Chroma would refuse, change or lose, before anything is encoded or written."""
    ids, texts = _check_ids(ids), check_texts(texts)
    if metadatas is not None and (isinstance(metadatas, (str, bytes)) or not isinstance(metadatas, Sequence)):
        raise TypeError(f"metadatas is {type(metadatas).__name__}; give a list with one mapping or None for each text")
    if len(ids) != len(texts) or (metadatas is not None and len(metadatas) != len(texts)):
        given = "" if metadatas is None else f" and {len(metadatas)} metadatas"
        raise ValueError(f"{len(ids)} ids, {len(texts)} texts{given}; give one of each per text")
    checked = [
        dict(_check_metadata(metadata, f"metadatas[{position}]"))
        for position, metadata in enumerate(metadatas if metadatas is not None else [None] * len(texts))
    ]
    return ids, texts, checked


def _check_metadata(metadata: Metadata | None, where: str) -> Iterator[tuple[str, MetadataValue]]:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise TypeError(f"{where} is {type(metadata).__name__}; give a mapping or None")
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"{where} has the key {key!r}; keys must be strings")
        if not key or key[0] in "#$" or key == RESERVED_KEY or key.startswith("chroma:"):
            raise ValueError(
                f"{where} has the key {key!r}; keys must not be empty, start with '#', '$' or 'chroma:', or be {RESERVED_KEY!r}"
            )
        if value is None:
            continue
        _check_unicode(key, f"a key of {where}")
        values = value if isinstance(value, list) else [value]
        kinds = {type(item) for item in values}
        if len(kinds) != 1 or not kinds <= {str, int, float, bool}:
            raise ValueError(
                f"{where}[{key!r}] is {value!r:.80}; Chroma stores str, int, float, bool and non-empty lists of one of these"
            )
        for item in values:
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{where}[{key!r}] is {item}; Chroma would silently drop a number that is not finite")
            if isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise ValueError(f"{where}[{key!r}] is {item}; Chroma stores whole numbers of 64 bits")
            if isinstance(item, str):
                _check_unicode(item, f"{where}[{key!r}]")
        yield key, value


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate {text[error.start]!r} at character {error.start}, which is no valid Unicode"
        ) from None


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(record_id) for record_id in ids[:3])
    return f"ids {shown}" + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
