"""Documents in, synchronised collection out: files and folders are read, split into chunks, encoded and stored.

The collection itself is the only state. Every chunk carries, in its metadata,

- ``source``: where the document comes from, the absolute path of a file,
- ``chunk``: its number within the document, from 0,
- ``chunks``: how many the document has,
- ``document_digest``: a digest of the whole document and of how it was split,
- ``heading``: in Markdown, the heading in force where the chunk begins; absent without one,

and its id is made of source and number. So a second run can tell what is unchanged, changed, half-written or gone
without a file beside the database, and an interrupted run is completed by repeating it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from gte_rag.chroma import HybridCollection
from gte_rag.encoder import GTEEncoder
from gte_rag.errors import missing_extra
from gte_rag.records import MetadataValue

try:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
except ImportError as error:
    raise missing_extra("semantic-text-splitter", "cli") from error

MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
TEXT_SUFFIXES = MARKDOWN_SUFFIXES | {".txt", ".text", ".rst"}
STDIN_SOURCE = "<stdin>"
CHUNK_TOKENS = 256
MIN_CHUNK_TOKENS = 16

# Part of every document digest: raise it when documents are split differently, and all are split anew.
_SPLITTING = "2"
# No token of the multilingual vocabularies is longer, so more characters than this a token cannot fit. Asking the tokenizer
# about ever longer prefixes of a word without boundaries (base64, a hash dump) takes quadratic time.
_LONGEST_TOKEN = 16
# Chunks encoded and written together: enough to fill the batches of the device, few enough to lose little when interrupted.
_GROUP = {"cpu": 128}
_GPU_GROUP = 1024
# Documents looked up in the collection together.
_LOOKUP_DOCUMENTS = 64
_LOOKUP_CHARACTERS = 4_000_000
_PAGE = 2000

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")  # what follows backticks has none, or they are code within a line
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*)$")
_HEADING_CHARACTERS = 200


@dataclass(frozen=True)
class Document:
    """A text to be indexed.

    Attributes:
        source: What names it: the absolute path of a file.
        text: The whole text.
        markdown: Whether it is split at Markdown's headings and blocks.
    """

    source: str
    text: str
    markdown: bool = False


@dataclass(frozen=True)
class Failure:
    """A document that could not be read.

    Attributes:
        source: What names it, or the folder whose contents could not be listed.
        reason: Why, and what to do about it.
    """

    source: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What was found in files and folders.

    Attributes:
        files: The files to read, each once.
        failed: Folders that could not be listed, and entries with a suffix of a document that are no files.
        ignored: Number of files in folders whose suffix is not one of `TEXT_SUFFIXES`.
        roots: The absolute path of each file and folder that was named.
        missing: The absolute path of what was named and does not exist. Given to `sync` among the roots, what the collection
            has of it is removed.
    """

    files: tuple[Path, ...]
    failed: tuple[Failure, ...]
    ignored: int
    roots: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A part of a document.

    Attributes:
        text: The part, without white space around it.
        heading: The Markdown heading in force where it begins; empty without one.
    """

    text: str
    heading: str = ""


@dataclass(frozen=True)
class IndexReport:
    """What `sync` did.

    Attributes:
        added: Number of documents that are new in the collection.
        updated: Number of documents that were changed or incomplete and are now as given.
        unchanged: Number of documents that were left alone.
        removed: Number of documents below the roots that were not given any more.
        chunks: Number of chunks encoded and written.
        failed: The documents that could not be read; what the collection had of them is kept.
        empty: Number of documents without any text; the collection holds nothing of them.
    """

    added: int
    updated: int
    unchanged: int
    removed: int
    chunks: int
    failed: tuple[Failure, ...]
    empty: int


Progress: TypeAlias = Callable[[int, int], None]


def sync(
    collection: HybridCollection,
    documents: Iterable[Document | Failure],
    *,
    roots: Sequence[str] = (),
    chunk_tokens: int = CHUNK_TOKENS,
    on_progress: Progress | None = None,
) -> IndexReport:
    """Make a collection hold exactly the given documents below the given roots.

    Documents that are already there are skipped, changed ones replaced, missing ones added. What the collection has below
    a root and was not given is removed; everything else in it is left alone. New chunks are written before the old ones
    they replace are deleted, so an interruption at any moment leaves a collection that can be searched; repeating the call
    completes it.

    Args:
        collection: Where to write.
        documents: Documents with distinct sources, read as they are needed. A `Failure` is passed on to the report, and
            what the collection has of its source, or below it, is kept.
        roots: Sources, or folders of sources, that `documents` covers completely.
        chunk_tokens: Longest chunk in tokens of the collection's encoder, special tokens included.
        on_progress: Called with the number of documents read and the number of chunks written so far.

    Raises:
        TypeError: `chunk_tokens` is not a whole number, `roots` a single string, or the collection's encoder no `GTEEncoder`.
        ValueError: `chunk_tokens` is out of range, or two documents have the same source.
    """
    if isinstance(roots, str):
        raise TypeError(f"roots is the string {roots!r}; give a list of sources")
    encoder = collection.encoder
    if not isinstance(encoder, GTEEncoder):
        raise TypeError(
            f"the collection's encoder is {type(encoder).__name__}; chunks are cut with a GTEEncoder's tokenizer"
        )
    splitter = Splitter(encoder, chunk_tokens=chunk_tokens)
    writer = _Writer(collection, _GROUP.get(encoder.device.type, _GPU_GROUP))
    counts = {"added": 0, "updated": 0, "unchanged": 0, "empty": 0}
    failed: list[Failure] = []
    given: set[str] = set()

    def report_progress() -> None:
        if on_progress is not None:
            on_progress(len(given) + len(failed), writer.written)

    for group in _groups(documents):
        failed += [item for item in group if isinstance(item, Failure)]
        texts = [item for item in group if isinstance(item, Document)]
        stored = _stored(collection, [document.source for document in texts])
        for document in texts:
            if document.source in given:
                raise ValueError(f"{document.source!r} was given twice; every document needs a source of its own")
            given.add(document.source)
            counts[_update(document, stored[document.source], splitter, writer)] += 1
            while writer.is_full:
                writer.write_group()
                report_progress()
        report_progress()
    while writer.has_work:
        writer.write_group()
        report_progress()
    kept = [failure.source for failure in failed]
    vanished = [source for source in _sources(collection) if _below(source, roots)] if roots else []
    vanished = [source for source in vanished if source not in given and not _below(source, kept)]
    _remove(collection, vanished)
    return IndexReport(**counts, removed=len(vanished), chunks=writer.written, failed=tuple(failed))


def select_files(paths: Iterable[str | os.PathLike[str]], *, missing_ok: bool = False) -> Selection:
    """Find the documents in files and folders.

    A file that is named is taken whatever its suffix. A folder is searched with all its folders, sorted by name, for
    files whose suffix is one of `TEXT_SUFFIXES`; hidden files and folders are passed over. Linked folders are followed,
    but none is searched twice, so a loop of links ends.

    Args:
        paths: Files and folders.
        missing_ok: Whether a path that does not exist is reported in `Selection.missing` instead of being an error.

    Raises:
        FileNotFoundError: A path does not exist, and `missing_ok` is False.
    """
    files: dict[str, Path] = {}
    failed: dict[str, Failure] = {}
    ignored = 0
    roots, missing = [], []
    for given in paths:
        root = _absolute(Path(given))
        if not os.path.lexists(root):
            if not missing_ok:
                raise FileNotFoundError(f"{os.fspath(given)!r} does not exist; give files and folders that do")
            missing.append(str(root))
            continue
        roots.append(str(root))
        if not os.path.isdir(root):
            files[str(root)] = root
            continue
        for path in _walk(root, failed):
            if path.suffix.lower() not in TEXT_SUFFIXES:
                ignored += 1
                continue
            reason = _why_not_a_file(path)
            if reason:
                failed[str(path)] = Failure(_printable(path), reason)
            else:
                files[str(path)] = path
    return Selection(tuple(files.values()), tuple(failed.values()), ignored, tuple(roots), tuple(missing))


def read_file(path: Path) -> Document | Failure:
    """Read a UTF-8 text file; what is no UTF-8 text, or cannot be read, is a `Failure`."""
    source = str(path)
    if _printable(path) != source:
        return Failure(_printable(path), "its name is no valid Unicode; rename it")
    try:
        data = path.read_bytes()
    except OSError as error:
        return Failure(source, error.strerror or str(error))
    return _decode(source, data, markdown=path.suffix.lower() in MARKDOWN_SUFFIXES)


def read_stdin(stream: BinaryIO | None = None) -> Document | Failure:
    """Read one plain text from standard input, or from another stream of bytes; its source is ``<stdin>``."""
    return _decode(STDIN_SOURCE, (sys.stdin.buffer if stream is None else stream).read(), markdown=False)


class Splitter:
    """Split documents into chunks that the encoder reads as a whole.

    Borders lie between paragraphs where possible, else between sentences, else between words; in Markdown between
    sections and blocks first. The splitting is that of semantic-text-splitter, the length is counted in the encoder's own
    tokens.
    """

    def __init__(self, encoder: GTEEncoder, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """Set the longest chunk in tokens, special tokens included.

        Raises:
            TypeError: `chunk_tokens` is not a whole number.
            ValueError: `chunk_tokens` is below 16 or above the encoder's `max_length`.
        """
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int):
            raise TypeError(f"chunk_tokens is {chunk_tokens!r}; give a whole number")
        if not MIN_CHUNK_TOKENS <= chunk_tokens <= encoder.max_length:
            raise ValueError(
                f"chunk_tokens is {chunk_tokens}; chunks have {MIN_CHUNK_TOKENS} to {encoder.max_length} tokens, "
                "special tokens included"
            )
        most_characters = chunk_tokens * _LONGEST_TOKEN

        def length(text: str) -> int:
            return len(text) if len(text) > most_characters else encoder.count_tokens(text)

        self.chunk_tokens = chunk_tokens
        self._text = TextSplitter.from_callback(length, chunk_tokens)
        self._markdown = MarkdownSplitter.from_callback(length, chunk_tokens)

    def split(self, document: Document) -> list[Chunk]:
        """Return the chunks of a document in order; none for a document of white space."""
        if not document.markdown:
            return [Chunk(text) for text in self._text.chunks(document.text)]
        headings = list(_headings(document.text))
        chunks = []
        heading, following = "", 0
        for start, text in self._markdown.chunk_indices(document.text):
            while following < len(headings) and headings[following][0] <= start:
                heading = headings[following][1]
                following += 1
            chunks.append(Chunk(text, heading))
        return chunks

    def digest(self, document: Document) -> str:
        """Return 32 hex characters that change with the text and with how it is split."""
        manner = f"{_SPLITTING}:{self.chunk_tokens}:{'markdown' if document.markdown else 'text'}:"
        return hashlib.blake2b((manner + document.text).encode("utf-8"), digest_size=16).hexdigest()


class _Writer:
    """Collects chunks and writes them in groups; a document's old chunks go after its last new one is written."""

    def __init__(self, collection: HybridCollection, size: int) -> None:
        self.written = 0
        self._collection = collection
        self._size = size
        self._waiting: list[tuple[str, str, dict[str, MetadataValue]]] = []
        self._outdated: list[tuple[int, list[str]]] = []  # after how many chunks which ids may go
        self._accepted = 0

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._size

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._outdated)

    def put(self, chunks: Iterable[tuple[str, str, dict[str, MetadataValue]]], outdated: list[str]) -> None:
        before = len(self._waiting)
        self._waiting += chunks
        self._accepted += len(self._waiting) - before
        if outdated:
            self._outdated.append((self._accepted, outdated))

    def write_group(self) -> None:
        group, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        if group:
            ids, texts, metadatas = zip(*group, strict=True)
            self._collection.upsert(ids, texts, metadatas=metadatas)
            self.written += len(group)
        done = [ids for position, ids in self._outdated if position <= self.written]
        self._outdated = [entry for entry in self._outdated if entry[0] > self.written]
        if done:
            self._collection.delete([chunk_id for ids in done for chunk_id in ids])


