"""The training folder's texts: how often each language and source is drawn, and how rare tokens are in it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import corpus
import numpy as np
from teacher import tokenize
from tokenizers import Tokenizer

LANGUAGE_POWER = 0.5  # a language is drawn by its number of texts to this power
# Languages that many questions and passages are written in.
_OFTEN = dict.fromkeys(
    (
        "ar",
        "de",
        "el",
        "es",
        "fa",
        "fr",
        "hi",
        "id",
        "it",
        "ja",
        "ko",
        "pt",
        "ro",
        "ru",
        "th",
        "tr",
        "vi",
        "zh",
        "zh-Hant",
    ),
    1.6,
) | {"en": 4.0}
# Of a language, sources are drawn by their size to the power 0.5, times this.
_WORTH = {"mono": 2.0, "queries": 1.5, "qa_pairs": 4.0, "parallel/ntrex128": 2.5, "parallel/tico19": 2.0}
CHARACTERS = 1600  # of a text, at most
PASSAGES = 0.5  # share of texts that are several joined
_COUNTED = 100_000  # texts of a language in which rarities are counted, at most
_FEWEST = 200  # texts that a language counts for, at least
RARITY_POWER = 0.75  # of a rarity in a sparse weight


class Text(NamedTuple):
    """A text and its language."""

    language: str
    text: str


def seeded(seed: int) -> random.Random:
    """Return a source of chance that is the same in every run."""
    return random.Random(seed)  # noqa: S311 - not for secrets


class Texts:
    """All single texts, by language and source."""

    def __init__(self, folder: Path, longest: int = CHARACTERS) -> None:
        """Read the folder; texts are cut to `longest` characters."""
        pools: dict[str, dict[str, set[str]]] = {}
        for source, language, text in corpus.texts(folder):
            part = source if source in _WORTH else source.split("/")[0]
            pools.setdefault(language, {}).setdefault(part, set()).add(text[:longest])
        self.pools = {
            language: {part: sorted(pools[language][part]) for part in sorted(pools[language])}
            for language in sorted(pools)
        }
        self.languages = list(self.pools)
        sizes = [sum(map(len, parts.values())) for parts in self.pools.values()]
        # How often to draw each language, and each source of it.
        self._languages = [
            size**LANGUAGE_POWER * _OFTEN.get(lang, 1.0) for lang, size in zip(self.pools, sizes, strict=True)
        ]
        self._parts = {
            language: {part: len(texts) ** 0.5 * _WORTH.get(part, 1.0) for part, texts in parts.items()}
            for language, parts in self.pools.items()
        }

    def shares(self) -> dict[str, dict[str, float]]:
        """Return how often to draw from each source of each language; all add up to 1."""
        every = sum(self._languages)
        return {
            language: {part: worth / sum(parts.values()) * weight / every for part, worth in parts.items()}
            for (language, parts), weight in zip(self._parts.items(), self._languages, strict=True)
        }

    def language(self, rng: random.Random) -> str:
        """Draw a language."""
        return rng.choices(self.languages, self._languages)[0]

    def one(self, language: str, rng: random.Random) -> str:
        """Draw a text of a language."""
        parts = self._parts[language]
        return rng.choice(self.pools[language][rng.choices(list(parts), list(parts.values()))[0]])

    def joined(self, language: str, characters: int, rng: random.Random) -> list[str]:
        """Draw texts of a language until there are so many characters."""
        parts, total = [], 0
        while total < characters:
            parts.append(self.one(language, rng))
            total += len(parts[-1]) + 1
        return parts

    def draw(self, rng: random.Random) -> Text:
        """Draw a text, or a passage made of several."""
        language = self.language(rng)
        if rng.random() >= PASSAGES:
            return Text(language, self.one(language, rng))
        dense = language in ("ja", "ko", "th", "yue", "zh", "zh-Hant")  # scripts that say more in fewer characters
        characters = int(rng.triangular(100, 1400, 700) / (2.5 if dense else 1))
        return Text(language, " ".join(self.joined(language, characters, rng)))

    def inverse_frequencies(self, tokenizer: Tokenizer, most: int = _COUNTED) -> dict[str, np.ndarray]:
        """Return for each language how rare every token is: 0 in every text, 1 in none; float32, shape (vocabulary,)."""
        rng = seeded(0)
        rare = {}
        for language in self.pools:
            texts = self._countable(language)
            chosen = rng.sample(texts, min(len(texts), most))
            found = np.zeros(tokenizer.get_vocab_size(), dtype=np.float64)
            for ids in tokenize(tokenizer, chosen):
                found[list(set(ids))] += 1
            count = max(len(chosen), _FEWEST)
            rare[language] = (np.log((count + 1) / (found + 1)) / np.log(count + 1)).astype(np.float32)
        return rare

    def _countable(self, language: str) -> list[str]:
        """Return the texts in which a language's tokens are counted: those that are no translations, if there are any."""
        parts = self.pools[language]
        return [text for part, texts in parts.items() if part != "parallel" for text in texts] or parts["parallel"]

    def usual_rarity(self, inverse_frequencies: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how rare every token is where it occurs: the mean over languages by how often they show it.

        Args:
            inverse_frequencies: From the method of that name.

        Returns:
            float32, shape (vocabulary,), from 0 to 1; 1 for tokens that never occur.
        """
        total = occurrences = np.zeros(len(next(iter(inverse_frequencies.values()))))
        for weight, language in zip(self._languages, self.pools, strict=True):
            rare = inverse_frequencies[language].astype(np.float64)
            count = max(min(len(self._countable(language)), _COUNTED), _FEWEST)
            share = (
                weight * ((count + 1) ** (1 - rare) - 0.98) / count
            )  # of texts that have the token; a trifle if none has
            total, occurrences = total + share * rare, occurrences + share
        return (total / occurrences).astype(np.float32)
