"""Labelled data sets as files: retrieval in BEIR's layout, bitext and sentence similarity as tab-separated lines.

What a path holds is told by its content:

- a folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv`` or ``qrels/test.tsv`` is a `RetrievalSet`;
- a ``.tsv`` file of two columns, a sentence and its translation, is a `BitextSet`;
- a ``.tsv`` file of three columns, a number and two sentences, is a `SimilaritySet`.

Every file may be gzipped (``.gz``). Nothing is fetched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

_ACCEPTED = (
    "a folder with corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/test.tsv), a .tsv file of two columns (sentence, "
    "translation) or of three (score, sentence, sentence), each plain or .gz, or a folder of such folders and files"
)
_TSV = (".tsv", ".tsv.gz")
_LARGEST_GRADE = 10_000  # of a judgement; real ones are below ten


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Passages, queries and which passage answers which query.

    Attributes:
        name: Name of the set.
        corpus: Text of each passage by its id, the title before it.
        queries: Text of each query by its id; every one has a passage of grade 1 or more.
        qrels: For each query id the grade of each judged passage id, at most 10,000; 0 and less is not relevant. A relevant
            passage that the corpus lacks counts as not found, as with trec_eval.
    """

    name: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    def __post_init__(self) -> None:
        """Check that there is something to search and that every query can be judged."""
        if not self.corpus or not self.queries:
            raise ValueError(f"{self.name} has {len(self.corpus)} passages and {len(self.queries)} judged queries")
        for query in self.queries:
            if not any(grade > 0 for grade in self.qrels.get(query, {}).values()):
                raise ValueError(f"{self.name}: query {query!r} has no passage of grade 1 or more; leave it out")
            for passage, grade in self.qrels[query].items():
                if abs(grade) > _LARGEST_GRADE:  # trec_eval keeps a count of every grade up to the largest
                    raise ValueError(
                        f"{self.name}: query {query!r} grades {passage!r} with {grade}; the largest grade is {_LARGEST_GRADE}"
                    )

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    def sample(self, count: int, *, seed: int = 0) -> RetrievalSet:
        """Return the set with at most `count` queries, chosen by seed and query id alone; the corpus stays whole."""
        kept = _sampled(list(self.queries), count, seed)
        return replace(self, queries={query: self.queries[query] for query in kept})


@dataclass(frozen=True, eq=False)
class BitextSet:
    """Sentences and their translations.

    Attributes:
        name: Name of the set.
        sources: The sentences.
        targets: The translation of each.
    """

    name: str
    sources: Sequence[str]
    targets: Sequence[str]

    def __post_init__(self) -> None:
        """Check that there are pairs."""
        if not self.sources or len(self.sources) != len(self.targets):
            raise ValueError(f"{self.name} has {len(self.sources)} sentences and {len(self.targets)} translations")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.sources)

    def sample(self, count: int, *, seed: int = 0) -> BitextSet:
        """Return at most `count` of the pairs. Fewer pairs are an easier task: compare sets of one size only."""
        rows = _sampled([f"{row}" for row in range(len(self))], count, seed)
        return replace(self, sources=[self.sources[int(r)] for r in rows], targets=[self.targets[int(r)] for r in rows])


@dataclass(frozen=True, eq=False)
class SimilaritySet:
    """Pairs of sentences with people's judgement of how similar they are (STS).

    Attributes:
        name: Name of the set.
        scores: The judgements, higher is more similar.
        firsts: One sentence of each pair.
        seconds: The other one.
    """

    name: str
    scores: Sequence[float]
    firsts: Sequence[str]
    seconds: Sequence[str]

    def __post_init__(self) -> None:
        """Check that there are enough pairs, and judgements that differ, to correlate with."""
        if not len(self.scores) == len(self.firsts) == len(self.seconds):
            raise ValueError(
                f"{self.name} has {len(self.scores)} scores for {len(self.firsts)} and {len(self.seconds)} sentences"
            )
        if len(set(self.scores)) < 2:
            raise ValueError(f"{self.name} has {len(self.scores)} pairs whose scores do not differ; give at least two")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.scores)

    def sample(self, count: int, *, seed: int = 0) -> SimilaritySet:
        """Return at most `count` of the pairs, chosen by seed and position alone."""
        rows = [int(row) for row in _sampled([f"{row}" for row in range(len(self))], count, seed)]
        columns = ([column[row] for row in rows] for column in (self.scores, self.firsts, self.seconds))
        scores, firsts, seconds = columns
        return SimilaritySet(self.name, scores, firsts, seconds)  # type: ignore[arg-type]  # mixed columns


