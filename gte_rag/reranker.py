"""The reranker: a query and a text read together, and how well the text answers the query.

A cross-encoder sees both texts at once and is more exact than comparing vectors, but has to run for every pair. So it sorts the
candidates that a retriever found: `gte_rag.reranking` puts the two together.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gte_rag.checkpoint import Checkpoint, load_checkpoint
from gte_rag.config import GTEConfig
from gte_rag.encoder import _MAX_BATCH_TOKENS, GTEEncoder
from gte_rag.errors import CheckpointError
from gte_rag.heads import rerank_scores
from gte_rag.interface import TextReranker
from gte_rag.tokenization import Batch, check_pairs, pack, pair_template, tokenize_pairs

# Pairs tokenized and sorted together: bounds the memory of a long run without hurting the packing.
_WINDOW = 2048


class GTEReranker(TextReranker):
    """A GTE cross-encoder that scores pairs of a query and a text.

    The same packed network as `GTEEncoder`, so a pair's score does not depend on the other pairs. Safe to share between
    threads. Make one with `from_pretrained`.

    Attributes:
        name: The name or folder it was loaded from.
        config: The architecture.
        max_length: Longest pair in tokens, special tokens included; longer ones are cut and warned about.
        device: Where the network runs.
        precision: The arithmetic of the network; pooler and classifier always work in float32.
        tokenizer: The tokenizer; read only.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        device: str | torch.device | None = None,
        precision: str = "auto",
        max_length: int = 8192,
    ) -> None:
        """Build the network from a checkpoint in memory; `from_pretrained` is the usual way."""
        if checkpoint.rerank_head is None:
            raise CheckpointError(
                f"{name} cannot rerank: {checkpoint.without_rerank_head}. Reranking needs a checkpoint with a pooler and a "
                "classifier such as 'Alibaba-NLP/gte-multilingual-reranker-base'; GTEEncoder.score_pairs scores pairs by their "
                "vectors"
            )
        try:
            self._template = pair_template(checkpoint.tokenizer)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder / 'tokenizer.json'} cannot encode pairs: {error}") from error
        # The encoder places the network; its arithmetic is the reranker's.
        self._encoder = GTEEncoder(checkpoint, name=name, device=device, precision=precision, max_length=max_length)
        least = self._template.num_specials + 2
        if self._encoder.max_length < least:
            raise ValueError(
                f"max_length is {max_length}; a pair needs at least {least} tokens, special tokens included"
            )
        self._head = tuple(weight.to(self._encoder.device, torch.float32) for weight in checkpoint.rerank_head)
        self.name = name
        self.config: GTEConfig = checkpoint.config
        self.max_length = self._encoder.max_length
        self.device = self._encoder.device
        self.precision = self._encoder.precision
        self.tokenizer: Tokenizer = checkpoint.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: str = "auto",
        max_length: int = 8192,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> GTEReranker:
        """Load a GTE reranker.

        Args:
            name_or_path: A folder, a Hugging Face id such as ``"Alibaba-NLP/gte-multilingual-reranker-base"``, or a ModelScope
                id, ``"modelscope:owner/name"``. The bundled ``"gte-mini"`` has no reranker's head and is refused.
            device: A torch device such as ``"cpu"`` or ``"cuda:1"``; None takes a GPU if torch sees one.
            precision: ``"auto"`` or a precision that `GTEEncoder.from_pretrained` accepts.
            max_length: Longest pair in tokens, 6 to the model's own limit (8,192), special tokens included. The model card's
                example uses 512.
            revision: Branch, tag or commit of an id.
            cache_dir: Where downloads are kept; by default the hub's own cache.
            local_files_only: Use what was downloaded before and never the network.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged, or it is no reranker.
            ValueError: An option is out of range.
        """
        checkpoint = load_checkpoint(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return cls(checkpoint, name=os.fspath(name_or_path), device=device, precision=precision, max_length=max_length)

    def __deepcopy__(self, memo: object) -> GTEReranker:
        """Return the reranker itself, as an encoder does."""
        return self

    def __repr__(self) -> str:
        """Return name, device and precision."""
        return f"GTEReranker({self.name!r}, device='{self.device}', {self.precision})"

    @property
    def fingerprint(self) -> str:
        """16 hex characters that name the model, whatever layout or dtype it was saved in."""
        return self._encoder.fingerprint

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Score query-text pairs.

        A pair over `max_length` tokens loses the end of its longer text, and of both once they are equally long
        (``longest_first``, as in the model card's example); that is warned about.

        Args:
            pairs: (query, text) tuples; ``[]`` gives an empty array.

        Returns:
            float32, shape (number of pairs,): the model's raw logits, unbounded, higher is better. Their sigmoid lies between 0
            and 1 and gives the same order.

        Raises:
            TypeError: `pairs` is not a list of pairs of strings.
            ValueError: A text is not valid Unicode.
        """
        checked = check_pairs(pairs)
        scores = np.empty(len(checked), dtype=np.float32)
        budget = _MAX_BATCH_TOKENS.get(self.device.type, 8192)
        truncated = 0
        for start in range(0, len(checked), _WINDOW):
            window = checked[start : start + _WINDOW]
            token_ids, type_ids, cut = tokenize_pairs(self.tokenizer, self._template, window, self.max_length)
            truncated += cut
            for batch in pack(token_ids, budget):
                scores[start + batch.rows] = self._forward(batch, type_ids)
        if truncated:
            warnings.warn(
                f"{truncated} of {len(checked)} pairs are longer than max_length={self.max_length} tokens and were cut",
                stacklevel=2,
            )
        return scores

    @torch.inference_mode()
    def _forward(self, batch: Batch, type_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        types: torch.Tensor | None = None
        # With a table of one row the reference ignores the types, and XLM-R's tokenizer gives only 0.
        if self.config.type_vocab_size > 1:
            packed = np.concatenate([np.asarray(type_ids[row], dtype=np.int64) for row in batch.rows])
            types = torch.from_numpy(packed).to(self.device)
        cu_seqlens = torch.from_numpy(batch.cu_seqlens)
        token_ids = torch.from_numpy(batch.token_ids).to(self.device)
        first = self._encoder._model(token_ids, cu_seqlens, types, firsts=True)
        scores: NDArray[np.float32] = rerank_scores(first, *self._head).cpu().numpy()
        return scores
