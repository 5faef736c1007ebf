"""Dense search alone, with the vectors that were found: what vector stores of other frameworks build on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from gte_rag.chroma import HybridCollection
from gte_rag.records import Record, records_of
from gte_rag.vectors import FloatArray


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A record that dense search found.

    Attributes:
        record: The record.
        cosine: Cosine of its dense vector with the query's, -1 to 1.
        vector: Its dense vector, float32, shape (dimension,).
    """

    record: Record
    cosine: float
    vector: FloatArray


def neighbours(
    collection: HybridCollection,
    vector: Sequence[float] | FloatArray,
    n: int,
    *,
    where: Mapping[str, Any] | None = None,
    where_document: Mapping[str, Any] | None = None,
) -> list[Neighbour]:
    """Return the `n` records whose dense vectors are nearest, nearest first.

    Sparse vectors are neither read nor computed, so this costs what Chroma's own query costs, whoever made the collection.

    Args:
        collection: The collection to search.
        vector: The query's vector, of any length but 0.
        n: How many records to return at most.
        where: Chroma's filter on metadata.
        where_document: Chroma's filter on texts.

    Raises:
        ValueError: `n` is less than 1, the vector has another dimension or is no direction, or Chroma refuses a filter.
    """
    if n < 1:
        raise ValueError(f"{n} records asked for; it must be at least 1")
    query = unit_vector(vector, collection.encoder.dimension)
    found = collection.collection.query(
        query_embeddings=query[None],
        n_results=n,
        where=cast(Any, where),
        where_document=cast(Any, where_document),
        include=["metadatas", "documents", "embeddings"],
    )
    parts = {name: cast(Any, found[name])[0] for name in ("ids", "documents", "metadatas")}
    stored = np.asarray(cast(Any, found["embeddings"])[0], dtype=np.float32).reshape(-1, query.size)
    cosines = stored @ query / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    return list(map(Neighbour, records_of(parts), cosines.clip(-1, 1).tolist(), stored))


def unit_vector(vector: Sequence[float] | FloatArray, dimension: int) -> FloatArray:
    """Return a vector at unit length, float32, shape (dimension,).

    Raises:
        ValueError: It has another dimension, is zero or not finite.
    """
    given = np.asarray(vector, dtype=np.float32)
    if given.shape != (dimension,):
        raise ValueError(
            f"the query vector has the shape {given.shape}; this collection holds vectors of dimension {dimension}. "
            "Embed queries with the collection's own model and dimension"
        )
    norm = float(np.linalg.norm(given))
    if not np.isfinite(norm) or norm == 0:
        raise ValueError(f"the query vector has the length {norm}; it must be finite and not 0")
    unit: FloatArray = given / np.float32(norm)
    return unit
