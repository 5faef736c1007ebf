"""Which tokens of two tokenizers stand for the same characters.

The student reads other pieces than its teacher. Between two places where both start a new token, the tokens of one stand for
those of the other; the mean over such a span is what can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor


class Spans(NamedTuple):
    """Spans of tokens that two tokenizations share.

    Attributes:
        student: int64 (tokens,), the span of every packed token of the student; -1: of none.
        teacher: The same of the teacher's packed tokens.
        count: Number of spans.
    """

    student: Tensor
    teacher: Tensor
    count: int

    def mean(self, states: Tensor, which: Tensor) -> Tensor:
        """Return the mean of every span: (tokens, C) and `student` or `teacher` -> (count, C)."""
        inside = (which >= 0).nonzero().squeeze(1)
        spans = which[inside]
        sums = states.new_zeros(self.count, states.shape[1]).index_add(0, spans, states[inside])
        return sums / torch.bincount(spans, minlength=self.count)[:, None]


def common(
    student: Sequence[Encoding],
    teacher: Sequence[Encoding],
    student_lengths: Sequence[int],
    device: torch.device | str = "cpu",
) -> Spans:
    """Find the spans of texts that both tokenized; special tokens are of none.

    Args:
        student: The student's encodings, special tokens included.
        teacher: The teacher's of the same texts.
        student_lengths: How many of the student's tokens are read, the closing one included; spans end there.
        device: Where the numbers of the spans go.
    """
    mine: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    count = 0
    for ours, its, length in zip(student, teacher, student_lengths, strict=True):
        a, b = np.array(ours.offsets[1 : length - 1]).reshape(-1, 2), np.array(its.offsets[1:-1]).reshape(-1, 2)
        edges = np.intersect1d(a[:, 0], b[:, 0])
        stops = np.intersect1d(a[:, 1], b[:, 1])
        last = stops.max(initial=-1)
        for tokens, out, total in ((a, mine, length), (b, theirs, len(its.ids))):
            span = np.searchsorted(edges, tokens[:, 0], side="right") - 1
            span[(tokens[:, 1] > last) | (span < 0)] = -2  # reaches beyond what both have read
            row = np.full(total, -1)
            row[1 : 1 + len(span)] = np.where(span < 0, -1, count + span)
            out.append(row)
        count += len(edges)
    return _kept(*(torch.from_numpy(np.concatenate(side)) for side in (mine, theirs)), count, device)


def _kept(student: Tensor, teacher: Tensor, count: int, device: torch.device | str) -> Spans:
    """Number anew the spans that have tokens on both sides."""
    both = torch.zeros(2, count + 1, dtype=torch.bool)
    both[0, student], both[1, teacher] = True, True  # -1 is the last place
    kept = both.all(0)
    kept[-1] = False
    number = torch.where(kept, kept.cumsum(0) - 1, -1)
    return Spans(number[student].to(device), number[teacher].to(device), int(kept.sum()))
