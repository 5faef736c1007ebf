"""What a collection stores: checked records, and the sealed sparse vector in their metadata.

A seal is one string: format tag, the model's fingerprint, the time, a digest of the text and the weights, packed weights. It
opens only for the same model and the same text, so a value that another program left behind, or damaged, is never trusted.

The time is there for its order alone. Chroma keeps an index over all metadata strings; seals that began with the digest would
scatter over it, and every group of records would rewrite most of its pages. Seals that rise are appended at its end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gte_rag.tokenization import check_texts, check_unicode
from gte_rag.vectors import SparseMatrix, pack_sparse_rows

MetadataValue: TypeAlias = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]
Metadata: TypeAlias = Mapping[str, MetadataValue]

RESERVED_KEY = "gte_rag:sparse"
_FORMAT = "2"
# The formats that are read, and of how many fields each consists: the first had no time.
_FIELDS = {"1": 4, "2": 5}


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


def seal(vectors: SparseMatrix, texts: Sequence[str], fingerprint: str) -> list[str]:
    """Return the stored form of each text's sparse vector; later ones sort after earlier ones."""
    now = time.time_ns() // 1000
    packed = enumerate(zip(texts, pack_sparse_rows(vectors), strict=True), start=now)
    return [f"{_FORMAT}:{fingerprint}:{moment:013x}:{_digest(text, value)}:{value}" for moment, (text, value) in packed]


def open_seal(value: object, text: str, fingerprint: str) -> str | None:
    """Return the packed vector in a seal, or None if it belongs to another text or model, or is missing or damaged."""
    if not isinstance(value, str):
        return None
    fields = value.split(":")
    if len(fields) != _FIELDS.get(fields[0]) or fields[1] != fingerprint:
        return None
    digest, packed = fields[-2:]
    # The digest covers the weights too: cut short, they may still unpack, to wrong ones.
    return packed if digest == _digest(text, packed) else None


def records_of(found: Mapping[str, Any]) -> list[Record]:
    """Return what Chroma's `get` found, without the reserved key."""
    return [
        Record(record_id, text or "", {key: value for key, value in (metadata or {}).items() if key != RESERVED_KEY})
        for record_id, text, metadata in zip(found["ids"], found["documents"], found["metadatas"], strict=True)
    ]


def _digest(text: str, packed: str) -> str:
    return hashlib.blake2b(f"{text}\0{packed}".encode(), digest_size=8).hexdigest()


def check_ids(ids: Sequence[str]) -> list[str]:
    """Return the ids as a list, or refuse what is not a list of unique, non-empty strings."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"ids is {type(ids).__name__}; give a list of strings")
    checked = list(ids)
    for position, record_id in enumerate(checked):
        if not isinstance(record_id, str):
            raise TypeError(f"ids[{position}] is {type(record_id).__name__}; every id must be a string")
        if not record_id:
            raise ValueError(f"ids[{position}] is empty; an id has at least one character")
        check_unicode(record_id, f"ids[{position}]")
    if len(set(checked)) != len(checked):
        seen: set[str] = set()
        repeated = [record_id for record_id in checked if record_id in seen or seen.add(record_id)]  # type: ignore[func-returns-value]
        raise ValueError(f"{some_ids(repeated)} given more than once; every id must be unique")
    return checked


def check_records(
    ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Metadata | None] | None
) -> tuple[list[str], list[str], list[dict[str, MetadataValue]]]:
    """Check everything that Chroma would refuse, change or lose, before anything is encoded or written."""
    ids, texts = check_ids(ids), check_texts(texts)
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
        check_unicode(key, f"a key of {where}")
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
                check_unicode(item, f"{where}[{key!r}]")
        yield key, value


def some_ids(ids: Sequence[str]) -> str:
    """Return the first few ids for an error message."""
    shown = ", ".join(repr(record_id) for record_id in ids[:3])
    return f"ids {shown}" + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
