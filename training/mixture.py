"""What a training step sees: single texts, made-up passages, long documents, and pairs with hard negatives.

Most of the training folder is single sentences. A retriever reads passages, so about half of the texts are several of one
language joined; long documents are made the same way. Batches hold texts of about one length, so that attention pads little.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import corpus
import numpy as np
from scipy.sparse import csr_array
from teacher import tokenize
from tokenizers import Encoding, Tokenizer

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
# The same of pairs: two sources in dozens of languages would outweigh all others.
_PAIRS_WORTH = {"qa_pairs/gnome-help": 0.2, "qa_pairs/tldr-command": 0.1}
_PASSAGES = 0.5  # share of texts that are several joined
_WINDOW = 2048  # texts that are sorted into batches together
_COUNTED = 100_000  # texts of a language in which rarities are counted, at most
_FEWEST = 200  # texts that a language counts for, at least
RARITY_POWER = 0.75  # of a rarity in a sparse weight
_KINDS = {"qa_pairs": 0.7, "parallel": 0.3}  # which pairs to draw


class Text(NamedTuple):
    """A text and its language."""

    language: str
    text: str


def seeded(seed: int) -> random.Random:
    """Return a source of chance that is the same in every run."""
    return random.Random(seed)  # noqa: S311 - not for secrets


class Texts:
    """All single texts, by language and source."""

    def __init__(self, folder: Path, longest: int = 1600) -> None:
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
        self._languages = list(
            accumulate(
                size**LANGUAGE_POWER * _OFTEN.get(lang, 1.0) for lang, size in zip(self.pools, sizes, strict=True)
            )
        )
        self._parts = {
            language: (
                list(parts),
                list(accumulate(len(texts) ** 0.5 * _WORTH.get(part, 1.0) for part, texts in parts.items())),
            )
            for language, parts in self.pools.items()
        }

    def language(self, rng: random.Random) -> str:
        """Draw a language."""
        return rng.choices(self.languages, cum_weights=self._languages)[0]

    def one(self, language: str, rng: random.Random) -> str:
        """Draw a text of a language."""
        parts, weights = self._parts[language]
        return rng.choice(self.pools[language][rng.choices(parts, cum_weights=weights)[0]])

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
        if rng.random() >= _PASSAGES:
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
        drawn = np.diff(self._languages, prepend=0.0)
        for weight, language in zip(drawn, self.pools, strict=True):
            rare = inverse_frequencies[language].astype(np.float64)
            count = max(min(len(self._countable(language)), _COUNTED), _FEWEST)
            share = (
                weight * ((count + 1) ** (1 - rare) - 0.98) / count
            )  # of texts that have the token; a trifle if none has
            total, occurrences = total + share * rare, occurrences + share
        return (total / occurrences).astype(np.float32)


def text_batches(
    texts: Texts, tokenizer: Tokenizer, tokens: int, longest: int, rng: random.Random
) -> Iterator[tuple[list[Text], list[Encoding]]]:
    """Yield texts of about one length and their encodings, without end; a text counts for at most `longest` tokens."""
    while True:
        window = [texts.draw(rng) for _ in range(_WINDOW)]
        encodings = tokenizer.encode_batch([text.text for text in window])
        lengths = [min(len(encoding.ids), longest) for encoding in encodings]
        order = sorted(range(len(window)), key=lambda text: lengths[text])
        ready, start = [], 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and stop < start + 256 and lengths[order[stop]] * (stop + 1 - start) <= tokens:
                stop += 1
            ready.append(order[start:stop])
            start = stop
        rng.shuffle(ready)
        for members in ready:
            yield [window[text] for text in members], [encodings[text] for text in members]


class Pairs:
    """Question-passage and translation pairs, drawn with others that are like them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, fewest: int = 100) -> None:
        """Read the folder; sources with fewer pairs than `fewest` are left out."""
        self.sources: dict[str, dict[str, list[corpus.Pair]]] = {"qa_pairs": {}, "parallel": {}}
        for pair in (*corpus.question_pairs(folder), *corpus.translation_pairs(folder)):
            part = pair.source.split("/")[0]
            if len(pair.first) < 12 or len(pair.second) < 12 or pair.first == pair.second:
                continue
            if part == "parallel" and not pair.source.startswith(
                ("parallel/ntrex", "parallel/tatoeba", "parallel/tico")
            ):
                continue
            name = f"{pair.source}.{pair.second_language}" if part == "qa_pairs" else pair.source
            self.sources[part].setdefault(name, []).append(pair)
        self._weights = {}
        for part, sources in self.sources.items():
            for name in [name for name, pairs in sources.items() if len(pairs) < fewest]:
                del sources[name]
            worth = [_PAIRS_WORTH.get(name.split(".")[0], 1.0) * len(pairs) ** 0.5 for name, pairs in sources.items()]
            self._weights[part] = (list(sources), list(accumulate(worth)))
        self._tokenizer = tokenizer
        self._indices: dict[str, csr_array] = {}

    def _index(self, name: str, pairs: Sequence[corpus.Pair]) -> csr_array:
        if name not in self._indices:
            ids = tokenize(self._tokenizer, [pair.second[:1600] for pair in pairs], 256)
            rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
            matrix = csr_array((np.ones(len(rows), np.float32), (rows, np.concatenate(ids))))
            matrix.sum_duplicates()
            rare = np.log(len(pairs) / (1 + np.bincount(matrix.indices, minlength=matrix.shape[1]))).clip(0)
            matrix.data = np.sqrt(matrix.data) * rare[matrix.indices].astype(np.float32)
            norms = np.sqrt(matrix.multiply(matrix).sum(1)) + 1e-6
            matrix.data /= np.repeat(norms, np.diff(matrix.indptr))
            self._indices[name] = matrix
        return self._indices[name]

    def draw(self, size: int, rng: random.Random) -> list[corpus.Pair]:
        """Draw pairs of one source, in groups that share words; no passage comes twice."""
        part = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        names, weights = self._weights[part]
        name = rng.choices(names, cum_weights=weights)[0]
        pairs = self.sources[part][name]
        matrix = self._index(name, pairs)
        chosen: dict[str, corpus.Pair] = {}
        for _ in range(20):
            anchor = rng.randrange(len(pairs))
            similar = np.asarray((matrix @ matrix[[anchor]].T).todense()).ravel()
            near = np.argsort(-similar, kind="stable")[:60].tolist()
            group = [anchor, *rng.sample(near, min(len(near), 11))]
            for i in group:
                if len(chosen) < size:
                    chosen.setdefault(pairs[i].second, pairs[i])
            if len(chosen) == size:
                break
        return list(chosen.values())


def long_document(texts: Texts, tokens: int, rng: random.Random) -> list[str]:
    """Return the parts, all of one language, of a document of about so many tokens."""
    return texts.joined(texts.language(rng), tokens * 3, rng)
