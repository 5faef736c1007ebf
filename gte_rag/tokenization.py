"""Texts in, packed token batches out.

A batch holds whole texts one after the other without padding, so the cost of a batch is its number of tokens and nothing
else. Texts are sorted by length and cut into batches under a token budget; `Batch.rows` remembers where each came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

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
        check_unicode(text, f"texts[{position}]")
    return checked


def check_unicode(text: str, where: str) -> None:
    """Refuse a text that no encoding can write; `where` names it in the message.

    Raises:
        ValueError: The text holds a lone surrogate.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate {text[error.start]!r} at character {error.start}, which is no valid Unicode; "
            "repair it, for example with text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None


def check_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs as a list, or refuse what is not a list of pairs of encodable strings.

    Raises:
        TypeError: Something else than a list was given, or an item is not a pair of strings.
        ValueError: A text holds a lone surrogate, which no encoding can write.
    """
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise TypeError(f"pairs is {type(pairs).__name__}; give a list of (query, document) tuples")
    checked: list[tuple[str, str]] = []
    for position, pair in enumerate(pairs):
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs[{position}] is {pair!r:.80}; every pair must be a (query, document) tuple")
        try:
            query, document = check_texts(pair)
        except (TypeError, ValueError) as error:
            raise type(error)(f"pairs[{position}]: {error}") from None
        checked.append((query, document))
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


@dataclass(frozen=True)
class PairTemplate:
    """How a tokenizer joins two texts, ``<s> first </s> </s> second </s>`` for example.

    Attributes:
        specials: Ids of the special tokens before, between and after the texts.
        type_ids: Token types of the five parts: specials, first text, specials, second text, specials.
    """

    specials: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    type_ids: tuple[int, int, int, int, int]

    @property
    def num_specials(self) -> int:
        """Number of special tokens around a pair."""
        return sum(map(len, self.specials))


def pair_template(tokenizer: Tokenizer) -> PairTemplate:
    """Read the template off the tokenizer's own encoding of a pair.

    Raises:
        ValueError: The tokenizer does not put a pair's two texts, in order, between special tokens.
    """
    probe = tokenizer.encode("a", "a")
    tokens = zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True)
    parts = [(key, [token[1:] for token in group]) for key, group in groupby(tokens, key=lambda token: token[0])]
    type_ids = [{type_id for _, type_id in part} for _, part in parts]
    if [key for key, _ in parts] != [None, 0, None, 1, None] or any(len(types) > 1 for types in type_ids):
        raise ValueError("the tokenizer does not join two texts with special tokens before, between and after them")
    first, between, last = (tuple(token_id for token_id, _ in parts[index][1]) for index in (0, 2, 4))
    one, two, three, four, five = (types.pop() for types in type_ids)
    return PairTemplate((first, between, last), (one, two, three, four, five))


def shorten_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text to keep so that both fit: the longer one is cut first.

    A text of at most half the room stays whole; if both are longer, each gets half, and the longer one the odd token. This is
    the strategy ``longest_first`` of `tokenizers`, which ``truncation=True`` means in the reference.

    Args:
        first: Tokens of the first text.
        second: Tokens of the second text.
        room: Tokens for both together.
    """
    if first + second <= room:
        return first, second
    half = room // 2
    if min(first, second) <= half:
        return (first, room - first) if first <= second else (room - second, second)
    return (half, room - half) if first <= second else (room - half, half)


def tokenize_pairs(
    tokenizer: Tokenizer, template: PairTemplate, pairs: Sequence[tuple[str, str]], max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Turn pairs of texts into token ids with the special tokens around them; a text that occurs twice is tokenized once.

    Args:
        tokenizer: The checkpoint's tokenizer, without padding or truncation of its own.
        template: What `pair_template` read off this tokenizer.
        pairs: Pairs of checked texts.
        max_length: The longest result in tokens, special tokens included; `shorten_pair` says what a longer pair loses.

    Returns:
        The ids of each pair, the token types of each pair, and how many pairs were cut.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids_of: dict[str, list[int]] = {text: encoding.ids for text, encoding in zip(texts, encoded, strict=True)}
    before, between, after = template.specials
    room = max_length - template.num_specials
    token_ids: list[list[int]] = []
    type_ids: list[list[int]] = []
    truncated = 0
    for pair in pairs:
        first, second = (ids_of[text] for text in pair)
        kept = shorten_pair(len(first), len(second), room)
        truncated += kept != (len(first), len(second))
        parts = (before, first[: kept[0]], between, second[: kept[1]], after)
        token_ids.append([token_id for part in parts for token_id in part])
        type_ids.append(
            [type_id for type_id, part in zip(template.type_ids, parts, strict=True) for _ in range(len(part))]
        )
    return token_ids, type_ids, truncated


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
