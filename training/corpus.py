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

import zstandard


class Pair(NamedTuple):
    """Two texts that belong together: a question and its passage, or a sentence and its translation."""

    source: str
    first: str
    second: str


def lines(path: Path) -> Iterator[str]:
    """Read a compressed file line by line."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield line.rstrip("\n")


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every single text as (source, text); the source is ``part/file`` without its endings."""
    for part in ("mono", "parallel", "qa_pairs", "queries"):
        for path in sorted((folder / part).glob("*.zst")):
            source = f"{part}/{path.name.split('.txt')[0].split('.tsv')[0]}"
            for line in lines(path):
                if part == "parallel":
                    first_language, second_language, first, second = line.split("\t")
                    yield f"{source}.{first_language}", first
                    yield f"{source}.{second_language}", second
                elif part == "qa_pairs":
                    for text in line.split("\t"):
                        yield source, text
                else:
                    yield source, line


def question_pairs(folder: Path) -> Iterator[Pair]:
    """Yield question-passage pairs."""
    for path in sorted((folder / "qa_pairs").glob("*.tsv.zst")):
        for line in lines(path):
            question, passage = line.split("\t")
            yield Pair(path.name.removesuffix(".tsv.zst"), question, passage)


def translation_pairs(folder: Path) -> Iterator[Pair]:
    """Yield translation pairs."""
    for path in sorted((folder / "parallel").glob("*.tsv.zst")):
        for line in lines(path):
            first_language, second_language, first, second = line.split("\t")
            yield Pair(f"{path.name.removesuffix('.tsv.zst')}.{first_language}-{second_language}", first, second)
