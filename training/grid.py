"""Rounding to a coarse grid, so that weights deflate in a wheel, and training that knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from student import CONSTANT, OWN, RARE, Layer
from torch import Tensor, nn

STEPS, EMBEDDING_STEPS = 8.0, 2.4  # of the grid, to a standard deviation


def coarse(weights: Tensor, steps: float, *, per_row: bool = False) -> Tensor:
    """Round to multiples of a power of two.

    Args:
        weights: float32, (rows, columns). Column `CONSTANT`, which carries biases, is rounded to whole steps only.
        steps: About how many steps make a standard deviation: within a factor of the square root of two, exact with `per_row`.
        per_row: Bring every row to the same standard deviation first; only for rows that a LayerNorm reads.

    Returns:
        float32 of the same shape, at most three significant bits each; rows that 8 bits hold, at a power of two for a step.
    """
    if not bool(weights.any()):
        return weights
    if per_row:
        if bool((weights * 2.0**9 == (weights * 2.0**9).round()).all()):
            return weights  # is on the grid already, and would move: its rows have not quite the same deviation
        weights = weights - weights.mean(1, keepdim=True)  # LayerNorm takes it off
        step = 2.0**-6
        weights = weights / weights.std(1, keepdim=True).clamp(min=1e-8) * (steps * step)
    else:
        step = 2.0 ** round(float(torch.log2(weights[weights != 0].std() / steps)))
    levels = weights / step
    exponent = torch.floor(torch.log2(levels.abs().clamp(min=1.0))).clamp(min=2.0) - 2  # from 8 steps on: fewer levels
    if per_row:
        exponent[:, RARE] = torch.floor(torch.log2(levels[:, RARE].abs().clamp(min=1.0))) - 3  # one number a word
        return torch.round(levels / 2**exponent) * 2**exponent * step
    if len(weights) > weights.shape[1]:  # it reads hidden states, and its biases need more digits
        exponent[:, CONSTANT] = 0
    others = levels.abs().index_fill(1, torch.tensor([CONSTANT], device=levels.device), 0.0)
    largest = others.amax(1, keepdim=True)  # 127 steps of a row at most, and 8 bits hold it
    exponent = torch.maximum(exponent, torch.ceil(torch.log2(largest.clamp(min=1.0) / 127)).clamp(min=0.0))
    return torch.round(levels / 2**exponent) * 2**exponent * step


def round_words(words: Tensor, start: Tensor, steps: float = EMBEDDING_STEPS) -> Tensor:
    """Bring word embeddings onto the grid, those that training has changed; what channels `OWN` say is as it was.

    Args:
        words: float32, (pieces, C).
        start: On the grid, of the same shape.
        steps: Of the grid, to a standard deviation.
    """
    changed = (words != start).any(1)
    out = start.clone()
    out[changed] = coarse(words[changed], steps, per_row=True)
    out[:, OWN] = start[:, OWN]
    return out


@contextmanager
def rounded(layers: nn.Module, active: bool, *, eight_bits: bool = False) -> Iterator[None]:
    """Let the matrices of one or more layers be rounded within; leave the precise ones for the optimizer.

    Args:
        layers: The layers.
        active: Whether to do anything.
        eight_bits: Let matrices also read hidden states as int8 does.
    """
    matrices = [parameter for parameter in layers.parameters() if active and parameter.ndim == 2]
    changed = [module for module in layers.modules() if active and eight_bits and isinstance(module, Layer)]
    precise = [matrix.data for matrix in matrices]
    try:
        for matrix in matrices:
            matrix.data = coarse(matrix.data, STEPS)
        for layer in changed:
            layer.eight_bits = True
        yield
    finally:
        for matrix, data in zip(matrices, precise, strict=True):
            matrix.data = data
        for layer in changed:
            layer.eight_bits = False


@contextmanager
def rounded_words(embedding: nn.Embedding, start: Tensor, active: bool) -> Iterator[None]:
    """The same for word embeddings, given those training started from."""
    precise = embedding.weight.data
    try:
        if active:
            embedding.weight.data = round_words(precise, start)
        yield
    finally:
        embedding.weight.data = precise
