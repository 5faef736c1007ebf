"""Vectors without a model, for benchmarks in which encoding is not the point.

Dense vectors are random directions, the same for the same text; sparse vectors have 100 weights on average over a vocabulary
in which tokens are as unevenly frequent as words are (Zipf), like the real ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from gte_rag.vectors import Encoding, IntArray, SparseMatrix, SparseVector

VOCAB_SIZE = 250_000


class SyntheticEncoder:
    """Stands in for `GTEEncoder` where only vectors are needed; deterministic in the text."""

    name = "synthetic"
    fingerprint = "0123456789abcdef"
    has_sparse = True
    vocab_size = VOCAB_SIZE
    max_length = 8192

    def __init__(self, dimension: int = 256, weights: int = 100, query_weights: int = 12) -> None:
        self.dimension = dimension
        self._weights, self._query_weights = weights, query_weights
        ranks = np.arange(1, VOCAB_SIZE + 1, dtype=np.float64)
        frequencies = 1 / (ranks + 2.7) ** 1.05
        self._cumulative = np.cumsum(frequencies / frequencies.sum())
        self._ids = np.random.default_rng(0).permutation(VOCAB_SIZE).astype(np.int32)

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, **_: object
    ) -> Encoding:
        """Return vectors of texts."""
        return self._encode(texts, self._weights, dense, sparse)

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, **_: object) -> Encoding:
        """Return vectors of queries, with fewer tokens."""
        return self._encode(texts, self._query_weights, dense, sparse)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return made-up names of tokens."""
        return [f"t{token}" for token in ids]

    def _encode(self, texts: Sequence[str], weights: int, dense: bool, sparse: bool) -> Encoding:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        rows: list[SparseVector] = []
        for row, text in enumerate(texts):
            rng = np.random.default_rng(zlib.crc32(text.encode()))
            if dense:
                vectors[row] = rng.standard_normal(self.dimension, dtype=np.float32)
            if sparse:
                tokens = self._draw(rng, round(weights * rng.uniform(0.5, 1.5)))
                rows.append(SparseVector(tokens, rng.uniform(0.05, 2.0, len(tokens)).astype(np.float32)))
        if dense:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Encoding(vectors if dense else None, SparseMatrix.from_vectors(rows, VOCAB_SIZE) if sparse else None)

    def _draw(self, rng: np.random.Generator, n: int) -> IntArray:
        """Return `n` different tokens, as if words were read until so many different ones had occurred."""
        words = np.empty(0, dtype=np.int64)
        while True:
            words = np.concatenate([words, np.searchsorted(self._cumulative, rng.random(2 * n))])
            ranks, first = np.unique(np.minimum(words, VOCAB_SIZE - 1), return_index=True)
            if len(ranks) >= n:
                return np.sort(self._ids[ranks[np.argsort(first)[:n]]])
