"""Documents in, synchronised collection out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("chromadb")
pytest.importorskip("semantic_text_splitter")

from chromadb.api import ClientAPI

from gte_rag import GTEEncoder, HybridCollection, HybridRetriever
from gte_rag.indexing import (
    Document,
    Failure,
    IndexReport,
    Splitter,
    read_file,
    read_stdin,
    select_files,
    sync,
)

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names, links or permissions")


@pytest.fixture
def collection(chroma_client: ClientAPI, encoder: GTEEncoder) -> HybridCollection:
    return HybridCollection(chroma_client, f"docs-{uuid4().hex}", encoder=encoder)


def counts(report: IndexReport) -> dict[str, int]:
    """Return the counts that are not 0, without the number of chunks."""
    named = {name: getattr(report, name) for name in ("added", "updated", "unchanged", "removed", "empty")}
    named["failed"] = len(report.failed)
    return {name: count for name, count in named.items() if count}


def texts(collection: HybridCollection) -> dict[str, list[str]]:
    """Return the stored chunks of every source in order."""
    found: dict[str, list[str]] = {}
    for record in sorted(collection.get(), key=lambda record: int(str(record.metadata["chunk"]))):
        found.setdefault(str(record.metadata["source"]), []).append(record.text)
    return found


def long_text(name: str, paragraphs: int) -> str:
    return "\n\n".join(f"Paragraph {number} of {name} tells of bread." for number in range(paragraphs))


def index(collection: HybridCollection, *paths: Path, **options: Any) -> IndexReport:
    selection = select_files(paths)
    documents = [*selection.failed, *map(read_file, selection.files)]
    return sync(collection, documents, roots=selection.roots, **options)


# --- sync --------------------------------------------------------------------------------------------------------------


def test_second_run_writes_nothing(collection: HybridCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("/a.md", "# Bread\n\nFlour and water.", markdown=True), Document("/b.txt", "Quicksort.")]
    assert counts(sync(collection, documents)) == {"added": 2}
    monkeypatch.setattr(collection, "upsert", None)
    report = sync(collection, documents)
    assert counts(report) == {"unchanged": 2}
    assert report.chunks == 0


def test_changed_document_replaces_all_of_its_chunks(collection: HybridCollection) -> None:
    sync(collection, [Document("/a", long_text("a", 12)), Document("/b", "stays")], chunk_tokens=16)
    assert len(texts(collection)["/a"]) > 3
    report = sync(collection, [Document("/a", "Short now.")], chunk_tokens=16)
    assert counts(report) == {"updated": 1}
    assert texts(collection) == {"/a": ["Short now."], "/b": ["stays"]}


def test_other_chunk_length_splits_anew(collection: HybridCollection) -> None:
    document = Document("/a", long_text("a", 12))
    sync(collection, [document], chunk_tokens=16)
    before = collection.count()
    assert counts(sync(collection, [document], chunk_tokens=64)) == {"updated": 1}
    assert 0 < collection.count() < before


def test_vanished_document_is_removed_only_below_the_roots(collection: HybridCollection) -> None:
    names = ("/x/a", "/x/b", "/xylophone/c", "/y/d")
    sync(collection, [Document(name, long_text(name, 6)) for name in names], chunk_tokens=16)
    assert counts(sync(collection, [Document("/x/a", long_text("/x/a", 6))], chunk_tokens=16)) == {"unchanged": 1}
    report = sync(collection, [Document("/x/a", long_text("/x/a", 6))], roots=["/x"], chunk_tokens=16)
    assert counts(report) == {"unchanged": 1, "removed": 1}
    assert sorted(texts(collection)) == ["/x/a", "/xylophone/c", "/y/d"]


def test_what_could_not_be_read_is_kept_and_reported(collection: HybridCollection) -> None:
    sync(collection, [Document("/x/a", "one"), Document("/x/locked/b", "two"), Document("/x/c", "three")])
    failures = [Failure("/x/a", "is not UTF-8"), Failure("/x/locked", "Permission denied")]
    report = sync(collection, failures, roots=["/x"])
    assert report.failed == tuple(failures)
    assert counts(report) == {"failed": 2, "removed": 1}
    assert sorted(texts(collection)) == ["/x/a", "/x/locked/b"]


def test_records_of_other_programs_are_left_alone(collection: HybridCollection) -> None:
    collection.upsert(["foreign"], ["text"], metadatas=[{"source": "/x/a", "chunk": 0, "chunks": 1}])
    assert counts(sync(collection, [Document("/x/b", "mine")], roots=["/x"])) == {"added": 1}
    assert counts(sync(collection, [], roots=["/x"])) == {"removed": 1}
    assert [record.id for record in collection.get()] == ["foreign"]


def test_document_without_text_leaves_nothing_in_the_collection(collection: HybridCollection) -> None:
    sync(collection, [Document("/a", "text")])
    assert counts(sync(collection, [Document("/a", " \n\t\n")])) == {"empty": 1}
    assert collection.count() == 0


def test_same_source_twice_is_refused(collection: HybridCollection) -> None:
    with pytest.raises(ValueError, match="given twice"):
        sync(collection, [Document("/a", "one"), Document("/a", "two")])


def test_roots_as_one_string_are_refused(collection: HybridCollection) -> None:
    with pytest.raises(TypeError, match="give a list"):
        sync(collection, [], roots="/x")


def test_metadata_tell_source_number_and_heading(collection: HybridCollection) -> None:
    text = "Preface.\n\n# Bread\n\n" + long_text("bread", 4) + "\n\n## Crust ##\n\n" + long_text("crust", 6)
    sync(collection, [Document("/a.md", text, markdown=True)], chunk_tokens=32)
    metadatas = sorted(
        (record.metadata for record in collection.get()), key=lambda metadata: int(str(metadata["chunk"]))
    )
    assert [metadata["chunk"] for metadata in metadatas] == list(range(len(metadatas)))
    assert {metadata["chunks"] for metadata in metadatas} == {len(metadatas)}
    assert {metadata["source"] for metadata in metadatas} == {"/a.md"}
    headings = [str(metadata.get("heading")) for metadata in metadatas]
    assert list(dict.fromkeys(headings)) == ["None", "Bread", "Crust"]
    assert headings == sorted(headings, key=["None", "Bread", "Crust"].index)
    assert set(metadatas[-1]) == {"source", "chunk", "chunks", "document_digest", "heading"}


def stop_at(method: Callable[..., None], call: int, *, after: bool) -> Callable[..., None]:
    """Let the method fail at its `call`-th call, before or after doing its work."""
    calls = 0

    def stopping(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        method(*args, **options)
        if calls == call:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("method", "call"), [("upsert", 1), ("upsert", 2), ("delete", 1), ("delete", 2)])
def test_interrupted_run_leaves_whole_passages_and_the_next_run_completes_it(
    chroma_client: ClientAPI,
    collection: HybridCollection,
    encoder: GTEEncoder,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
    after: bool,
) -> None:
    monkeypatch.setattr("gte_rag.indexing._GROUP", {"cpu": 4, "cuda": 4})
    old = {"/x/a": long_text("old a", 7), "/x/b": long_text("old b", 3), "/x/gone": long_text("gone", 3)}
    new = {"/x/a": long_text("new a", 3), "/x/b": long_text("new b", 6), "/x/c": long_text("new c", 2)}

    def run(target: HybridCollection, documents: dict[str, str]) -> IndexReport:
        return sync(target, [Document(*item) for item in documents.items()], roots=["/x"], chunk_tokens=16)

    run(collection, old)
    allowed = {text for texts_ in texts(collection).values() for text in texts_}
    clean = HybridCollection(chroma_client, f"clean-{uuid4().hex}", encoder=encoder)
    run(clean, new)
    allowed |= {text for texts_ in texts(clean).values() for text in texts_}

    monkeypatch.setattr(collection, method, stop_at(getattr(collection, method), call, after=after))
    with pytest.raises(KeyboardInterrupt):
        run(collection, new)
    monkeypatch.undo()
    stored = texts(collection)
    assert {"/x/a", "/x/b"} <= set(stored), "a document that is in both versions is never missing"
    assert {text for texts_ in stored.values() for text in texts_} <= allowed
    assert HybridRetriever(collection).search("bread")
    run(collection, new)
    assert texts(collection) == texts(clean)
    assert counts(run(collection, new)) == {"unchanged": 3}


def test_old_chunks_go_only_after_the_last_new_one_is_written(
    collection: HybridCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gte_rag.indexing._GROUP", {"cpu": 2, "cuda": 2})
    sync(collection, [Document("/a", long_text("old", 9))], chunk_tokens=16)
    stored_at_deletion: list[list[str]] = []
    delete = collection.delete

    def recording(ids: list[str]) -> None:
        stored_at_deletion.append(texts(collection)["/a"])
        delete(ids)

    monkeypatch.setattr(collection, "delete", recording)
    sync(collection, [Document("/a", long_text("new", 5))], chunk_tokens=16)
    new = texts(collection)["/a"]
    assert len(new) > 4
    (at_deletion,) = stored_at_deletion
    assert at_deletion[: len(new)] == new
    assert len(at_deletion) > len(new)


def test_first_chunk_of_a_vanished_document_goes_last(
    collection: HybridCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(collection, [Document(name, long_text(name, 5)) for name in ("/x/a", "/x/b")], chunk_tokens=16)
    deleted: list[str] = []
    monkeypatch.setattr(collection, "delete", deleted.extend)
    sync(collection, [], roots=["/x"], chunk_tokens=16)
    assert len(deleted) == collection.count()
    assert [chunk_id.endswith("-0") for chunk_id in deleted[-3:]] == [False, True, True]


def test_a_half_written_document_is_completed_without_writing_the_half_again(collection: HybridCollection) -> None:
    document = Document("/a", long_text("a", 12))
    whole = sync(collection, [document], chunk_tokens=16).chunks
    lost = [record.id for record in collection.get() if int(str(record.metadata["chunk"])) in (2, whole - 1)]
    collection.delete(lost)
    report = sync(collection, [document], chunk_tokens=16)
    assert counts(report) == {"updated": 1}
    assert report.chunks == 2
    assert collection.count() == whole


def test_progress_counts_documents_and_chunks(collection: HybridCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gte_rag.indexing._GROUP", {"cpu": 2, "cuda": 2})
    seen: list[tuple[int, int]] = []
    documents: list[Document | Failure] = [Document(f"/{number}", "text") for number in range(5)]
    documents.insert(1, Failure("/b", "is binary"))
    sync(collection, documents, on_progress=lambda done, chunks: seen.append((done, chunks)))
    assert seen == sorted(seen)
    assert seen[-1] == (6, 5)


# --- splitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [16, 64])
@pytest.mark.parametrize(
    "text",
    [
        long_text("words", 30),
        "# 一\n\n" + "北京是中国的首都。" * 60,
        "x" * 3000,
        "a" + " " * 5000 + "b",
        "👩‍👩‍👧‍👦" * 40,
        "é" * 200,
    ],
    ids=["paragraphs", "chinese", "long word", "spaces", "emoji", "combining"],
)
@pytest.mark.parametrize("markdown", [False, True])
def test_chunks_fit_and_lose_nothing_but_white_space(
    encoder: GTEEncoder, text: str, markdown: bool, chunk_tokens: int
) -> None:
    chunks = Splitter(encoder, chunk_tokens=chunk_tokens).split(Document("/a", text, markdown))
    assert max(encoder.count_tokens(chunk.text) for chunk in chunks) <= chunk_tokens
    assert "".join("".join(chunk.text for chunk in chunks).split()) == "".join(text.split())


def test_text_is_split_between_paragraphs_and_markdown_between_sections(encoder: GTEEncoder) -> None:
    text = "First paragraph, rather short.\n\nSecond paragraph.\n# Section\n\nIts text is here."
    splitter = Splitter(encoder, chunk_tokens=encoder.count_tokens(text) - 1)
    assert [chunk.text for chunk in splitter.split(Document("/a", text, markdown=True))] == [
        "First paragraph, rather short.\n\nSecond paragraph.",
        "# Section\n\nIts text is here.",
    ]


def test_comments_in_code_are_no_headings(encoder: GTEEncoder) -> None:
    text = "# Title\n\n````sh\n# not this\n```\n# nor this\n````\n\nText after the code.\n"
    chunks = Splitter(encoder, chunk_tokens=16).split(Document("/a", text, markdown=True))
    assert {chunk.heading for chunk in chunks} == {"Title"}


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("# One ##", "One"),
        ("# One#", "One#"),
        ("## C# #\t", "C#"),
        ("#\tOne", "One"),
        ("# ##", ""),
        ("#One", ""),
        ("####### One", ""),
    ],
)
def test_a_heading_is_read_as_markdown_has_it(encoder: GTEEncoder, line: str, heading: str) -> None:
    chunks = Splitter(encoder).split(Document("/a", f"{line}\n\nText.\n", markdown=True))
    assert chunks[0].heading == heading


def test_code_within_a_line_hides_no_heading(encoder: GTEEncoder) -> None:
    text = "# One\n\n```gte-rag index``` is a command.\n\n# Two\n\nText of the second part.\n"
    chunks = Splitter(encoder, chunk_tokens=16).split(Document("/a", text, markdown=True))
    assert chunks[-1].heading == "Two"


def test_a_heading_of_spaces_takes_no_longer_than_others(encoder: GTEEncoder) -> None:
    line = "# a" + " " * 200_000 + "b"  # time that grows with the square of it would be minutes
    assert Splitter(encoder).split(Document("/a", line, markdown=True))[0].heading.startswith("a ")


def test_plain_text_has_no_headings(encoder: GTEEncoder) -> None:
    assert Splitter(encoder).split(Document("/a", "# 1 is a number"))[0].heading == ""


@pytest.mark.parametrize("chunk_tokens", [0, 15, 8193])
def test_chunk_length_out_of_range_is_refused(encoder: GTEEncoder, chunk_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk_tokens is {chunk_tokens}; chunks have 16 to 8192 tokens"):
        Splitter(encoder, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("chunk_tokens", [True, 64.0, "64", None])
def test_chunk_length_that_is_no_whole_number_is_refused(encoder: GTEEncoder, chunk_tokens: Any) -> None:
    with pytest.raises(TypeError, match="give a whole number"):
        Splitter(encoder, chunk_tokens=chunk_tokens)


def test_time_to_split_a_long_word_grows_with_its_length_not_its_square(encoder: GTEEncoder) -> None:
    characters = {}
    for length in (8_000, 32_000):
        asked = 0

        class Counting:
            max_length = encoder.max_length

            def count_tokens(self, text: str) -> int:
                nonlocal asked
                asked += len(text)
                return encoder.count_tokens(text)

        counting: Any = Counting()
        Splitter(counting, chunk_tokens=64).split(Document("/a", "Zm9v" * (length // 4)))
        characters[length] = asked
    assert characters[32_000] < 6 * characters[8_000]


# --- files -------------------------------------------------------------------------------------------------------------


def tree(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Text of {name}.", encoding="utf-8")


def names(root: Path, *paths: Path) -> list[str]:
    return [str(path.relative_to(root.resolve())) for path in select_files(paths).files]


def test_folder_is_searched_deeply_sorted_without_hidden_and_other_files(tmp_path: Path) -> None:
    tree(tmp_path, "b.md", "a.txt", "sub/deep/c.MARKDOWN", "sub/d.rst", ".hidden.md", ".git/e.md", "f.py", "g.md~")
    assert names(tmp_path, tmp_path) == ["a.txt", "b.md", "sub/d.rst", "sub/deep/c.MARKDOWN"]
    assert select_files([tmp_path]).ignored == 2


def test_named_file_is_taken_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    tree(tmp_path, "README", ".hidden", "a.md")
    paths = (tmp_path / "README", tmp_path / ".hidden", tmp_path, tmp_path / "a.md", tmp_path / "." / "a.md")
    assert names(tmp_path, *paths) == ["README", ".hidden", "a.md"]


def test_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist; give files and folders that do"):
        select_files([tmp_path / "nowhere"])


def test_path_that_does_not_exist_is_named_if_it_may_be_missing(tmp_path: Path) -> None:
    tree(tmp_path, "a.md")
    selection = select_files([tmp_path / "nowhere", tmp_path / "a.md"], missing_ok=True)
    assert selection.missing == (str(tmp_path.resolve() / "nowhere"),)
    assert selection.roots == (str(tmp_path.resolve() / "a.md"),)


def test_relative_and_absolute_path_name_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "notes/a.md")
    monkeypatch.chdir(tmp_path / "notes")
    assert select_files(["."]) == select_files([tmp_path / "notes"]) == select_files([Path("..", "notes")])


@posix_only
def test_links_are_followed_without_loops_or_repetition(tmp_path: Path) -> None:
    tree(tmp_path, "root/real/a.md", "outside/b.md", "outside/sub/c.md")
    root = tmp_path / "root"
    (root / "loop").symlink_to(root)
    (root / "above").symlink_to(tmp_path)
    (root / "aagain").symlink_to(root / "real")
    (root / "other").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "outside")
    (root / "file.md").symlink_to(tmp_path / "outside" / "b.md")
    assert names(root, root) == ["file.md", "other/b.md", "other/sub/c.md", "real/a.md"]


@posix_only
def test_a_link_to_a_hidden_folder_of_the_tree_is_followed(tmp_path: Path) -> None:
    tree(tmp_path, "root/.store/docs/a.md", "root/b.md")
    root = tmp_path / "root"
    (root / "docs").symlink_to(root / ".store" / "docs")  # as mounted configuration is laid out
    assert names(root, root) == ["b.md", "docs/a.md"]


@posix_only
def test_what_is_no_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.md").symlink_to(tmp_path / "self.md")
    os.mkfifo(tmp_path / "pipe.txt")
    selection = select_files([tmp_path])
    assert selection.files == ()
    assert {Path(failure.source).name: failure.reason for failure in selection.failed} == {
        "broken.md": "No such file or directory",
        "self.md": "Too many levels of symbolic links",
        "pipe.txt": "is not a regular file",
    }


@posix_only
def test_folder_that_cannot_be_listed_is_reported_and_its_documents_are_kept(
    tmp_path: Path, collection: HybridCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "a.md", "locked/b.md")
    index(collection, tmp_path)
    scandir = os.scandir

    def refusing(path: Any) -> Any:  # permissions do not stop root, who may run the tests
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = index(collection, tmp_path)
    assert counts(report) == {"unchanged": 1, "failed": 1}
    assert report.failed[0].reason == "Permission denied"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Größe".encode("latin-1"), "is not UTF-8 (byte 0xf6 at 2); convert it to UTF-8"),
        ("text".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        (b"\x7fELF\x00\x01", "is binary, not text"),
    ],
)
def test_what_is_no_utf8_text_is_set_aside_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(data)
    assert read_file(path) == Failure(str(path), reason)
    assert read_stdin(io.BytesIO(data)) == Failure("<stdin>", reason)


def test_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# One\r\n\r\ntwo\rthree\n")
    assert read_file(path) == Document(str(path), "# One\n\ntwo\nthree\n", markdown=True)


def test_file_that_vanished_or_is_a_folder_is_set_aside(tmp_path: Path) -> None:
    gone = read_file(tmp_path / "gone.md")
    assert isinstance(gone, Failure)
    assert gone.reason == "No such file or directory"
    assert isinstance(read_file(tmp_path), Failure)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file system that takes any bytes as a name")
def test_name_that_is_no_unicode_is_set_aside(tmp_path: Path, collection: HybridCollection) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.md")).write_text("text", encoding="utf-8")
    report = index(collection, tmp_path)
    assert counts(report) == {"failed": 1}
    assert report.failed[0].source.endswith("caf�.md")
    assert "rename" in report.failed[0].reason


def test_moved_file_is_found_under_its_new_name_only(tmp_path: Path, collection: HybridCollection) -> None:
    tree(tmp_path, "a.md", "b.md")
    index(collection, tmp_path)
    (tmp_path / "a.md").rename(tmp_path / "c.md")
    assert counts(index(collection, tmp_path)) == {"added": 1, "unchanged": 1, "removed": 1}
    assert sorted(Path(source).name for source in texts(collection)) == ["b.md", "c.md"]