def _update(
    document: Document, stored: Mapping[int, tuple[object, object]], splitter: Splitter, writer: _Writer
) -> str:
    """Hand what a document lacks in the collection to the writer, and say what becomes of the document."""
    digest = splitter.digest(document)
    if stored and all(stored.get(number) == (digest, len(stored)) for number in range(len(stored))):
        return "unchanged"
    chunks = splitter.split(document)
    source = document.source
    writer.put(
        (
            (
                _chunk_id(source, number),
                chunk.text,
                {
                    "source": source,
                    "chunk": number,
                    "chunks": len(chunks),
                    "document_digest": digest,
                    **({"heading": chunk.heading} if chunk.heading else {}),
                },
            )
            for number, chunk in enumerate(chunks)
            if stored.get(number) != (digest, len(chunks))  # what an interrupted run has written is kept
        ),
        [_chunk_id(source, number) for number in stored if number >= len(chunks)],
    )
    if not chunks:
        return "empty"
    return "updated" if stored else "added"


def _stored(collection: HybridCollection, sources: Sequence[str]) -> dict[str, dict[int, tuple[object, object]]]:
    """Return, for each source, the digest and number of chunks that each of its stored chunks carries."""
    found: dict[str, dict[int, tuple[object, object]]] = {source: {} for source in sources}
    if sources:
        for source, number, metadata in _own_chunks(collection, {"source": {"$in": list(found)}}):
            found[source][number] = (metadata.get("document_digest"), metadata.get("chunks"))
    return found


