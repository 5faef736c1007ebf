"""Files and folders in, a synchronised collection out.

The state lives in the collection itself: every chunk carries the digest of its document and the number of chunks the document
has. A document is up to date when all its chunks are there with the right digest, so a run that was interrupted, at any
moment, leaves a usable index and the next run completes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gte_rag.chroma import HybridCollection
from gte_rag.errors import missing_extra

SUFFIXES = (".txt", ".md", ".markdown")
CHUNK_TOKENS = 256
_MARKDOWN = (".md", ".markdown")
# Chunks encoded and written together.
_GROUP = 512

Splitter = Callable[[str], list[str]]


@dataclass(frozen=True)
class Document:
    """A text to be indexed.

    Attributes:
        source: Where it comes from: an absolute path, or ``"stdin"``.
        text: The whole text.
        markdown: Whether it is split as Markdown.
    """

    source: str
    text: str
    markdown: bool = False


@dataclass
class IndexReport:
    """What a synchronisation did; documents are named by their source.

    Attributes:
        added: Documents that were not in the index.
        updated: Documents that had changed, or were incomplete.
        unchanged: Documents that were up to date.
        removed: Documents that are no longer there.
        empty: Documents without text; the index holds nothing of them.
        failed: Documents that could not be read, with the reason; what the index holds of them is kept.
        chunks: Number of chunks written.
    """

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    chunks: int = 0


@dataclass
class _Stored:
    """What the collection holds of one document: its digests, the chunk count it should have, and the chunk ids."""

    digests: set[str] = field(default_factory=set)
    expected: set[int] = field(default_factory=set)
    ids: list[str] = field(default_factory=list)

    def is_complete(self, digest: str) -> bool:
        return self.digests == {digest} and self.expected == {len(self.ids)}


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that the paths name: themselves, and of folders all text and Markdown files below.

    Hidden files and folders and links to folders are skipped. Sorted, absolute, each once.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A path is neither a file nor a folder.
    """
    found: set[Path] = set()
    for given in paths:
        path = Path(os.path.abspath(Path(given).expanduser()))
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            for folder, subfolders, files in os.walk(path):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                found |= {
                    Path(folder, name)
                    for name in files
                    if not name.startswith(".") and name.lower().endswith(SUFFIXES) and Path(folder, name).is_file()
                }
        elif path.exists():
            raise ValueError(f"{given} is neither a file nor a folder")
        else:
            raise FileNotFoundError(f"{given} does not exist; give files, folders, or - for standard input")
    return sorted(found)


