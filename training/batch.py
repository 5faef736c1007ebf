"""Packed texts: everything but attention is computed on the tokens of all texts in a row, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_LONG = 512  # tokens of a text from which on its scores are not kept
_STEP = 16  # lengths are padded to multiples of this: every new shape of a product costs a preparation


class Batch:
    """Texts of one forward pass.

    Attributes:
        ids: int64 (tokens,), the token ids of all texts in a row.
        positions: int64 (tokens,), the position of every token in its text.
        text: int64 (tokens,), the text of every token.
        first: int64 (texts,), where each text begins.
        lengths: int64 (texts,), tokens of each.
    """

    def __init__(self, ids: Tensor, lengths: Tensor) -> None:
        """Take token ids of all texts in a row, and how many each text has; both int64, on one device."""
        device = ids.device
        self.ids, self.lengths = ids, lengths
        ends = lengths.cumsum(0)
        self.first = ends - lengths
        self.text = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=len(ids))
        self.positions = torch.arange(len(ids), device=device) - self.first[self.text]
        self._ends = functional.pad(ends, (1, 0)).int()
        self._longest = int(lengths.max())
        if device.type == "cpu":
            self._longest = -(-self._longest // _STEP) * _STEP
        self._even = bool((lengths == self._longest).all())
        self._places = self.text * self._longest + self.positions
        self._padding = torch.arange(self._longest, device=device) >= lengths[:, None]

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
        """Pack the token ids of texts."""
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        return cls(torch.tensor([token for ids in token_ids for token in ids], device=device), lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let the tokens of each text attend to each other: (tokens, heads, C / heads) three times -> (tokens, C)."""
        if q.device.type == "cuda" and q.dtype != torch.float32 and varlen_attn is not None:
            q, k = q.to(v.dtype), k.to(v.dtype)
            mixed: Tensor = varlen_attn(q, k, v, self._ends, self._ends, self._longest, self._longest)
            return mixed.flatten(1)
        q, k, v = (self._padded(x) for x in (q, k, v))
        mask = None if self._even else ~self._padding[:, None, None, :]
        if self._longest > _LONG or q.device.type != "cpu" or not q.requires_grad:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:  # on a CPU the fused kernel's gradients take several times as long as plain products
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            mixed = (scores if mask is None else scores.masked_fill(~mask, -1e4)).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(len(self.lengths) * self._longest, -1)
        return mixed if self._even else mixed[self._places]

    def mean(self, states: Tensor) -> Tensor:
        """Return the mean over each text's tokens: (tokens, C) -> (texts, C)."""
        sums = states.new_zeros(len(self.lengths), states.shape[1]).index_add(0, self.text, states)
        return sums / self.lengths[:, None]

    def _padded(self, x: Tensor) -> Tensor:
        """(tokens, heads, C / heads) -> (texts, heads, longest, C / heads)."""
        if not self._even:
            x = x.new_zeros(len(self.lengths) * self._longest, *x.shape[1:]).index_copy(0, self._places, x)
        return x.view(len(self.lengths), self._longest, *x.shape[1:]).transpose(1, 2)


def by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return which texts to pass through together: those of about one length, padded to at most so many tokens in all."""
    groups: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda text: lengths[text]):
        if not groups or (len(groups[-1]) + 1) * lengths[text] > most:
            groups.append([])
        groups[-1].append(text)
    return groups
