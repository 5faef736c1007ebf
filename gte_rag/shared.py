"""Encoders shared within a process, and one forward pass for those who ask for dense and sparse vectors separately.

Stores such as Qdrant, Milvus and Chroma Cloud take a dense and a sparse function and call each with the same texts. A
`SharedEncoder` encodes such texts once: what the first call did not return is kept for the second, text by text, because
the two functions need not be called with the same batches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from gte_rag.encoder import GTEEncoder
from gte_rag.interface import TextEncoder
from gte_rag.tokenization import check_texts
from gte_rag.vectors import Encoding, FloatArray, SparseMatrix, SparseVector

# Texts of which one vector is kept until it is asked for. A larger call is kept whole: its caller holds more than that.
_KEPT_TEXTS = 4096

_Side = Literal["dense", "sparse"]
_Key = bytes


class SharedEncoder:
    """An encoder that is loaded at first use and does not encode a text twice for its two vectors.

    Safe to share between threads: a call waits for texts that another one is encoding.
    """

    def __init__(
        self,
        model_name: str = "gte-mini",
        *,
        dimension: int | None = None,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Remember what to load; see `GTEEncoder.from_pretrained`."""
        self._load: Callable[[], TextEncoder] = lambda: GTEEncoder.from_pretrained(
            model_name, dimension=dimension, device=device, precision=precision
        )
        self._dimension: int | None = None
        self._encoder: TextEncoder | None = None
        self._loading = threading.Lock()
        self._changed = threading.Condition()
        self._in_work: set[_Key] = set()
        self._kept: dict[_Side, OrderedDict[_Key, Any]] = {"dense": OrderedDict(), "sparse": OrderedDict()}

    @classmethod
    def wrap(cls, encoder: TextEncoder, *, dimension: int | None = None) -> SharedEncoder:
        """Share an encoder that is there already.

        Args:
            encoder: The encoder.
            dimension: Length of the dense vectors; None is the encoder's own.

        Raises:
            ValueError: The model gives no sparse vectors, so there is nothing to share.
        """
        if not encoder.has_sparse:
            raise ValueError(
                f"{encoder.name} gives no sparse vectors; choose a model with a sparse head such as "
                "'Alibaba-NLP/gte-multilingual-base'"
            )
        shared = cls(encoder.name)
        shared._encoder = encoder
        shared._dimension = dimension
        return shared

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded now if it was not."""
        with self._loading:
            if self._encoder is None:
                self._encoder = self._load()
            return self._encoder

    def dense(self, texts: Sequence[str], *, queries: bool = False, show_progress: bool = False) -> FloatArray:
        """Return dense vectors of texts, and keep their sparse ones for a call of `sparse`.

        Args:
            texts: The texts.
            queries: Whether they are queries; documents otherwise.
            show_progress: Show a progress bar on stderr once the work has taken two seconds.

        Returns:
            Unit vectors, float32, shape (number of texts, dimension).
        """
        keys, rows, encoding = self._take("dense", texts, queries, show_progress)
        if encoding is not None and encoding.dense is not None:
            return encoding.dense
        return np.stack([rows[key] for key in keys])

    def sparse(self, texts: Sequence[str], *, queries: bool = False, show_progress: bool = False) -> SparseMatrix:
        """Return token weights of texts, and keep their dense vectors for a call of `dense`; arguments as there.

        Raises:
            CheckpointError: The model gives no sparse vectors.
        """
        keys, rows, encoding = self._take("sparse", texts, queries, show_progress)
        if encoding is not None and encoding.sparse is not None:
            return encoding.sparse
        return SparseMatrix.from_vectors([rows[key] for key in keys], self.encoder.vocab_size)

    def _take(
        self, side: _Side, texts: Sequence[str], queries: bool, show_progress: bool
    ) -> tuple[list[_Key], dict[_Key, Any], Encoding | None]:
        """Return each text's key, and the row of each key, or the encoding if it has a row for each text."""
        checked = check_texts(texts)
        role = b"query" if queries else b"document"
        keys = [blake2b(text.encode(), digest_size=16, person=role).digest() for text in checked]
        with self._changed:
            self._changed.wait_for(lambda: self._in_work.isdisjoint(keys))
            kept = self._kept[side]
            rows = {key: kept.pop(key) for key in dict.fromkeys(keys) if key in kept}
            new = {key: text for key, text in zip(keys, checked, strict=True) if key not in rows}
            self._in_work |= new.keys()
        if keys and not new:
            return keys, rows, None
        try:
            encoding = self._encode(side, list(new.values()), queries, show_progress)
            self._keep("sparse" if side == "dense" else "dense", new, encoding)
        finally:
            with self._changed:
                self._in_work -= new.keys()
                self._changed.notify_all()
        if len(new) == len(keys):
            return keys, rows, encoding
        return keys, rows | dict(zip(new, _rows(encoding, side), strict=True)), None

    def _encode(self, side: _Side, texts: list[str], queries: bool, show_progress: bool) -> Encoding:
        encoder = self.encoder
        encode = encoder.encode_queries if queries else encoder.encode_documents
        sparse = side == "sparse" or encoder.has_sparse
        return encode(texts, sparse=sparse, dimension=self._dimension, show_progress=show_progress)

    def _keep(self, side: _Side, keys: Collection[_Key], encoding: Encoding) -> None:
        rows = list(_rows(encoding, side))
        with self._changed:
            kept = self._kept[side]
            for key, row in zip(keys, rows, strict=False):  # no rows where the model has no sparse head
                kept[key] = row
                kept.move_to_end(key)
            while len(kept) > max(_KEPT_TEXTS, len(rows)):
                kept.popitem(last=False)


def _rows(encoding: Encoding, side: _Side) -> Iterable[Any]:
    """Return one side of an encoding text by text, copied: a view would keep all of it in memory."""
    if side == "dense":
        return [] if encoding.dense is None else (row.copy() for row in encoding.dense)
    vectors = [] if encoding.sparse is None else encoding.sparse
    return (SparseVector(vector.indices.copy(), vector.values.copy()) for vector in vectors)


_shared: dict[tuple[str, int | None, str | None, str], SharedEncoder] = {}
_sharing = threading.Lock()


def shared_encoder(
    model_name: str = "gte-mini", *, dimension: int | None = None, device: str | None = None, precision: str = "auto"
) -> SharedEncoder:
    """Return the process's one `SharedEncoder` of these options."""
    with _sharing:
        key = (model_name, dimension, device, precision)
        if key not in _shared:
            _shared[key] = SharedEncoder(model_name, dimension=dimension, device=device, precision=precision)
        return _shared[key]