def _sources(collection: HybridCollection) -> list[str]:
    return [source for source, _, _ in _own_chunks(collection, {"chunk": 0})]


def _remove(collection: HybridCollection, sources: Sequence[str]) -> None:
    for start in range(0, len(sources), _LOOKUP_DOCUMENTS):
        where = {"source": {"$in": list(sources[start : start + _LOOKUP_DOCUMENTS])}}
        numbers = [(source, number) for source, number, _ in _own_chunks(collection, where)]
        # The first chunk is what shows a document to the next run, so it goes last.
        numbers.sort(key=lambda item: -item[1])
        collection.delete([_chunk_id(source, number) for source, number in numbers])


def _own_chunks(collection: HybridCollection, where: dict[str, Any]) -> Iterator[tuple[str, int, Mapping[str, object]]]:
    """Yield source, number and metadata of the records that `sync` wrote; other records are not its business."""
    offset = 0
    while True:
        page = collection.collection.get(where=where, include=["metadatas"], limit=_PAGE, offset=offset)
        for record_id, metadata in zip(page["ids"], page["metadatas"] or [], strict=True):
            source, number = metadata.get("source"), metadata.get("chunk")
            if isinstance(source, str) and isinstance(number, int) and record_id == _chunk_id(source, number):
                yield source, number, metadata
        if len(page["ids"]) < _PAGE:
            return
        offset += _PAGE