def read_document(path: Path) -> Document:
    """Read a UTF-8 file, with or without byte order mark.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8 text.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); convert it first") from None
    if "\0" in text:
        raise ValueError("holds NUL characters; it looks like a binary file")
    return Document(str(path), text, path.suffix.lower() in _MARKDOWN)


def make_splitters(collection: HybridCollection, chunk_tokens: int) -> tuple[Splitter, Splitter]:
    """Return a splitter for plain text and one for Markdown; both cut at the largest unit of meaning that fits.

    Args:
        collection: Its encoder's tokens are counted.
        chunk_tokens: The longest chunk in tokens, without special tokens.

    Raises:
        ValueError: `chunk_tokens` is out of range.
        MissingExtraError: The splitter is not installed.
    """
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as error:
        raise missing_extra("semantic-text-splitter", "cli") from error
    most = collection.encoder.max_length - 2
    if not 8 <= chunk_tokens <= most:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; give a whole number from 8 to {most}")
    tokenizer = collection.encoder.tokenizer
    plain = TextSplitter.from_huggingface_tokenizer(tokenizer, chunk_tokens)
    markdown = MarkdownSplitter.from_huggingface_tokenizer(tokenizer, chunk_tokens)
    return plain.chunks, markdown.chunks


def synchronise(
    collection: HybridCollection,
    paths: Sequence[str | os.PathLike[str]],
    *,
    extra: Sequence[Document] = (),
    chunk_tokens: int = CHUNK_TOKENS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexReport:
    """Bring a collection up to date with files and folders.

    New and changed documents are split, encoded and written; unchanged ones are skipped; those that vanished from the named
    folders are removed, while documents from elsewhere stay. Can be interrupted at any time and repeated.

    Args:
        collection: Where to.
        paths: Files and folders.
        extra: Further documents, such as standard input.
        chunk_tokens: The longest chunk in tokens.
        on_progress: Called with the number of documents done and in all.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: A path does not exist; nothing was changed.
        ValueError: A path or `chunk_tokens` is unusable; nothing was changed.
    """
    plain, markdown = make_splitters(collection, chunk_tokens)
    files = find_files(paths)
    stored = _stored_documents(collection)
    report = IndexReport()
    total = len(files) + len(extra)
    pending: list[tuple[Document, str, list[str]]] = []
    for done, document in enumerate(_read_all(files, extra, report), start=1):
        if document is not None:
            digest = _digest(f"{chunk_tokens}\0{document.markdown}\0{document.text}")
            before = stored.get(document.source)
            if before is not None and before.is_complete(digest):
                report.unchanged.append(document.source)
            else:
                chunks = (markdown if document.markdown else plain)(document.text)
                pending.append((document, digest, chunks))
                outcome = report.added if before is None else report.updated
                (outcome if chunks else report.empty).append(document.source)
        if sum(len(chunks) for _, _, chunks in pending) >= _GROUP:
            report.chunks += _write(collection, pending, stored)
            pending = []
            on_progress(done, total)
    report.chunks += _write(collection, pending, stored)
    on_progress(total, total)
    report.removed = _remove_vanished(collection, stored, paths, {str(file) for file in files})
    return report


def _read_all(files: Sequence[Path], extra: Sequence[Document], report: IndexReport) -> Iterator[Document | None]:
    """Yield every document, or None for one that cannot be read and is reported."""
    yield from extra
    for file in files:
        try:
            yield read_document(file)
        except (OSError, ValueError) as error:
            report.failed[str(file)] = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            yield None


def _stored_documents(collection: HybridCollection) -> dict[str, _Stored]:
    """Return what the collection holds, by source; records that were not indexed from documents are left alone."""
    stored: dict[str, _Stored] = {}
    page = 5000
    for offset in range(0, collection.count(), page):
        found = collection.collection.get(limit=page, offset=offset, include=["metadatas"])
        for record_id, metadata in zip(found["ids"], found["metadatas"] or [], strict=True):
            source, digest, chunks = ((metadata or {}).get(key) for key in ("source", "document_digest", "chunks"))
            if isinstance(source, str) and isinstance(digest, str) and isinstance(chunks, int):
                entry = stored.setdefault(source, _Stored())
                entry.digests.add(digest)
                entry.expected.add(chunks)
                entry.ids.append(record_id)
    return stored


def _write(
    collection: HybridCollection, pending: Sequence[tuple[Document, str, list[str]]], stored: dict[str, _Stored]
) -> int:
    """Write documents, then delete chunks their former versions had beyond them; return the number of chunks written."""
    ids: list[str] = []
    texts: list[str] = []
    metadatas: list[dict[str, str | int]] = []
    stale: list[str] = []
    for document, digest, chunks in pending:
        own = [f"{_digest(document.source)}-{number:06d}" for number in range(len(chunks))]
        ids += own
        texts += chunks
        metadatas += [
            {"source": document.source, "chunk": number, "chunks": len(chunks), "document_digest": digest}
            for number in range(len(chunks))
        ]
        stale += sorted(set(stored.get(document.source, _Stored()).ids) - set(own))
    collection.upsert(ids, texts, metadatas=metadatas)
    collection.delete(stale)
    return len(ids)


def _remove_vanished(
    collection: HybridCollection,
    stored: dict[str, _Stored],
    paths: Sequence[str | os.PathLike[str]],
    present: set[str],
) -> list[str]:
    folders = [Path(os.path.abspath(Path(path).expanduser())) for path in paths]
    vanished = [
        source
        for source in stored
        if source not in present and any(folder in Path(source).parents for folder in folders)
    ]
    collection.delete([record_id for source in vanished for record_id in stored[source].ids])
    return sorted(vanished)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=10).hexdigest()
