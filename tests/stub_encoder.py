"""A stand-in for the encoder whose vectors can be read off the text.

Every word weighs 0.3 each time it occurs. The dense vector has one slot for every text and hashed slots for the words, so
it is never zero, and texts with common words are near each other. No model is loaded and nothing depends on the process.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from gte_rag.chroma import HybridCollection
from gte_rag.vectors import Encoding, FloatArray, SparseMatrix, SparseVector

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

    from gte_rag import GTEEncoder

WORD_WEIGHT = 0.3  # no float16 number: what is stored differs a little from what is computed
FINGERPRINT = "0123456789abcdef"


class StubEncoder:
    """What `HybridCollection` and `HybridRetriever` need of an encoder.

    Attributes:
        query_calls: The texts of each call of `encode_queries`.
        document_calls: The texts of each call of `encode_documents`.
        fails_on: A text whose encoding fails.
    """

    name = "stub"
    has_sparse = True
    vocab_size = 2**20

    def __init__(
        self, *, dimension: int = 32, fingerprint: str = FINGERPRINT, word_weight: float = WORD_WEIGHT
    ) -> None:
        self.dimension = dimension
        self.fingerprint = fingerprint
        self.word_weight = word_weight
        self.fails_on: str | None = None
        self.query_calls: list[list[str]] = []
        self.document_calls: list[list[str]] = []
        self._words: dict[int, str] = {}

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        self.query_calls.append(list(texts))
        return self._encode(texts, dense, sparse)

    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        self.document_calls.append(list(texts))
        return self._encode(texts, dense, sparse)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return [self._words[token_id] for token_id in ids]

    def weights(self, text: str) -> dict[str, float]:
        """The sparse vector of a text, by word."""
        return {word: self.word_weight * count for word, count in words(text).items()}

    def dense(self, text: str) -> FloatArray:
        """The dense vector of a text."""
        vector = np.zeros(self.dimension, dtype=np.float32)
        vector[0] = 0.5
        for word, count in words(text).items():
            vector[1 + _hash(word) % (self.dimension - 1)] += count
        unit: FloatArray = (vector / np.linalg.norm(vector)).astype(np.float32)
        return unit

    def _encode(self, texts: Sequence[str], dense: bool, sparse: bool) -> Encoding:
        if self.fails_on in texts:
            raise RuntimeError(f"cannot encode {self.fails_on!r}")
        vectors = []
        for text in texts:
            by_id = {_hash(word) % self.vocab_size: (word, weight) for word, weight in self.weights(text).items()}
            self._words |= {token_id: word for token_id, (word, _) in by_id.items()}
            vectors.append(SparseVector.from_dict({token_id: weight for token_id, (_, weight) in by_id.items()}))
        rows = [self.dense(text) for text in texts]
        return Encoding(
            np.array(rows, dtype=np.float32).reshape(len(texts), self.dimension) if dense else None,
            SparseMatrix.from_vectors(vectors, self.vocab_size) if sparse else None,
        )


def words(text: str) -> Counter[str]:
    """How often each word occurs; punctuation is no word."""
    return Counter(re.findall(r"\w+", text.lower()))


def open_collection(client: ClientAPI, name: str, encoder: StubEncoder) -> HybridCollection:
    """Open a collection with the stand-in, which the type checker would not take for an encoder."""
    return HybridCollection(client, name, encoder=cast("GTEEncoder", encoder))


def _hash(word: str) -> int:
    return zlib.crc32(word.encode())