def _chunk_id(source: str, number: int) -> str:
    return f"{hashlib.blake2b(source.encode('utf-8'), digest_size=12).hexdigest()}-{number}"


def _groups(documents: Iterable[Document | Failure]) -> Iterator[list[Document | Failure]]:
    """Yield lists of documents that are few and, together, not too long."""
    group: list[Document | Failure] = []
    characters = 0
    for item in documents:
        group.append(item)
        characters += len(item.text) if isinstance(item, Document) else 0
        if len(group) == _LOOKUP_DOCUMENTS or characters >= _LOOKUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _below(source: str, roots: Iterable[str]) -> bool:
    return any(source == root or source.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _is_walked(real: str, root: str) -> bool:
    """Whether a folder without links in its path is read as a part of another one, because no name between them is hidden."""
    if real == root:
        return True
    return _below(real, [root]) and not any(name.startswith(".") for name in os.path.relpath(real, root).split(os.sep))


def _absolute(path: Path) -> Path:
    """Return a folder without links in its path, or a file by its own name in such a folder."""
    return path.resolve() if os.path.isdir(path) else path.parent.resolve() / path.name


def _walk(root: Path, failed: dict[str, Failure]) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden; note the folders that cannot be listed."""

    def note(error: OSError) -> None:
        folder = Path(error.filename)
        failed[str(folder)] = Failure(_printable(folder), error.strerror or str(error))

    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=note):
        enter = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            # A link into the tree leads to what is read under its own name, if no folder on the way is hidden; one to a
            # folder above it never ends.
            leads_back = os.path.islink(path) and (_is_walked(real, str(root)) or _below(str(root), [real]))
            if not name.startswith(".") and real not in seen and not leads_back:
                seen.add(real)
                enter.append(name)
        folders[:] = enter
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _why_not_a_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return error.strerror or str(error)
    return "" if stat.S_ISREG(mode) else "is not a regular file"  # a pipe or a device would be waited for


def _printable(path: Path) -> str:
    """Return a path as text; bytes that are no UTF-8 become replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace") if os.name == "posix" else str(path)


def _decode(source: str, data: bytes, *, markdown: bool) -> Document | Failure:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Failure(source, "is UTF-16; convert it to UTF-8")
    if b"\0" in data:
        return Failure(source, "is binary, not text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Failure(source, f"is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); convert it to UTF-8")
    return Document(source, text.replace("\r\n", "\n").replace("\r", "\n"), markdown)


def _without_closing(title: str) -> str:
    """Return a heading's text without the ``#`` that may close it, which a space sets off."""
    title = title.rstrip(" \t")
    opened = title.rstrip("#")
    return opened.rstrip(" \t") if opened[-1:] in ("", " ", "\t") else title


def _headings(text: str) -> Iterator[tuple[int, str]]:
    """Yield position and text of the headings that are marked with ``#``, outside code."""
    position, fence = 0, ""
    for line in text.split("\n"):
        opening = _FENCE.match(line)
        if fence:
            if opening and opening[1].startswith(fence) and not line[opening.end() :].strip():
                fence = ""
        elif opening:
            fence = opening[1]
        elif (heading := _HEADING.match(line)) and (title := _without_closing(heading[1])):
            yield position, title[:_HEADING_CHARACTERS]
        position += len(line) + 1
