"""The encoder: texts to dense and sparse vectors in one forward pass.

This is the one public way to run a GTE model; the adapters and the retriever call it and nothing below it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from gte_rag.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gte_rag.config import GTEConfig
from gte_rag.errors import CheckpointError
from gte_rag.fused import build
from gte_rag.heads import dense_vectors, sparse_rows, token_weights
from gte_rag.interface import PROGRESS_DELAY_S, TextEncoder
from gte_rag.precision import resolve
from gte_rag.tokenization import Batch, check_texts, pack, tokenize
from gte_rag.vectors import Encoding, SparseMatrix

# Tokens of a batch. Enough rows to feed the matrix products, few enough that the activations stay near the cores.
_MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
# Texts tokenized and sorted together: bounds the memory of a long run without hurting the packing.
_WINDOW = 2048


class _Asked(NamedTuple):
    """What a call wants of every text."""

    prompt: str
    dense: bool
    sparse: bool
    dimension: int


class GTEEncoder(TextEncoder):
    """A GTE model that turns texts into dense vectors and sparse token weights.

    Safe to share between threads. Make one with `from_pretrained`.

    Attributes:
        name: The name or folder it was loaded from.
        config: The architecture.
        dimension: Length of the dense vectors when a call does not say otherwise.
        max_length: Longest text in tokens, special tokens included; longer ones are cut, counted and warned about.
        device: Where the network runs.
        precision: The arithmetic of the network: ``"float32"``, ``"bf16"`` or ``"int8"``, never ``"auto"``.
        query_prompt: Text put before every query, from the checkpoint's own prompt configuration.
        document_prompt: Text put before every document, likewise.
        tokenizer: The tokenizer; read only.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        device: str | torch.device | None = None,
        precision: str = "auto",
        dimension: int | None = None,
        max_length: int = 8192,
    ) -> None:
        """Build the network from a checkpoint in memory; `from_pretrained` is the usual way."""
        self.name = name
        self.config: GTEConfig = checkpoint.config
        self.max_length = _check_max_length(max_length, self.config)
        self.dimension = self._check_dimension(self.config.hidden_size if dimension is None else dimension)
        self.device = _check_device(device)
        self.precision = resolve(precision, self.device)
        self.query_prompt = checkpoint.prompts["query"]
        self.document_prompt = checkpoint.prompts["document"]
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self._checkpoint = checkpoint
        self._model = build(self.config, checkpoint.weights, self.precision, self.device)
        head = checkpoint.sparse_head
        self._head = None if head is None else (self._place(head[0]), self._place(head[1]))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "gte-mini",
        *,
        device: str | torch.device | None = None,
        precision: str = "auto",
        dimension: int | None = None,
        max_length: int = 8192,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> GTEEncoder:
        """Load a GTE checkpoint.

        Args:
            name_or_path: ``"gte-mini"`` (bundled, no download), a folder, a Hugging Face id such as
                ``"Alibaba-NLP/gte-multilingual-base"``, or a ModelScope id such as
                ``"modelscope:iic/gte_sentence-embedding_multilingual-base"``.
            device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if torch sees one.
            precision: ``"float32"``; ``"bf16"``, twice as fast on processors with bfloat16 products (cosine to float32 at
                least 0.9995 on gte-mini); ``"int8"``, for CPUs with 8-bit dot products, up to four times as fast as float32
                (cosine at least 0.99); ``"auto"``, which is bf16 where the device computes it in hardware and float32
                elsewhere. Collections written in one precision can be read in another: the fingerprint is the same.
            dimension: Length of the dense vectors, `config.min_dimension` to `config.hidden_size`; None is the largest.
            max_length: Longest text in tokens, 3 to the model's own limit (8,192), special tokens included.
            revision: Branch, tag or commit of an id.
            cache_dir: Where downloads are kept; by default the hub's own cache.
            local_files_only: Use what was downloaded before and never the network.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged or of another kind.
            ValueError: An option is out of range.
        """
        checkpoint = load_checkpoint(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls(
            checkpoint,
            name=os.fspath(name_or_path),
            device=device,
            precision=precision,
            dimension=dimension,
            max_length=max_length,
        )

    def __deepcopy__(self, memo: object) -> GTEEncoder:
        """Return the encoder itself: it never changes, and pydantic copies what it is given as a default."""
        return self

    def __repr__(self) -> str:
        """Return name, dimension, device and precision."""
        return f"GTEEncoder({self.name!r}, dimension={self.dimension}, device='{self.device}', {self.precision})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the width of the sparse vectors."""
        return self.config.vocab_size

    @property
    def has_sparse(self) -> bool:
        """Whether the checkpoint has a sparse head."""
        return self._head is not None

    @property
    def fused(self) -> bool:
        """Whether compiled loops join the matrix products (extra `fast`, on a CPU); the results are the same."""
        return self._model.packed_forward is not None

    @property
    def num_parameters(self) -> int:
        """Number of weights of the network and the sparse head."""
        head = () if self._head is None else self._head
        return sum(weight.numel() for weight in (*self._checkpoint.weights.values(), *head))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex characters that name the model, whatever layout or dtype it was saved in."""
        return self._checkpoint.fingerprint()

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode search queries: like `encode_documents`, with the checkpoint's query prompt if it has one.

        Args:
            texts: The queries; ``[]`` gives zero rows.
            dense: Whether to return dense vectors.
            sparse: Whether to return sparse vectors; both come from the same forward pass.
            dimension: Length of the dense vectors; None is the encoder's own.
            show_progress: Show a progress bar on stderr once the work has taken two seconds.

        Returns:
            Row i belongs to ``texts[i]`` and does not depend on the other texts.

        Raises:
            TypeError: `texts` is not a list of strings.
            ValueError: A text is not valid Unicode, or `dimension` is out of range, or neither vector is asked for.
            CheckpointError: Sparse vectors are asked for and the checkpoint has no sparse head.
        """
        return self._encode(texts, self.query_prompt, dense, sparse, dimension, show_progress)

    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode documents or passages; arguments, result and errors as for `encode_queries`."""
        return self._encode(texts, self.document_prompt, dense, sparse, dimension, show_progress)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = _WINDOW,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
    ) -> Iterator[Encoding]:
        """Encode documents or passages as they come, in constant memory, for corpora that do not fit into it.

        Args:
            texts: Any iterable, read as needed: at most two batches are held at a time.
            batch_size: Texts per result. They are sorted by length and packed together, so hundreds or more are fastest.
            dense: Whether to return dense vectors.
            sparse: Whether to return sparse vectors.
            dimension: Length of the dense vectors; None is the encoder's own.

        Yields:
            One `Encoding` per `batch_size` texts, in the order of the texts; the last one may be shorter.

        Raises:
            TypeError: `texts` is a single string or no iterable, or an item is not a string.
            ValueError: A text is not valid Unicode, an option is out of range, or neither vector is asked for.
            CheckpointError: Sparse vectors are asked for and the checkpoint has no sparse head.
        """
        if isinstance(texts, (str, bytes, bytearray)) or not isinstance(texts, Iterable):
            check_texts(texts)
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
            raise TypeError(f"batch_size is {batch_size!r}; give a whole number of texts")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._check_asked(dense, sparse)
        dimension = self.dimension if dimension is None else self._check_dimension(dimension)
        return self._stream(iter(texts), int(batch_size), _Asked(self.document_prompt, dense, sparse, dimension))

    def _stream(self, texts: Iterator[str], batch_size: int, asked: _Asked) -> Iterator[Encoding]:
        batches = iter(lambda: check_texts(list(islice(texts, batch_size))), [])
        for encoding in self._encode_windows(batches, asked):
            self._warn_of_truncation(encoding.truncated, len(encoding), stacklevel=3)
            yield encoding

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text, without the mark of a word's beginning."""
        strings: list[str] = self.tokenizer.decode_batch([[int(token_id)] for token_id in ids])
        return strings

    def count_tokens(self, text: str) -> int:
        """Return the length of a text in tokens, special tokens included, before any truncation."""
        return len(self.tokenizer.encode(check_texts([text])[0]).ids)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: str | None = None) -> None:
        """Save model and tokenizer so that this package, `transformers` and `sentence-transformers` load them natively.

        Args:
            folder: A new or empty folder; it appears complete or not at all.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps the dtype of the checkpoint.

        Raises:
            ValueError: The folder is not empty, `dtype` is another one, or the architecture has no native form.
        """
        dtypes = {None: None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in dtypes:
            raise ValueError(f"dtype is {dtype!r}; accepted: 'float32', 'float16', 'bfloat16' and None")
        save_checkpoint(self._checkpoint, folder, dtype=dtypes[dtype])

    def _encode(
        self,
        texts: Sequence[str],
        prompt: str,
        dense: bool,
        sparse: bool,
        dimension: int | None,
        show_progress: bool,
    ) -> Encoding:
        checked = check_texts(texts)
        self._check_asked(dense, sparse)
        dimension = self.dimension if dimension is None else self._check_dimension(dimension)
        asked = _Asked(prompt, dense, sparse, dimension)
        windows = [checked[start : start + _WINDOW] for start in range(0, len(checked), _WINDOW)]
        if show_progress:
            with tqdm(total=len(checked), unit="text", delay=PROGRESS_DELAY_S) as progress:
                parts = list(self._encode_windows(windows, asked, progress.update))
        else:
            parts = list(self._encode_windows(windows, asked))
        truncated = sum(part.truncated for part in parts)
        self._warn_of_truncation(truncated, len(checked), stacklevel=4)
        if len(parts) == 1:
            return parts[0]
        return Encoding(
            np.concatenate([np.empty((0, dimension), np.float32), *(p.dense for p in parts if p.dense is not None)])
            if dense
            else None,
            SparseMatrix.stack([p.sparse for p in parts if p.sparse is not None], self.vocab_size) if sparse else None,
            truncated,
        )

    def _check_asked(self, dense: bool, sparse: bool) -> None:
        if not dense and not sparse:
            raise ValueError("dense and sparse are both False; ask for at least one of them")
        if sparse and self._head is None:
            raise CheckpointError(
                f"{self.name} gives no sparse vectors: {self._checkpoint.without_head}. Call with sparse=False (score_pairs: "
                "sparse_weight=0), or load a checkpoint with a sparse head such as 'Alibaba-NLP/gte-multilingual-base'"
            )

    def _warn_of_truncation(self, truncated: int, texts: int, *, stacklevel: int) -> None:
        if truncated:
            warnings.warn(
                f"{truncated} of {texts} texts are longer than max_length={self.max_length} tokens and were cut",
                stacklevel=stacklevel,
            )

    def _encode_windows(
        self, windows: Iterable[list[str]], asked: _Asked, report: Callable[[int], object] = lambda texts: None
    ) -> Iterator[Encoding]:
        """Encode lists of checked texts one after the other; the next one is tokenized while the network runs."""

        def prepare(window: list[str]) -> tuple[list[list[int]], int]:
            prompted = [asked.prompt + text for text in window] if asked.prompt else window
            return tokenize(self.tokenizer, prompted, self.max_length)

        waiting = iter(windows)
        window = next(waiting, None)
        if window is None:
            return
        tokens = prepare(window)
        following = next(waiting, None)
        if following is None:  # the usual case, and that of a single query: no thread
            yield self._encode_window(window, *tokens, asked, report)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="gte-rag-tokenizer") as ahead:
            while True:
                prepared = None if following is None else ahead.submit(prepare, following)
                yield self._encode_window(window, *tokens, asked, report)
                if following is None or prepared is None:
                    return
                window, tokens = following, prepared.result()
                following = next(waiting, None)

    def _encode_window(
        self,
        window: list[str],
        token_ids: list[list[int]],
        truncated: int,
        asked: _Asked,
        report: Callable[[int], object],
    ) -> Encoding:
        first_row: dict[str, int] = {}
        # Position, among the different texts, of each text: identical ones pass through the network once.
        row_of = np.array([first_row.setdefault(text, len(first_row)) for text in window], dtype=np.int64)
        repeated = len(first_row) < len(window)
        if repeated:
            token_ids = [token_ids[row] for row in np.unique(row_of, return_index=True)[1]]
        vectors = np.empty((len(token_ids), asked.dimension), dtype=np.float32)
        matrices: list[SparseMatrix] = []
        rows: list[NDArray[np.int64]] = []
        for batch in pack(token_ids, _MAX_BATCH_TOKENS.get(self.device.type, 8192)):
            hidden_dense, weights = self._forward(batch, asked.dimension if asked.dense else 0, asked.sparse)
            if hidden_dense is not None:
                vectors[batch.rows] = hidden_dense
            if weights is not None:
                matrices.append(weights)
                rows.append(batch.rows)
            report(len(batch.rows))
        if repeated:
            report(len(window) - len(token_ids))
            vectors = vectors[row_of]
        stacked: SparseMatrix | None = None
        if asked.sparse:
            order = np.argsort(np.concatenate(rows))
            stacked = matrices[0] if len(matrices) == 1 else SparseMatrix.stack(matrices, self.vocab_size)
            if repeated or len(window) > 1:
                stacked = stacked.take(order[row_of])
        return Encoding(vectors if asked.dense else None, stacked, truncated)

    @torch.inference_mode()
    def _forward(
        self, batch: Batch, dimension: int, sparse: bool
    ) -> tuple[NDArray[np.float32] | None, SparseMatrix | None]:
        """Run one batch; a dimension of 0 leaves the dense vectors out."""
        cu_seqlens = torch.from_numpy(batch.cu_seqlens)
        hidden = self._model(torch.from_numpy(batch.token_ids).to(self.device), cu_seqlens, firsts=not sparse)
        first = hidden[cu_seqlens[:-1].to(self.device)] if sparse else hidden
        dense = dense_vectors(first, dimension).cpu().numpy() if dimension else None
        if not sparse or self._head is None:
            return dense, None
        rows = sparse_rows(
            token_weights(hidden, *self._head).cpu().numpy(),
            batch.token_ids,
            batch.cu_seqlens,
            vocab_size=self.vocab_size,
            special_ids=self._checkpoint.special_ids,
        )
        return dense, rows

    def _place(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, torch.float32)

    def _check_dimension(self, dimension: int) -> int:
        least, most = self.config.min_dimension, self.config.hidden_size
        if isinstance(dimension, bool) or not isinstance(dimension, (int, np.integer)):
            raise TypeError(f"dimension is {dimension!r}; give a whole number from {least} to {most}")
        if not least <= dimension <= most:
            raise ValueError(f"dimension is {dimension}; this model gives dense vectors of {least} to {most}")
        return int(dimension)


def _check_max_length(max_length: int, config: GTEConfig) -> int:
    most = config.max_position_embeddings
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)):
        raise TypeError(f"max_length is {max_length!r}; give a whole number of tokens from 3 to {most}")
    if not 3 <= max_length <= most:
        raise ValueError(f"max_length is {max_length}; this model reads 3 to {most} tokens, special tokens included")
    return int(max_length)


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"device {device!r} is not available ({reason}); None chooses one, 'cpu' always works"
        ) from error
    return chosen
