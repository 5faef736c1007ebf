"""Where encoded rows go: Parquet files, a Qdrant or Milvus server, or a Chroma server through `HybridCollection`.

Every sink replaces by id, so writing a part once more changes nothing: that is what makes a run that was killed anywhere
come out exactly once. A sink is a small description that travels to every worker; `open` connects there.
"""

from __future__ import annotations

import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from gte_rag import __version__
from gte_rag.corpus import Rows, metadata_rows
from gte_rag.encoder import GTEEncoder
from gte_rag.errors import CollectionMismatchError, missing_extra
from gte_rag.records import check_records

if TYPE_CHECKING:
    from gte_rag.chroma import HybridCollection

COLUMNS = ("id", "text", "dense", "sparse_indices", "sparse_values")
"""Columns of every Parquet part; the kept ones lie between text and dense."""

# Names that the stores' LangChain integrations use when nobody says otherwise, so that they open the collections as they are.
QDRANT_SPARSE = "langchain-sparse"
_QDRANT_TEXT, _QDRANT_METADATA = "page_content", "metadata"
_MILVUS_ID, _MILVUS_TEXT, _MILVUS_DENSE, _MILVUS_SPARSE = "pk", "text", "dense", "sparse"
_MILVUS_BYTES = 65535
# Milvus refuses an empty sparse vector. Token 0 is a special one, which no query has, so this one scores 0 as well.
_MILVUS_NO_WEIGHTS = {0: 1e-6}
# Points of a request: far below every server's limit on a message.
_REQUEST = 256
_TIMEOUT_S = 60
_MARKS = ("gte_rag:fingerprint", "gte_rag:model_name", "gte_rag:dimension")
# Turns an id into a UUID, the only strings that Qdrant takes as ids. A change would double every collection.
_NAMESPACE = uuid.UUID("8f7e3f6e-6c1b-5d0e-9a53-0c5be5a6f0d1")


class Writer(ABC):
    """A sink opened in a worker."""

    def check(self, rows: Rows) -> Rows:
        """Return the rows, without those that the store could not take; they are added to the rejected ones."""
        reasons = {}
        for position, (metadata, reason) in enumerate(metadata_rows(rows)):
            reason = reason or self.refuse(rows.ids[position], rows.texts[position], metadata)
            if reason:
                reasons[position] = reason
        return rows.without(reasons)

    def refuse(self, row_id: str, text: str, metadata: dict[str, Any]) -> str:
        """Return why the store could not take a row; "" if it can."""
        return ""

    @abstractmethod
    def write(self, number: int, rows: Rows) -> None:
        """Encode the rows of part `number` and write them; what the store has under their ids is replaced."""