Dataset: TypeAlias = RetrievalSet | BitextSet | SimilaritySet


def find(path: str | os.PathLike[str]) -> list[Path]:
    """Return the data sets at a path: the path itself, or those in the folder and its subfolders, in order of their names.

    A folder that links lead to again is read once.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: There is no data set at it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give {_ACCEPTED}")
    found = sorted(_found(path, set()))
    if not found:
        raise ValueError(f"{path} holds no data set; give {_ACCEPTED}")
    return found


def names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each data set: that of its file or folder, and as many folders above it as tell it from the others."""
    parts = [(*_absolute(path).parts[:-1], _name(path)) for path in paths]
    found = [one[-1] for one in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        repeated = {name for name in found if found.count(name) > 1}
        if not repeated:
            break
        found = ["/".join(one[-length:]) if name in repeated else name for name, one in zip(found, parts, strict=True)]
    return found


def _name(path: Path) -> str:
    name = _absolute(path).name
    return name.removesuffix(".gz").removesuffix(".tsv") if path.is_file() else name


def _absolute(path: Path) -> Path:
    """Return a path with a name, which ``.`` has not; a link keeps its own."""
    return Path(os.path.abspath(path))


def load(path: str | os.PathLike[str], *, name: str | None = None) -> Dataset:
    """Read one data set.

    Args:
        path: A folder in BEIR's layout, or a ``.tsv`` or ``.tsv.gz`` file.
        name: Its name; None is that of the file or folder.

    Returns:
        What the content says it is; its name is that of the folder or file.

    Warns:
        UserWarning: Relevant passages are not in the corpus.

    Raises:
        FileNotFoundError: There is nothing at the path, or a file of the layout is missing.
        ValueError: It is no data set, or a line of it cannot be read; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give {_ACCEPTED}")
    name = _name(path) if name is None else name
    if path.is_dir():
        return _load_retrieval(path, name)
    if not path.name.endswith(_TSV):
        raise ValueError(f"{path} is no data set; give {_ACCEPTED}")
    return _load_pairs(path, name)


def _found(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the data sets at a path; `seen` are the folders that were looked at, without links."""
    if path.is_file():
        yield path  # whatever it is: `load` says what is wrong with it
        return
    real = path.resolve()
    if real in seen:
        return
    seen.add(real)
    if _is_retrieval(path):
        yield path
        return
    for child in sorted(path.iterdir(), key=lambda child: (child.is_symlink(), child)):  # folders before links to them
        if child.is_dir() or child.name.endswith(_TSV):
            yield from _found(child, seen)


def _is_retrieval(folder: Path) -> bool:
    return _existing(folder, "corpus.jsonl") is not None


def _existing(folder: Path, *names: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in (".gz", ""))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _load_retrieval(folder: Path, name: str) -> RetrievalSet:
    files = {}
    for part, accepted in (
        ("corpus", ("corpus.jsonl",)),
        ("queries", ("queries.jsonl",)),
        ("qrels", ("qrels.tsv", "qrels/test.tsv")),
    ):
        file = _existing(folder, *accepted)
        if file is None:
            raise FileNotFoundError(f"{folder} has no {' or '.join(accepted)}, plain or .gz; give {_ACCEPTED}")
        files[part] = file
    corpus = _read_texts(files["corpus"])
    texts = _read_texts(files["queries"])
    qrels = _read_qrels(files["qrels"])
    queries = {query: text for query, text in texts.items() if any(g > 0 for g in qrels.get(query, {}).values())}
    if not queries:
        raise ValueError(f"{files['qrels']} judges no query of {files['queries']} relevant to any passage")
    _check_judged(files, corpus, [qrels[query] for query in queries])
    return RetrievalSet(name, corpus, queries, {query: qrels[query] for query in queries})


def _check_judged(
    files: Mapping[str, Path], corpus: Mapping[str, str], judgements: Iterable[Mapping[str, int]]
) -> None:
    """Warn of relevant passages that the corpus lacks; refuse judgements that name no passage of it."""
    relevant = list(dict.fromkeys(passage for judged in judgements for passage, grade in judged.items() if grade > 0))
    missing = [passage for passage in relevant if passage not in corpus]
    if corpus and len(missing) == len(relevant):
        raise ValueError(
            f"none of the {len(relevant):,} relevant passages of {files['qrels']}, such as {relevant[0]!r}, is in "
            f"{files['corpus']}, whose ids are like {next(iter(corpus))!r}; judgements must name passages by these ids"
        )
    if missing:
        warnings.warn(
            f"{len(missing):,} of {len(relevant):,} relevant passages of {files['qrels']}, such as {missing[0]!r}, are not in "
            f"{files['corpus'].name} and count as not found",
            stacklevel=4,
        )


def _read_texts(file: Path) -> dict[str, str]:
    """Read ``{"_id": …, "title": …, "text": …}`` a line; the title, if there is one, comes before the text."""
    texts: dict[str, str] = {}
    for where, line in _lines(file):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("_id"), str):
            raise ValueError(f'{where} must be an object like {{"_id": "a string", "title": "", "text": "…"}}')
        title, text = record.get("title") or "", record.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise ValueError(f"{where}: text must be a string, and title a string if it is there")
        if record["_id"] in texts:
            raise ValueError(f"{where} repeats the id {record['_id']!r}; each may occur once")
        texts[record["_id"]] = f"{title} {text}".strip()
    return texts


