"""Mend a collection whose graph was torn when a process was killed: the dense vectors are made again from the texts.

Chroma writes the files of a graph over in place (see `gte_rag.segments`). Everything else of a record is in SQLite and
survives. So the torn files are moved aside, Chroma starts an empty graph and fills it from its log as far as that reaches,
and the texts of all other records are encoded again.

A mark in the collection's metadata says that this has begun. It is taken away when every record has its vector, so a repair
that is interrupted at any moment cannot be mistaken for a whole collection; repeating it does the rest.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gte_rag.chroma import ADOPTION_COSINE, FINGERPRINT_KEY, GROUP, REPAIR_KEY, check_model
from gte_rag.errors import CollectionMismatchError, missing_extra
from gte_rag.interface import PROGRESS_DELAY_S, TextEncoder
from gte_rag.records import Metadata
from gte_rag.segments import DATABASE_FILE, Segment, find_segment, forget_graph, probe

try:
    import chromadb
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.config import Settings
    from chromadb.errors import InternalError, NotFoundError
except ImportError as error:
    raise missing_extra("chromadb", "chroma") from error

_INTERRUPTED = "an earlier repair was interrupted"
# How long Chroma may take to read a graph before it counts as damaged: an hour for ten million records.
_PROBE_S, _PROBE_RECORD_S = 120.0, 0.0004


@dataclass(frozen=True)
class RepairReport:
    """What `repair_collection` did.

    Attributes:
        name: Name of the collection.
        damage: What was wrong; None if it was whole, and nothing was changed.
        records: Number of records.
        encoded: Number of records whose text was encoded again; those of the others were in Chroma's log.
        moved_to: The folder with the damaged files, which may be deleted; None if there were none.
    """

    name: str
    damage: str | None
    records: int
    encoded: int
    moved_to: Path | None


def find_damage(database: str | os.PathLike[str], name: str) -> str | None:
    """Return what is wrong with the graph of a collection, or None; nothing is changed.

    The files are checked first. If they seem whole, Chroma reads every vector, in a process that it may crash.

    Args:
        database: Folder of the Chroma database.
        name: Name of the collection.

    Raises:
        FileNotFoundError: The folder holds no Chroma database.
        OSError: The database cannot be read.
        ValueError: It has no such collection.
    """
    with _opened(Path(database), name) as (_, collection):
        segment = find_segment(Path(database), str(collection.id))
        return _damage(Path(database), collection, segment)


def repair_collection(
    database: str | os.PathLike[str],
    name: str,
    *,
    encoder: TextEncoder,
    adopt: bool = False,
    encoded_text: Callable[[str, Metadata], str] | None = None,
    show_progress: bool = False,
) -> RepairReport:
    """Build the graph of a damaged collection again; texts, metadata, ids and sparse vectors stay as they are.

    Nothing else may use the database meanwhile. Clients of this process that have read the collection before, if they could,
    keep a graph in memory that is no longer the one on disk: close them. One that was refused by `DamagedCollectionError` has
    not, and can go on. An interrupted call is completed by repeating it.

    Args:
        database: Folder of the Chroma database.
        name: Name of the collection.
        encoder: The model that made its vectors.
        adopt: Repair a collection that gte-rag did not make, and which therefore remembers no model. Its vectors that are
            still in Chroma's log are compared with the encoder's.
        encoded_text: What was encoded of a record, as for `HybridCollection`.
        show_progress: Show a progress bar on stderr once the work has taken two seconds.

    Raises:
        CollectionMismatchError: The encoder is not the one that made the vectors, or nobody can tell. Nothing was changed.
        FileNotFoundError: The folder holds no Chroma database.
        OSError: The database cannot be read or written.
        RuntimeError: Chroma does not give back all vectors after the repair.
        ValueError: There is no such collection, or it has records without a text. Nothing was changed.
    """
    folder = Path(database)
    with _opened(folder, name) as (_, collection):
        segment = find_segment(folder, str(collection.id))
        damage = _damage(folder, collection, segment)
        if damage is None:
            return RepairReport(name, None, segment.records, 0, None)
        _check(collection, segment, encoder, adopt, encoded_text)
        _set_mark(collection)
    # No client is open while files move.
    moved_to = None
    if damage != _INTERRUPTED or _seems_damaged(folder, collection, segment):
        moved_to = _move_aside(folder, segment)
        forget_graph(folder, segment)
    with _opened(folder, name) as (client, collection):
        encoded = _encode_again(client, collection, encoder, encoded_text, show_progress)
        _remove_mark(collection)
        return RepairReport(name, damage, collection.count(), encoded, moved_to)


@contextmanager
def _opened(database: Path, name: str) -> Iterator[tuple[ClientAPI, Collection]]:
    """Open a client for a moment; opening it and the collection reads nothing of a graph.

    Clients of a process share what they have read, by the path as it is spelled. Spelled in a way that nobody else does, it
    gives a client that knows nothing of a graph from before the repair.
    """
    if not (database / DATABASE_FILE).is_file():
        raise FileNotFoundError(f"{database} is no Chroma database: there is no {DATABASE_FILE} in it")
    client = chromadb.PersistentClient(
        os.path.join(os.path.abspath(database), "."), settings=Settings(anonymized_telemetry=False)
    )
    try:
        try:
            collection = client.get_collection(name, embedding_function=None)
        except NotFoundError:
            names = ", ".join(sorted(found.name for found in client.list_collections())) or "none"
            raise ValueError(f"{database} has no collection {name!r}; it has: {names}") from None
        yield client, collection
    finally:
        close: Callable[[], None] | None = getattr(client, "close", None)
        if close is not None:
            close()


def _damage(database: Path, collection: Collection, segment: Segment) -> str | None:
    if REPAIR_KEY in (collection.metadata or {}):
        return _INTERRUPTED
    return _seems_damaged(database, collection, segment)


def _seems_damaged(database: Path, collection: Collection, segment: Segment) -> str | None:
    metadata = collection.metadata or {}
    return segment.fault(thorough=True) or probe(
        database,
        str(collection.id),
        unit=FINGERPRINT_KEY in metadata,
        complete=REPAIR_KEY not in metadata,
        timeout_s=_PROBE_S + _PROBE_RECORD_S * segment.records,
    )


def _check(
    collection: Collection,
    segment: Segment,
    encoder: TextEncoder,
    adopt: bool,
    encoded_text: Callable[[str, Metadata], str] | None,
) -> None:
    """Refuse what would not give the vectors that were there."""
    name = collection.name
    metadata = dict(collection.metadata or {})
    check_model(name, metadata, encoder)
    if FINGERPRINT_KEY not in metadata and not adopt:
        raise CollectionMismatchError(
            f"collection {name!r} was not made by gte-rag, so nobody can tell which model its vectors come from. Repair it "
            "with the model that made them and adopt=True (on the command line: --model NAME)"
        )
    if segment.dimension not in (None, encoder.dimension):
        raise CollectionMismatchError(
            f"collection {name!r} holds vectors of dimension {segment.dimension}; this encoder gives {encoder.dimension}. "
            f"Load it with dimension={segment.dimension}"
        )
    if segment.texts < segment.records:
        raise ValueError(
            f"{segment.records - segment.texts:,} of {segment.records:,} records of collection {name!r} have no text, so their "
            "vectors cannot be made again; fill a new collection from where the vectors came from"
        )
    if not segment.logged:
        return
    logged = np.array([np.frombuffer(record.vector, dtype="<f4") for record in segment.logged])
    texts = [_as_encoded(record.text, record.metadata, encoded_text) for record in segment.logged]
    dense = encoder.encode_documents(texts, sparse=False).dense
    assert dense is not None
    cosines = np.einsum("nd,nd->n", logged, dense) / np.maximum(np.linalg.norm(logged, axis=1), 1e-12)
    if (cosine := float(np.median(cosines))) < ADOPTION_COSINE:
        raise CollectionMismatchError(
            f"what {encoder.name!r} makes of the texts of collection {name!r} is not what was stored: the median cosine with "
            f"{len(logged)} vectors in Chroma's log is {cosine:.3f}. Take the model that made them; if more than the text "
            "was encoded, as LlamaIndex does, call gte_rag.repair.repair_collection with encoded_text"
        )


def _move_aside(database: Path, segment: Segment) -> Path | None:
    """Move the files of a graph to where Chroma does not look for them."""
    if not segment.folder.exists():
        return None
    place = database / "gte_rag"
    place.mkdir(exist_ok=True)
    for number in itertools.count(1):
        target = place / f"damaged-{segment.folder.name}-{number}"
        if not target.exists():
            break
    segment.folder.rename(target)
    return target


def _encode_again(
    client: ClientAPI,
    collection: Collection,
    encoder: TextEncoder,
    encoded_text: Callable[[str, Metadata], str] | None,
    show_progress: bool,
) -> int:
    """Give every record its dense vector again; return how many had to be encoded."""
    ids = collection.get(include=[])["ids"]
    size = min(GROUP, client.get_max_batch_size())
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    encoded = 0
    with tqdm(total=len(ids), unit="text", disable=not show_progress, delay=PROGRESS_DELAY_S) as progress:
        for part in parts:
            if not _have_vectors(collection, part):
                found: Any = collection.get(part, include=["documents", "metadatas"])
                texts = [
                    _as_encoded(text or "", metadata or {}, encoded_text)
                    for text, metadata in zip(found["documents"], found["metadatas"], strict=True)
                ]
                dense = encoder.encode_documents(texts, sparse=False).dense
                assert dense is not None
                collection.upsert(ids=found["ids"], embeddings=dense)
                encoded += len(texts)
            progress.update(len(part))
    lacking = sum(len(part) for part in parts if not _have_vectors(collection, part))
    if lacking:
        raise RuntimeError(
            f"Chroma does not give back the vectors of up to {lacking:,} records of collection {collection.name!r} after they "
            "were written; repeat the repair, and see whether another program uses the database"
        )
    return encoded


def _have_vectors(collection: Collection, ids: list[str]) -> bool:
    """Return whether all of these records have a vector: if one has none, Chroma gives none."""
    try:
        vectors = collection.get(ids, include=["embeddings"])["embeddings"]
    except InternalError:
        return False
    return vectors is not None and len(vectors) == len(ids)


def _as_encoded(text: str, metadata: Metadata, encoded_text: Callable[[str, Metadata], str] | None) -> str:
    return text if encoded_text is None else encoded_text(text, metadata)


def _set_mark(collection: Collection) -> None:
    _replace_metadata(collection, {**(collection.metadata or {}), REPAIR_KEY: 1})


def _remove_mark(collection: Collection) -> None:
    rest = {key: value for key, value in (collection.metadata or {}).items() if key != REPAIR_KEY}
    _replace_metadata(collection, rest or {REPAIR_KEY: None})  # Chroma refuses an empty mapping and drops None


def _replace_metadata(collection: Collection, metadata: Mapping[str, Any]) -> None:
    # Chroma hands out its old settings of the index as metadata and takes none back.
    collection.modify(metadata={key: value for key, value in metadata.items() if not key.startswith("hnsw:")})