class Sink(ABC):
    """Where the rows go."""

    def faults(self) -> tuple[type[Exception], ...]:
        """Return what is raised when the store cannot be reached or refuses a write."""
        return (OSError,)

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return what tells this sink from others, without secrets."""

    @abstractmethod
    def prepare(self, encoder: GTEEncoder) -> None:
        """Create what the workers write into, or refuse what is there.

        Raises:
            CollectionMismatchError: A collection was made by another model or with another dimension.
        """

    @abstractmethod
    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> Writer:
        """Connect, in a worker."""


# --- Parquet -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSink(Sink):
    """Parquet files ``part-00000.parquet``, … in a folder.

    Columns: id, text, the kept ones, dense (fixed-size list of float32), sparse_indices (list of int32, token ids, ascending)
    and sparse_values (list of float32). The schema's metadata name the model: ``gte_rag:fingerprint``, ``gte_rag:model_name``,
    ``gte_rag:dimension``, ``gte_rag:vocab_size``, ``gte_rag:precision``, ``gte_rag:version``.

    Attributes:
        folder: Where to.
    """

    folder: str

    def describe(self) -> dict[str, str]:
        """Return the kind."""
        return {"store": "parquet"}

    def prepare(self, encoder: GTEEncoder) -> None:
        """Do nothing: the folder exists."""

    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> Writer:
        """Return the writer of parts."""
        return _ParquetWriter(Path(self.folder), encoder, schema)


def part_file(folder: Path, number: int) -> Path:
    """Return the path of a part in the output folder."""
    return folder / f"part-{number:05d}.parquet"


class _ParquetWriter(Writer):
    def __init__(self, folder: Path, encoder: GTEEncoder, schema: pa.Schema) -> None:
        self._folder = folder
        self._encoder = encoder
        self._schema = _output_schema(encoder, schema)

    def check(self, rows: Rows) -> Rows:
        return rows

    def write(self, number: int, rows: Rows) -> None:
        encoding = self._encoder.encode_documents(rows.texts, sparse=self._encoder.has_sparse)
        assert encoding.dense is not None
        arrays: dict[str, Any] = {"id": pa.array(rows.ids, pa.string()), "text": pa.array(rows.texts, pa.string())}
        arrays |= rows.columns
        arrays["dense"] = pa.FixedSizeListArray.from_arrays(
            pa.array(encoding.dense.reshape(-1)), self._encoder.dimension
        )
        if encoding.sparse is not None:
            offsets = pa.array(encoding.sparse.indptr.astype("int32"))
            arrays["sparse_indices"] = pa.ListArray.from_arrays(offsets, pa.array(encoding.sparse.indices))
            arrays["sparse_values"] = pa.ListArray.from_arrays(offsets, pa.array(encoding.sparse.values))
        table = pa.table([arrays[name] for name in self._schema.names], schema=self._schema)
        replace_file(part_file(self._folder, number), lambda draft: pq.write_table(table, draft, compression="zstd"))


def _output_schema(encoder: GTEEncoder, kept: pa.Schema) -> pa.Schema:
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        *kept,
        pa.field("dense", pa.list_(pa.float32(), encoder.dimension)),
    ]
    if encoder.has_sparse:
        fields += [
            pa.field("sparse_indices", pa.list_(pa.int32())),
            pa.field("sparse_values", pa.list_(pa.float32())),
        ]
    marks = {key: str(value) for key, value in _marks(encoder).items()}
    marks |= {
        "gte_rag:vocab_size": str(encoder.vocab_size),
        "gte_rag:precision": encoder.precision,
        "gte_rag:version": __version__,
    }
    return pa.schema(fields, metadata=marks)


def replace_file(path: Path, write: Any) -> None:  # noqa: ANN401
    """Let a file appear complete or not at all, whatever is killed meanwhile: `write` gets the path of a draft."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# --- stores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QdrantSink(Sink):
    """A collection of a Qdrant server, as `langchain_qdrant` opens it in hybrid mode with its default names.

    Points have the unnamed dense vector, the sparse vector ``langchain-sparse`` keyed by token id, and the payload ``id``,
    ``page_content`` and ``metadata``; a point's own id is a UUID made from the row's id.

    Attributes:
        url: ``http://host:6333``.
        collection: Its name; it is created with cosine distance if it does not exist.
        api_key: Key of the server; never written anywhere.
    """

    url: str
    collection: str
    api_key: str | None = field(default=None, repr=False)

    def faults(self) -> tuple[type[Exception], ...]:
        """Return what its client raises."""
        from qdrant_client.http.exceptions import ApiException

        return (OSError, ApiException)

    def describe(self) -> dict[str, str]:
        """Return kind, address and collection."""
        return {"store": "qdrant", "url": _public(self.url), "collection": self.collection}

    def prepare(self, encoder: GTEEncoder) -> None:
        """Create the collection, or refuse one of another model or dimension."""
        client = self._client()
        _prepare_qdrant(client, self.collection, encoder)
        client.close()

    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> Writer:
        """Connect."""
        return _QdrantWriter(self._client(), self.collection, encoder)

    def _client(self) -> Any:  # noqa: ANN401
        try:
            from qdrant_client import QdrantClient
        except ImportError as error:
            raise missing_extra("qdrant-client", "qdrant") from error
        return QdrantClient(url=self.url, api_key=self.api_key, timeout=_TIMEOUT_S)


