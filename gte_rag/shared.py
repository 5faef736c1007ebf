"""Encoders shared within a process, and one forward pass for those who ask for dense and sparse vectors separately.

Stores such as Qdrant, Milvus and Chroma Cloud take a dense and a sparse function and call each with the same texts. A
`SharedEncoder` encodes such texts once: what the first call did not return is kept for the second.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from gte_rag.encoder import GTEEncoder
from gte_rag.tokenization import check_texts
from gte_rag.vectors import Encoding

# Batches remembered: enough for a few threads that each ask for dense and then sparse, little enough to forget about.
_REMEMBERED_BATCHES = 8
_REMEMBERED_TEXTS = 4096


class SharedEncoder:
    """An encoder that is loaded at first use and does not encode the same texts twice in a row.

    Safe to share between threads.
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
        self._options = {"dimension": dimension, "device": device, "precision": precision}
        self._model_name = model_name
        self._encoder: GTEEncoder | None = None
        self._recent: OrderedDict[tuple[bool, tuple[str, ...]], Encoding] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def wrap(cls, encoder: GTEEncoder) -> SharedEncoder:
        """Share an encoder that is loaded already."""
        shared = cls(encoder.name)
        shared._encoder = encoder
        return shared

    @property
    def encoder(self) -> GTEEncoder:
        """The encoder, loaded now if it was not."""
        with self._lock:
            if self._encoder is None:
                self._encoder = GTEEncoder.from_pretrained(self._model_name, **self._options)  # type: ignore[arg-type]
            return self._encoder

    def encode(self, texts: Sequence[str], *, queries: bool = False) -> Encoding:
        """Return dense and sparse vectors of texts, from memory if they were among the last ones.

        Args:
            texts: The texts.
            queries: Whether they are queries; documents otherwise.
        """
        key = (queries, tuple(check_texts(texts)))
        with self._lock:
            known = self._recent.get(key)
            if known is not None:
                self._recent.move_to_end(key)
                return known
        encoder = self.encoder
        encode = encoder.encode_queries if queries else encoder.encode_documents
        encoding = encode(key[1], sparse=encoder.has_sparse)
        if len(encoding) <= _REMEMBERED_TEXTS:
            with self._lock:
                self._recent[key] = encoding
                while (
                    len(self._recent) > _REMEMBERED_BATCHES or sum(map(len, self._recent.values())) > _REMEMBERED_TEXTS
                ):
                    self._recent.popitem(last=False)
        return encoding


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
