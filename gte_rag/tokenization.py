"""Texts in, packed token batches out.

A batch holds whole texts one after the other without padding, so the cost of a batch is its number of tokens and nothing
else. Texts are sorted by length and cut into batches under a token budget; `Batch.rows` remembers where each came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole texts, packed.

    Attributes:
        token_ids: int64, shape (tokens,): the texts' ids one after the other, special tokens included.
        cu_seqlens: int64, shape (texts + 1,): text j lies at ``cu_seqlens[j]:cu_seqlens[j + 1]``.
        rows: int64, shape (texts,): the position of each text in the caller's list.
    """

    token_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]
    rows: NDArray[np.int64]


def check_texts(texts: Iterable[str]) -> list[str]:
    """Return the texts as a list, or refuse what is not a list of encodable strings.

    Raises:
        TypeError: A bare string, bytes, None or another non-list was given, or an item is not a string.
        ValueError: A text holds a lone surrogate, which no encoding can write.
    """
    if isinstance(texts, (str, bytes, bytearray)):
        raise TypeError(f"texts is a single {type(texts).__name__}; give a list of strings, for example [text]")
    if not isinstance(texts, Iterable) or isinstance(texts, (Mapping, Set)):
        raise TypeError(f"texts is {type(texts).__name__}; give a list of strings")
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}] is {type(text).__name__}; every text must be a string")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"texts[{position}] has a lone surrogate {text[error.start]!r} at character {error.start}, which is "
                    "no valid Unicode; repair it, for example with text.encode('utf-8', 'replace').decode('utf-8')"
                ) from None
    return checked


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """Turn texts into token ids with the special tokens around them.

    A text over `max_length` tokens loses its end and keeps its closing special token.

    Args:
        tokenizer: The checkpoint's tokenizer, without padding or truncation of its own.
        texts: Checked texts.
        max_length: The longest result in tokens, special tokens included.

    Returns:
        The ids of each text, and how many texts were cut.
    """
    encoded: list[list[int]] = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    truncated = 0
    for position, ids in enumerate(encoded):
        if len(ids) > max_length:
            encoded[position] = ids[: max_length - 1] + ids[-1:]
            truncated += 1
    return encoded, truncated


def pack(token_ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Batch]:
    """Sort texts by length, longest first, and pack them into batches of at most `max_tokens` tokens.

    A single text longer than the budget gets a batch of its own. Longest first, so that memory peaks at the start and
    not at the end of a long run.

    Args:
        token_ids: The ids of each text.
        max_tokens: The token budget of a batch.

    Yields:
        Batches that together hold every text exactly once.
    """
    lengths = np.fromiter((len(ids) for ids in token_ids), dtype=np.int64, count=len(token_ids))
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        totals = np.cumsum(lengths[order[start : start + max_tokens]])
        count = max(1, int(np.searchsorted(totals, max_tokens, side="right")))
        rows = order[start : start + count]
        packed = np.concatenate([np.asarray(token_ids[row], dtype=np.int64) for row in rows])
        yield Batch(packed, np.concatenate([[0], totals[:count]]), rows)
        start += count


def special_token_ids(tokenizer: Tokenizer, names: Iterable[str | None]) -> frozenset[int]:
    """Return the ids of the named special tokens that the tokenizer knows."""
    ids = (tokenizer.token_to_id(name) for name in names if name)
    return frozenset(token_id for token_id in ids if token_id is not None)