def _prepare_qdrant(client: Any, name: str, encoder: GTEEncoder) -> None:  # noqa: ANN401
    from qdrant_client import models

    if client.collection_exists(name):
        info = client.get_collection(name)
        vectors = info.config.params.vectors
        dimension = getattr(vectors, "size", None)
        _check_marks(name, getattr(info.config, "metadata", None) or {}, encoder)
        if dimension != encoder.dimension:
            found = "named dense vectors" if dimension is None else f"vectors of dimension {dimension}"
            raise CollectionMismatchError(
                f"collection {name!r} has {found}; "
                f"this encoder fills one unnamed vector of dimension {encoder.dimension}. Write into another collection"
            )
        if encoder.has_sparse and QDRANT_SPARSE not in (info.config.params.sparse_vectors or {}):
            raise CollectionMismatchError(
                f"collection {name!r} has no sparse vector {QDRANT_SPARSE!r}; write into another collection"
            )
        return
    sparse = {QDRANT_SPARSE: models.SparseVectorParams()} if encoder.has_sparse else None
    client.create_collection(
        name,
        vectors_config=models.VectorParams(size=encoder.dimension, distance=models.Distance.COSINE),
        sparse_vectors_config=sparse,
        metadata=_marks(encoder),
    )


class _QdrantWriter(Writer):
    def __init__(self, client: Any, collection: str, encoder: GTEEncoder) -> None:  # noqa: ANN401
        self._client = client
        self._collection = collection
        self._encoder = encoder

    def refuse(self, row_id: str, text: str, metadata: dict[str, Any]) -> str:
        return _why_not_json(metadata)

    def write(self, number: int, rows: Rows) -> None:
        from qdrant_client import models

        encoding = self._encoder.encode_documents(rows.texts, sparse=self._encoder.has_sparse)
        assert encoding.dense is not None
        points = []
        for row, (metadata, _) in enumerate(metadata_rows(rows)):
            vectors: dict[str, Any] = {"": encoding.dense[row].tolist()}
            if encoding.sparse is not None:
                sparse = encoding.sparse[row]
                vectors[QDRANT_SPARSE] = models.SparseVector(
                    indices=sparse.indices.tolist(), values=sparse.values.tolist()
                )
            payload = {"id": rows.ids[row], _QDRANT_TEXT: rows.texts[row], _QDRANT_METADATA: _as_json(metadata)}
            points.append(models.PointStruct(id=point_id(rows.ids[row]), vector=vectors, payload=payload))
        for start in range(0, len(points), _REQUEST):
            self._client.upsert(self._collection, points[start : start + _REQUEST], wait=True)


def point_id(row_id: str) -> str:
    """Return the UUID under which Qdrant keeps a row."""
    return str(uuid.uuid5(_NAMESPACE, row_id))


@dataclass(frozen=True)
class MilvusSink(Sink):
    """A collection of a Milvus server.

    Fields: ``pk`` (the id), ``text``, ``dense`` (cosine), ``sparse`` (inner product, keyed by token id), and the kept columns
    as dynamic fields. `langchain_milvus` opens it with ``vector_field=["dense", "sparse"]`` and ``enable_dynamic_field=True``.

    Attributes:
        uri: ``http://host:19530``, or a file of Milvus Lite, which only one worker can open.
        collection: Its name; it is created if it does not exist.
        token: ``user:password`` or key of the server; never written anywhere.
    """

    uri: str
    collection: str
    token: str | None = field(default=None, repr=False)

    def faults(self) -> tuple[type[Exception], ...]:
        """Return what its client raises."""
        from pymilvus.exceptions import MilvusException

        return (OSError, MilvusException)

    def describe(self) -> dict[str, str]:
        """Return kind, address and collection."""
        return {"store": "milvus", "url": _public(self.uri), "collection": self.collection}

    def prepare(self, encoder: GTEEncoder) -> None:
        """Create the collection, or refuse one of another model or dimension."""
        client = self._client()
        _prepare_milvus(client, self.collection, encoder)
        client.close()

    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> Writer:
        """Connect."""
        return _MilvusWriter(self._client(), self.collection, encoder)

    def _client(self) -> Any:  # noqa: ANN401
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise missing_extra("pymilvus", "milvus") from error
        return MilvusClient(uri=self.uri, token=self.token or "", timeout=_TIMEOUT_S)


