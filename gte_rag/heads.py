"""From hidden states to vectors and scores: pure functions without weights of their own.

Semantics are those of the reference script of the upstream model repository: the dense vector is the first token's hidden
state, cut and **then** normalised; the sparse weight of a token is the largest one among its occurrences.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gte_rag.vectors import SparseMatrix


def dense_vectors(first_hidden: Tensor, dimension: int) -> Tensor:
    """Cut and normalise the first tokens' hidden states.

    Args:
        first_hidden: Hidden states of the first tokens, shape (texts, C).
        dimension: How many leading channels to keep (Matryoshka, arXiv:2205.13147).

    Returns:
        Unit vectors, float32, shape (texts, dimension).
    """
    return functional.normalize(first_hidden[:, :dimension].float(), dim=-1)


def token_weights(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the sparse head to every token.

    Args:
        hidden: Hidden states, shape (T, C).
        weight: The head's weight, shape (1, C).
        bias: The head's bias, shape (1,).

    Returns:
        ``relu(hidden @ weight + bias)``, float32, shape (T,).
    """
    return torch.relu(functional.linear(hidden, weight, bias)).squeeze(-1).float()


def rerank_scores(
    first_hidden: Tensor, pooler_weight: Tensor, pooler_bias: Tensor, classifier_weight: Tensor, classifier_bias: Tensor
) -> Tensor:
    """Apply a reranker's pooler and classifier to the first tokens' hidden states.

    Args:
        first_hidden: Hidden states of the first tokens, shape (pairs, C).
        pooler_weight: float32, shape (C, C).
        pooler_bias: float32, shape (C,).
        classifier_weight: float32, shape (1, C).
        classifier_bias: float32, shape (1,).

    Returns:
        The logits ``classifier(tanh(pooler(first_hidden)))``, float32, shape (pairs,).
    """
    pooled = torch.tanh(functional.linear(first_hidden.float(), pooler_weight, pooler_bias))
    return functional.linear(pooled, classifier_weight, classifier_bias).squeeze(-1)


def sparse_rows(
    weights: NDArray[np.float32],
    token_ids: NDArray[np.int64],
    cu_seqlens: NDArray[np.int64],
    *,
    vocab_size: int,
    special_ids: Collection[int],
) -> SparseMatrix:
    """Collect per-token weights into one sparse row per text.

    Of a repeated token the maximum counts; weights of 0 and special tokens are left out.

    Args:
        weights: Weight of every token, shape (T,).
        token_ids: Id of every token, shape (T,).
        cu_seqlens: Text j lies at ``cu_seqlens[j]:cu_seqlens[j + 1]``.
        vocab_size: Number of columns of the result.
        special_ids: Ids that never carry weight.

    Returns:
        A matrix of shape (texts, vocab_size).
    """
    texts = len(cu_seqlens) - 1
    kept = weights > 0
    for special in special_ids:
        kept &= token_ids != special
    text_of_token = np.repeat(np.arange(texts, dtype=np.int64), np.diff(cu_seqlens))
    keys = (text_of_token * vocab_size + token_ids)[kept]
    order = np.argsort(keys, kind="stable")
    unique, starts = np.unique(keys[order], return_index=True)
    values = np.maximum.reduceat(weights[kept][order], starts) if unique.size else np.empty(0, dtype=np.float32)
    counts = np.bincount(unique // vocab_size, minlength=texts)
    return SparseMatrix(
        indptr=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)]),
        indices=(unique % vocab_size).astype(np.int32),
        values=values.astype(np.float32, copy=False),
        shape=(texts, vocab_size),
    )
