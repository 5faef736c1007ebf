"""Where a text shows the tokens it was found by, for people to see."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

from gte_rag.encoder import GTEEncoder

_EXCERPT_CHARACTERS = 400
_WORD_CHARACTERS = 20  # an excerpt is cut between words if a space is as near as this
_SCRIPTS_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "BOPOMOFO")


def matching_spans(encoder: GTEEncoder, text: str, tokens: Collection[str]) -> list[tuple[int, int]]:
    """Return where a text holds one of the tokens, as the model's tokenizer cuts it.

    A word that is matched by half or more is marked whole. Of other words only a beginning of three letters or more is
    marked: a syllable in the middle says nothing to the eye.
    """
    return [(start, end) for start, end, _ in weighted_spans(encoder, text, dict.fromkeys(tokens, 0.0))]


def weighted_spans(encoder: GTEEncoder, text: str, tokens: Mapping[str, float]) -> list[tuple[int, int, float]]:
    """Return the spans of `matching_spans`, each with the largest weight among the tokens found in it."""
    encoding = encoder.tokenizer.encode(text)
    marked = [False] * len(text)
    weights = [0.0] * len(text)
    for string, (start, end) in zip(encoder.token_strings(encoding.ids), encoding.offsets, strict=True):
        if string in tokens and any(character.isalnum() for character in string):
            marked[start:end] = [not character.isspace() for character in text[start:end]]
            weights[start:end] = [tokens[string]] * (end - start)
    for word in re.finditer(r"\w+", text):
        start, end = word.span()
        if not any(marked[start:end]) or _is_written_without_spaces(word[0]):
            continue
        if 2 * sum(marked[start:end]) >= end - start:
            marked[start:end] = [True] * (end - start)
        else:
            beginning = [*marked[start:end], False].index(False)
            beginning = beginning if beginning >= 3 else 0
            marked[start:end] = [True] * beginning + [False] * (end - start - beginning)
    spans, place = [], 0
    for is_marked, run in itertools.groupby(marked):
        end = place + len(list(run))
        if is_marked:
            spans.append((place, end, max(weights[place:end])))
        place = end
    return spans


def _is_written_without_spaces(word: str) -> bool:
    return any(unicodedata.name(character, "").startswith(_SCRIPTS_WITHOUT_SPACES) for character in word)


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return start and end of the part of a text, at most `_EXCERPT_CHARACTERS` long, that holds most of the spans."""
    if len(text) <= _EXCERPT_CHARACTERS:
        return 0, len(text)

    def covered(start: int) -> int:
        return sum(last - first for first, last in spans if start <= first and last <= start + _EXCERPT_CHARACTERS)

    starts = [0, *(max(0, first - _EXCERPT_CHARACTERS // 8) for first, _ in spans)]
    start = min(max(starts, key=covered), len(text) - _EXCERPT_CHARACTERS)
    end = start + _EXCERPT_CHARACTERS
    if start and (space := re.search(r"\s+", text[start : start + _WORD_CHARACTERS])):
        start += space.end()
    if end < len(text) and (space := re.search(r"\s+\S*$", text[end - _WORD_CHARACTERS : end])):
        end -= _WORD_CHARACTERS - space.start()
    return start, end