def _prepare_milvus(client: Any, name: str, encoder: GTEEncoder) -> None:  # noqa: ANN401
    from pymilvus import DataType

    if client.has_collection(name):
        found = client.describe_collection(name)
        try:
            marks = json.loads(found.get("description") or "{}")
        except ValueError:
            marks = {}  # somebody's own description
        _check_marks(name, marks if isinstance(marks, dict) else {}, encoder)
        fields = {entry["name"]: entry.get("params", {}) for entry in found["fields"]}
        dimension = fields.get(_MILVUS_DENSE, {}).get("dim")
        needed = {_MILVUS_ID, _MILVUS_TEXT, _MILVUS_DENSE, *([_MILVUS_SPARSE] if encoder.has_sparse else [])}
        if not needed <= fields.keys() or int(dimension or 0) != encoder.dimension:
            raise CollectionMismatchError(
                f"collection {name!r} has the fields {', '.join(fields)}; needed are {', '.join(sorted(needed))}, with "
                f"{_MILVUS_DENSE} of dimension {encoder.dimension}. Write into another collection"
            )
        return
    schema = client.create_schema(enable_dynamic_field=True, description=json.dumps(_marks(encoder)))
    schema.add_field(_MILVUS_ID, DataType.VARCHAR, is_primary=True, max_length=_MILVUS_BYTES)
    schema.add_field(_MILVUS_TEXT, DataType.VARCHAR, max_length=_MILVUS_BYTES)
    schema.add_field(_MILVUS_DENSE, DataType.FLOAT_VECTOR, dim=encoder.dimension)
    indexes = client.prepare_index_params()
    indexes.add_index(_MILVUS_DENSE, index_type="AUTOINDEX", metric_type="COSINE")
    if encoder.has_sparse:
        schema.add_field(_MILVUS_SPARSE, DataType.SPARSE_FLOAT_VECTOR)
        indexes.add_index(_MILVUS_SPARSE, index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=indexes)


class _MilvusWriter(Writer):
    def __init__(self, client: Any, collection: str, encoder: GTEEncoder) -> None:  # noqa: ANN401
        self._client = client
        self._collection = collection
        self._encoder = encoder

    def refuse(self, row_id: str, text: str, metadata: dict[str, Any]) -> str:
        for name, value in (("id", row_id), ("text", text)):
            size = len(value.encode("utf-8"))
            if size > _MILVUS_BYTES:
                return f"its {name} has {size} bytes; Milvus stores {_MILVUS_BYTES}"
        taken = sorted(metadata.keys() & {_MILVUS_ID, _MILVUS_TEXT, _MILVUS_DENSE, _MILVUS_SPARSE})
        if taken:
            return f"its metadata have the field {taken[0]!r}, which the collection uses itself"
        return _why_not_json(metadata)

    def write(self, number: int, rows: Rows) -> None:
        encoding = self._encoder.encode_documents(rows.texts, sparse=self._encoder.has_sparse)
        assert encoding.dense is not None
        records: list[dict[str, Any]] = []
        for row, (metadata, _) in enumerate(metadata_rows(rows)):
            record = {**_as_json(metadata), _MILVUS_ID: rows.ids[row], _MILVUS_TEXT: rows.texts[row]}
            record[_MILVUS_DENSE] = encoding.dense[row].tolist()
            if encoding.sparse is not None:
                sparse = encoding.sparse[row]
                weights = dict(zip(sparse.indices.tolist(), sparse.values.tolist(), strict=True))
                record[_MILVUS_SPARSE] = weights or _MILVUS_NO_WEIGHTS
            records.append(record)
        for start in range(0, len(records), _REQUEST):
            self._client.upsert(self._collection, records[start : start + _REQUEST])


