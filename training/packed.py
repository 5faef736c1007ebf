"""The training folder as tensors, and what a step sees, drawn from them.

Texts are kept in the tokens of the student and of the teacher, with a flag where both start a new token (`alignment.py` says
why), so that a step draws its texts by number and gathers their tokens on the device that computes: a GPU waits for no
tokenizer. Texts longer than `LONGEST` tokens of the student are cut where both start a token, so both read the same.

Most of the training folder is single sentences. A retriever reads passages, so about half of the texts are several of one
language joined; long documents are made the same way.

    python training/packed.py --data FOLDER --start start.pt --out corpus.pt      # about ten minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import numpy as np
import torch
from alignment import Spans
from batch import Batch
from mixture import CHARACTERS, PASSAGES, Texts, seeded
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from student import MARKS
from tokenizers import Encoding, Tokenizer
from torch import Tensor

LONGEST, _TEACHERS_LONGEST = 320, 480  # tokens of a text, without special ones
_START = 1 << 20  # flag of a token where both start one
_AT_ONCE = 4000  # texts that are tokenized together
_DIRECTIONS = 32  # of the words of passages, by which like pairs come together
_LEAF = 8  # pairs that are not told apart
_GROUP = 12  # like pairs of a step
_PARTS = 24  # of such a text, at most
_SHORTEST_JOINED, _LONGEST_JOINED = 25, 320  # tokens of it; half as many of each are the most frequent
_CHUNK, _CHUNK_PART = 380, 120  # tokens of the teacher in a part of a long document, and in its parts
_LONG = 9.3, 12.0  # logarithm of a long document's tokens
_KINDS = {"qa_pairs": 0.7, "parallel": 0.3}  # which pairs to draw
# Two sources in dozens of languages would outweigh all others.
_PAIRS_WORTH = {"qa_pairs/gnome-help": 0.2, "qa_pairs/tldr-command": 0.1}
_TRANSLATIONS = ("parallel/ntrex", "parallel/tatoeba", "parallel/tico")  # the others are program messages
_FEWEST = 100  # pairs of a source


class Side(NamedTuple):
    """Texts in the tokens of one network.

    Attributes:
        tokens: int32 (tokens,), ids of all texts in a row, without special ones; flagged with `_START`.
        first: int64 (texts + 1,), where each text begins.
    """

    tokens: Tensor
    first: Tensor


class Drawn(NamedTuple):
    """Texts of a step.

    Attributes:
        mine: In the student's tokens.
        its: In the teacher's; a long document is several texts here.
        spans: Which tokens stand for the same characters.
        language: int64 (texts,), the number of each text's language.
        part_of: int64 (teacher's texts,), the text that each is part of.
    """

    mine: Batch
    its: Batch
    spans: Spans
    language: Tensor
    part_of: Tensor


def pack(folder: Path, student: Tokenizer, teacher: Tokenizer, most: int) -> dict[str, Any]:
    """Read and tokenize the folder.

    Args:
        folder: The training folder.
        student: The student's tokenizer.
        teacher: The teacher's.
        most: Texts of one language and source, at most.

    Returns:
        What `Mixture` reads: plain tensors, lists and strings.
    """
    texts, rng = Texts(folder), seeded(0)
    worth: dict[tuple[str, str], float] = {}  # language and text: how often to draw it
    for language, parts in texts.shares().items():
        for part, share in parts.items():
            pool = texts.pools[language][part]
            chosen = pool if len(pool) <= most else rng.sample(pool, most)
            for text in chosen:
                worth[language, text] = worth.get((language, text), 0.0) + share / len(chosen)
    sources = pair_sources(folder)
    for pairs in sources.values():
        for pair in pairs:
            worth.setdefault((pair.first_language, pair.first), 0.0)
            worth.setdefault((pair.second_language, pair.second), 0.0)
    entries = sorted(worth, key=lambda entry: texts.languages.index(entry[0]))
    mine, its = tokenized([text for _, text in entries], student, teacher)
    weights = torch.tensor([worth[entry] for entry in entries], dtype=torch.float64)
    weights[lengths(mine) == 0] = 0.0
    number = {entry: row for row, entry in enumerate(entries)}
    ordered, names, shares = [], list(sources), []
    for name in names:
        rows = torch.tensor(
            [
                [number[pair.first_language, pair.first], number[pair.second_language, pair.second]]
                for pair in sources[name]
            ]
        )
        rows = rows[(lengths(mine, rows) > 0).all(1)]
        ordered.append(rows[likes_together(mine, rows[:, 1])].int())
        shares.append(_PAIRS_WORTH.get(name.split(".")[0], 1.0) * len(rows) ** 0.5)
    kind = [name.split("/")[0] for name in names]
    total = {one: sum(share for share, its in zip(shares, kind, strict=True) if its == one) for one in set(kind)}
    return {
        "mine": mine._asdict(),
        "its": its._asdict(),
        "languages": texts.languages,
        "language": torch.tensor([texts.languages.index(language) for language, _ in entries], dtype=torch.int16),
        "weights": weights,
        "pairs": torch.cat(ordered),
        "sources": names,
        "pairs_of_source": torch.tensor([len(rows) for rows in ordered]),
        "source_weights": torch.tensor(
            [_KINDS[one] * share / total[one] for share, one in zip(shares, kind, strict=True)]
        ),
    }


def pair_sources(folder: Path) -> dict[str, list[corpus.Pair]]:
    """Return question-passage and translation pairs by source; those of questions also by language."""
    sources: dict[str, list[corpus.Pair]] = {}
    for pair in (*corpus.question_pairs(folder), *corpus.translation_pairs(folder)):
        translation = pair.source.startswith("parallel")
        if len(pair.first) < 12 or len(pair.second) < 12 or pair.first == pair.second:
            continue
        if translation and not pair.source.startswith(_TRANSLATIONS):
            continue
        name = pair.source if translation else f"{pair.source}.{pair.second_language}"
        sources.setdefault(name, []).append(
            pair._replace(first=pair.first[:CHARACTERS], second=pair.second[:CHARACTERS])
        )
    return {name: sources[name] for name in sorted(sources) if len(sources[name]) >= _FEWEST}


def lengths(side: Side, texts: Tensor | slice = slice(None)) -> Tensor:
    """Return how many tokens each of these texts has."""
    return side.first[1:][texts] - side.first[:-1][texts]


def tokenized(texts: Sequence[str], student: Tokenizer, teacher: Tokenizer) -> tuple[Side, Side]:
    """Return texts in the tokens of both; a text that one of them cannot read has no tokens."""
    rows: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = ([], [])
    for start in range(0, len(texts), _AT_ONCE):
        few = list(texts[start : start + _AT_ONCE])
        for mine, its in aligned(*(t.encode_batch(few, add_special_tokens=False) for t in (student, teacher))):
            rows[0].append(mine)
            rows[1].append(its)
    mine, its = (
        Side(
            torch.from_numpy(np.concatenate(side)),
            torch.tensor([0, *np.cumsum([len(row) for row in side])], dtype=torch.int64),
        )
        for side in rows
    )
    return mine, its


def aligned(
    student: Sequence[Encoding], teacher: Sequence[Encoding]
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Yield the flagged tokens of each text in both tokenizations, cut to the same characters."""
    sides = [_read(encodings) for encodings in (student, teacher)]
    both = np.intersect1d(*(places for _, places, _ in sides))
    for ids, places, _ in sides:
        starts = np.diff(places, prepend=-1) != 0
        ids[starts & np.isin(places, both)] |= _START
    ends = [np.cumsum(counts) for _, _, counts in sides]
    for text in range(len(student)):
        mine, its = (
            ids[end[text] - counts[text] : end[text]] for (ids, _, counts), end in zip(sides, ends, strict=True)
        )
        if not len(mine) or not len(its):
            mine, its = mine[:0], its[:0]
        elif len(mine) > LONGEST or len(its) > _TEACHERS_LONGEST:
            starts = np.stack([np.flatnonzero(row & _START) for row in (mine, its)])
            fitting = np.flatnonzero((starts[0] <= LONGEST) & (starts[1] <= _TEACHERS_LONGEST))
            cut = starts[:, fitting[-1]]
            mine, its = mine[: cut[0]], its[: cut[1]]
        yield mine, its


def _read(encodings: Sequence[Encoding]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Return token ids in a row, the number of the character that each starts with, and how many tokens each text has."""
    counts = np.array([len(encoding) for encoding in encodings])
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, total)
    places = np.fromiter((start for encoding in encodings for start, _ in encoding.offsets), np.int64, total)
    places[(np.cumsum(counts) - counts)[counts > 0]] = 0  # every text starts with a token of both
    return ids, places + np.repeat(np.arange(len(counts)) << 32, counts), counts


def likes_together(side: Side, passages: Tensor) -> Tensor:
    """Return an order of passages in which those that share words stand together: a tree over their strongest directions."""
    of = [side.tokens[side.first[row] : side.first[row + 1]].numpy() & (_START - 1) for row in passages.tolist()]
    rows = np.repeat(np.arange(len(of)), [len(ids) for ids in of])
    matrix = csr_array((np.ones(len(rows), np.float32), (rows, np.concatenate(of))))
    matrix.sum_duplicates()
    rare = np.log(len(of) / (1 + np.bincount(matrix.indices, minlength=matrix.shape[1]))).clip(0)
    matrix.data = np.sqrt(matrix.data) * rare[matrix.indices].astype(np.float32)
    norms = np.sqrt(matrix.multiply(matrix).sum(1)) + 1e-6
    matrix.data /= np.repeat(norms, np.diff(matrix.indptr)).astype(np.float32)
    places, sizes, _ = svds(matrix, k=min(_DIRECTIONS, len(of) // 2), random_state=0)
    places = places * sizes

    def ordered(members: NDArray[np.int64]) -> list[int]:
        if len(members) <= _LEAF:
            return members.tolist()
        along = places[members][:, places[members].var(0).argmax()]
        members = members[along.argsort(kind="stable")]
        half = len(members) // 2
        return ordered(members[:half]) + ordered(members[half:])

    return torch.tensor(ordered(np.arange(len(of))))


class Mixture:
    """Draws what steps see, on one device."""

    def __init__(self, packed: dict[str, Any], device: torch.device, seed: int) -> None:
        self.device = device
        self.languages: list[str] = packed["languages"]
        self._mine, self._its = (
            Side(*(packed[side][field].to(device) for field in Side._fields)) for side in ("mine", "its")
        )
        self._language = packed["language"].long().to(device)
        self._cumulated = torch.nn.functional.pad(packed["weights"].cumsum(0), (1, 0)).to(device)
        counts = torch.bincount(packed["language"].long(), minlength=len(self.languages))
        # Of each language, where its texts begin and end among the cumulated weights.
        self._language_ends = self._cumulated[torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device)]
        self._pairs = packed["pairs"].long().to(device)
        ends = packed["pairs_of_source"].cumsum(0)
        self._sources = list(zip((ends - packed["pairs_of_source"]).tolist(), ends.tolist(), strict=True))
        self._source_weights = packed["source_weights"]
        self._random = torch.Generator(device).manual_seed(seed)
        self._choice = torch.Generator().manual_seed(seed)

    def texts(self, tokens: int) -> Drawn:
        """Draw single texts and passages, so many tokens of the student in all at most; on a CPU those of about one length."""
        rows = max(16, tokens // 8)
        parts = self._of_one_language(rows, _PARTS)
        span = _LONGEST_JOINED - _SHORTEST_JOINED
        most = _SHORTEST_JOINED + span * (self._uniform(rows) + self._uniform(rows)) / 2
        most[self._uniform(rows) >= PASSAGES] = 0
        sizes = lengths(self._mine, parts)
        kept = sizes.cumsum(1) <= most[:, None]
        kept[:, 0] = True
        size = (sizes * kept).sum(1) + len(MARKS)
        if self.device.type == "cpu":  # where attention pads
            start = int(torch.randint(rows - 8, (), generator=self._choice))
            order = size.argsort()[start:]
            parts, kept, size = parts[order], kept[order], size[order]
        fitting = max(1, int((size.cumsum(0) <= tokens).sum()))
        parts, kept = parts[:fitting], kept[:fitting]
        row = torch.arange(fitting, device=self.device)[:, None].expand_as(parts)[kept]
        return self._gather(parts[kept], row, row, torch.arange(fitting, device=self.device))

    def pairs(self, tokens: int) -> tuple[Drawn, Drawn]:
        """Draw pairs of one source in groups that share words, so many tokens of the student in all at most.

        No text comes twice on its side.
        """
        start, end = self._sources[int(self._source_weights.multinomial(1, generator=self._choice))]
        rows = int(min(1024, max(2 * _GROUP, tokens // 16)) // _GROUP)
        anchors = torch.randint(
            start, max(start + 1, end - _GROUP), (rows, 1), device=self.device, generator=self._random
        )
        places = (anchors + torch.arange(_GROUP, device=self.device)).clamp(max=end - 1).flatten()
        pairs = self._pairs[places]
        for side in (0, 1):
            pairs = pairs[first_ones(pairs[:, side])]
        size = (lengths(self._mine, pairs) + len(MARKS)).sum(1).cumsum(0)
        pairs = pairs[: max(2, int((size <= tokens).sum()))]
        row = torch.arange(len(pairs), device=self.device)
        first, second = (self._gather(pairs[:, side], row, row, row) for side in (0, 1))
        return first, second

    def long(self, tokens: int) -> Drawn:
        """Draw long documents, all of one length; the teacher's are cut into parts of at most 512 tokens."""
        length = int(2 ** (_LONG[0] + (_LONG[1] - _LONG[0]) * float(torch.rand((), generator=self._choice))))
        rows, columns = max(2, tokens // length), length // 5
        parts = self._of_one_language(rows, columns)
        its = lengths(self._its, parts)
        fitting = its <= _CHUNK_PART
        sizes = lengths(self._mine, parts) * fitting
        kept = fitting & (sizes.cumsum(1) <= length - len(MARKS))
        its = its * kept
        chunk = (its.cumsum(1) - its) // _CHUNK
        row = torch.arange(rows, device=self.device)[:, None].expand_as(parts)
        row, chunk = row[kept], chunk[kept]
        row = row.unique(return_inverse=True)[1]
        which, chunk = (row * columns + chunk).unique(return_inverse=True)
        return self._gather(parts[kept], row, chunk, which // columns)

    def _of_one_language(self, rows: int, columns: int) -> Tensor:
        """Draw texts, (rows, columns); those of a row are of one language."""
        first = self._draw(self._uniform(rows) * self._cumulated[-1])
        begin, end = self._language_ends[self._language[first]], self._language_ends[self._language[first] + 1]
        others = begin[:, None] + self._uniform(rows, columns - 1) * (end - begin)[:, None]
        return torch.cat([first[:, None], self._draw(others)], 1)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self._random, dtype=torch.float64)

    def _draw(self, places: Tensor) -> Tensor:
        """Return the texts at places among the cumulated weights; texts that weigh nothing have none."""
        return torch.searchsorted(self._cumulated, places, right=True).clamp(1, len(self._language)) - 1

    def _gather(self, parts: Tensor, row: Tensor, its_row: Tensor, part_of: Tensor) -> Drawn:
        """Put texts together.

        Args:
            parts: Numbers of texts in the corpus.
            row: The text that each becomes a part of, from 0 on, ascending.
            its_row: The same for the teacher.
            part_of: For each of the teacher's, the text it is a part of.
        """
        mine, spans, count = self._packed(self._mine, parts, row)
        its, its_spans, its_count = self._packed(self._its, parts, its_row)
        assert count == its_count
        language = torch.zeros(len(mine.lengths), dtype=torch.int64, device=self.device)
        language[row] = self._language[parts]
        return Drawn(mine, its, Spans(spans, its_spans, count), language, part_of)

    def _packed(self, side: Side, parts: Tensor, row: Tensor) -> tuple[Batch, Tensor, int]:
        sizes = lengths(side, parts)
        ends = sizes.cumsum(0)
        total, rows = int(ends[-1]), int(row[-1]) + 1
        of = torch.repeat_interleave(torch.arange(len(parts), device=self.device), sizes, output_size=total)
        within = torch.arange(total, device=self.device)
        tokens = side.tokens[(side.first[parts] - ends + sizes)[of] + within]
        places = within + len(MARKS) * row[of] + 1
        size = torch.full((rows,), len(MARKS), device=self.device).index_add(0, row, sizes)
        ids = torch.full((total + len(MARKS) * rows,), MARKS[1], device=self.device)
        ids[size.cumsum(0) - size] = MARKS[0]
        ids[places] = (tokens & (_START - 1)).long()
        span = torch.full_like(ids, -1)
        starts = (tokens >= _START).long().cumsum(0)
        span[places] = starts - 1
        return Batch(ids, size), span, int(starts[-1])


def first_ones(values: Tensor) -> Tensor:
    """Return, in ascending order, where each value comes first."""
    _, which = values.unique(return_inverse=True)
    places = torch.arange(len(values), device=values.device)
    first = torch.full((int(which.max()) + 1,), len(values), device=values.device)
    return first.scatter_reduce(0, which, places, "amin").sort().values


def main() -> None:
    """Write what `distil.py` and `finish.py` read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument(
        "--start", type=Path, required=True, help="what prepare.py wrote: the tokenizers are read from it"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=200_000, help="texts of one language and source")
    args = parser.parse_args()
    start = torch.load(args.start, weights_only=True, mmap=True)
    packed = pack(
        args.data, *(Tokenizer.from_str(start[name]) for name in ("tokenizer", "teacher_tokenizer")), args.most
    )
    torch.save(packed, args.out)
    tokens = [len(packed[side]["tokens"]) for side in ("mine", "its")]
    print(
        f"{len(packed['weights'])} texts, {len(packed['pairs'])} pairs; {tokens[0]} tokens, {tokens[1]} of the teacher's"
    )


if __name__ == "__main__":
    main()
