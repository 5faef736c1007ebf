"""Reading the training folder: sentences, translation pairs, question-passage pairs, queries.

Layout, every file zstd-compressed UTF-8 with one record a line:

    mono/LANG.txt.zst            a sentence or passage
    parallel/NAME.tsv.zst        lang1, lang2, text1, text2
    qa_pairs/NAME.LANG.tsv.zst   question, passage
    queries/LANG.txt.zst         a question or search query
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """Two texts that belong together: a question and its passage, or a sentence and its translation."""

    source: str
    first_language: str
    first: str
    second_language: str
    second: str


def lines(path: Path) -> Iterator[str]:
    """Read a compressed file line by line."""
    import zstandard  # only here: what is packed can be trained on without it

    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield line.rstrip("\n")


def texts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield every single text as (source, language, text); the source is ``part/name``."""
    for part in ("mono", "queries"):
        for path in sorted((folder / part).glob("*.txt.zst")):
            for line in lines(path):
                yield part, path.name.removesuffix(".txt.zst"), line
    for pair in question_pairs(folder):
        yield pair.source, pair.first_language, pair.first
        yield pair.source, pair.second_language, pair.second
    for pair in translation_pairs(folder):
        source = pair.source.rpartition(".")[0]
        yield source, pair.first_language, pair.first
        yield source, pair.second_language, pair.second


def question_pairs(folder: Path) -> Iterator[Pair]:
    """Yield question-passage pairs, source ``qa_pairs/NAME``."""
    for path in sorted((folder / "qa_pairs").glob("*.tsv.zst")):
        name, language = path.name.removesuffix(".tsv.zst").split(".")
        for line in lines(path):
            question, passage = line.split("\t")
            yield Pair(f"qa_pairs/{name}", language, question, language, passage)


def translation_pairs(folder: Path) -> Iterator[Pair]:
    """Yield translation pairs, source ``parallel/NAME.LANG1-LANG2``."""
    for path in sorted((folder / "parallel").glob("*.tsv.zst")):
        for line in lines(path):
            first_language, second_language, first, second = line.split("\t")
            source = f"parallel/{path.name.removesuffix('.tsv.zst')}.{first_language}-{second_language}"
            yield Pair(source, first_language, first, second_language, second)