@dataclass(frozen=True)
class ChromaSink(Sink):
    """A `HybridCollection` on a Chroma server (``chroma run``), ready for `HybridRetriever`.

    Attributes:
        url: ``http://host:8000``.
        collection: Its name; it is created if it does not exist.
        token: Bearer token of the server; never written anywhere.
    """

    url: str
    collection: str
    token: str | None = field(default=None, repr=False)

    def faults(self) -> tuple[type[Exception], ...]:
        """Return what its client raises."""
        from chromadb.errors import ChromaError
        from httpx import HTTPError

        return (OSError, ChromaError, HTTPError)

    def describe(self) -> dict[str, str]:
        """Return kind, address and collection."""
        return {"store": "chroma", "url": _public(self.url), "collection": self.collection}

    def prepare(self, encoder: GTEEncoder) -> None:
        """Create the collection, or refuse one of another model or dimension."""
        self._collection(encoder)

    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> Writer:
        """Connect."""
        return _ChromaWriter(self._collection(encoder))

    def _collection(self, encoder: GTEEncoder) -> HybridCollection:
        from gte_rag.chroma import HybridCollection

        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError as error:
            raise missing_extra("chromadb", "chroma") from error
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"url is {_public(self.url)!r}; give the address of a Chroma server, http://host:8000")
        host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname  # IPv6
        client = chromadb.HttpClient(
            host=host,
            port=address.port or (443 if address.scheme == "https" else 8000),
            ssl=address.scheme == "https",
            headers={"Authorization": f"Bearer {self.token}"} if self.token else None,
            settings=Settings(anonymized_telemetry=False),
        )
        return HybridCollection(client, self.collection, encoder=encoder)


class _ChromaWriter(Writer):
    def __init__(self, collection: HybridCollection) -> None:
        self._collection = collection

    def refuse(self, row_id: str, text: str, metadata: dict[str, Any]) -> str:
        try:
            check_records([row_id], [text], [metadata])
        except (TypeError, ValueError) as error:
            return str(error).replace("metadatas[0]", "its metadata")
        return ""

    def write(self, number: int, rows: Rows) -> None:
        self._collection.upsert(rows.ids, rows.texts, metadatas=[metadata for metadata, _ in metadata_rows(rows)])


# --- shared ------------------------------------------------------------------------------------------------------------


def _marks(encoder: GTEEncoder) -> dict[str, Any]:
    return dict(zip(_MARKS, (encoder.fingerprint, encoder.name, encoder.dimension), strict=True))


def _check_marks(name: str, stored: dict[str, Any], encoder: GTEEncoder) -> None:
    """Refuse a collection that remembers another model; one that remembers none is the caller's to judge."""
    fingerprint = stored.get(_MARKS[0])
    if fingerprint not in (None, encoder.fingerprint):
        raise CollectionMismatchError(
            f"collection {name!r} was made by the model {stored.get(_MARKS[1])!r} (fingerprint {fingerprint}); this encoder is "
            f"{encoder.name!r} (fingerprint {encoder.fingerprint}). Write into another collection"
        )


def _public(url: str) -> str:
    """Return an address without the user and password that it may carry."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _why_not_json(metadata: dict[str, Any]) -> str:
    try:
        json.dumps(metadata, ensure_ascii=False, allow_nan=False, default=_iso).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        return f"its metadata are no JSON: {error}"
    return ""


def _as_json(metadata: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(metadata, default=_iso))
    return value


def _iso(value: object) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no JSON type")


def output_collisions(names: Sequence[str]) -> list[str]:
    """Return the kept columns whose names the Parquet output uses itself."""
    return [name for name in names if name in COLUMNS]