def _read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read query id, passage id and grade, separated by tabs; the first line may be a header."""
    qrels: dict[str, dict[str, int]] = {}
    for number, (where, line) in enumerate(_lines(file)):
        columns = line.split("\t")
        grade = _number(columns[2]) if len(columns) == 3 else math.nan
        if math.isnan(grade) and number == 0 and len(columns) == 3:
            continue
        if not grade.is_integer():
            raise ValueError(
                f"{where} must be query id, passage id and a whole number, separated by tabs: {line[:80]!r}"
            )
        qrels.setdefault(columns[0], {})[columns[1]] = int(grade)
    return qrels


def _load_pairs(file: Path, name: str) -> BitextSet | SimilaritySet:
    rows = [(where, line.split("\t")) for where, line in _lines(file)]
    if not rows:
        raise ValueError(f"{file} is empty; give {_ACCEPTED}")
    width = len(rows[-1][1])
    if width not in (2, 3):
        raise ValueError(f"{rows[-1][0]} has {width} columns; give {_ACCEPTED}")
    for where, columns in rows:
        if len(columns) != width:
            raise ValueError(f"{where} has {len(columns)} columns and the last line {width}; all must have the same")
    if width == 2:
        return BitextSet(name, [columns[0] for _, columns in rows], [columns[1] for _, columns in rows])
    if math.isnan(_number(rows[0][1][0])):
        rows = rows[1:]  # a header
    for where, columns in rows:
        if not math.isfinite(_number(columns[0])):
            raise ValueError(f"{where} starts with {columns[0][:40]!r}; of three columns the first must be a number")
    scores, firsts, seconds = ([columns[place] for _, columns in rows] for place in range(3))
    return SimilaritySet(name, [_number(score) for score in scores], firsts, seconds)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each line that is not empty, and where it stands."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text:
                    yield f"{file}, line {number},", text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}); convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no intact gzip file: {error}") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _sampled(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """Return the `count` ids with the lowest hash, in their own order: the same on every machine and version."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count is {count!r}; give a whole number")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    ids = list(ids)

    def digest(name: str) -> bytes:
        return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    kept = set(sorted(ids, key=digest)[:count])
    return [name for name in ids if name in kept]
