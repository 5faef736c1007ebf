"""The command line: what it prints where, its exit codes, and that nothing it is given makes it crash."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("chromadb")
pytest.importorskip("rich")
pytest.importorskip("semantic_text_splitter")

import chromadb
from chromadb.config import Settings

import gte_rag
from checkpoints import build, find_variant
from gte_rag import GTEEncoder, cli
from gte_rag.highlighting import excerpt, matching_spans
from gte_rag.segments import find_segment

pytestmark = pytest.mark.usefixtures("bundled_once")

ROOT = Path(__file__).parent.parent
COMMANDS = ("index", "search", "repair", "explain", "encode", "info", "convert", "encode-files", "eval", "demo")
ESCAPE = "\x1b"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "net.md").write_text(
        "# Errors\n\nECONNREFUSED means that nothing listens on that port.\n", encoding="utf-8"
    )
    (folder / "bread.txt").write_text("Sourdough bread rises for twelve hours.\n", encoding="utf-8")
    (folder / "北京.md").write_text("北京是中国的首都。\n", encoding="utf-8")
    return folder


@pytest.fixture
def db(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A database with the notes in it."""
    folder = tmp_path / "db"
    assert cli.main(["index", str(notes), "--db", str(folder)]) == 0
    capsys.readouterr()
    return folder


class Result:
    """What a call printed and returned."""

    def __init__(self, code: int, capsys: pytest.CaptureFixture[str]) -> None:
        self.code = code
        self.out, self.err = capsys.readouterr()


class Run:
    """Call the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Result:
        return Result(cli.main([str(argument) for argument in arguments]), self.capsys)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    parser = cli._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    yield from commands.choices.items()


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# --- help and wrong calls ----------------------------------------------------------------------------------------------


def test_there_are_these_commands() -> None:
    assert tuple(name for name, _ in parsers()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_of_the_command(command: str, run: Run) -> None:
    result = run(command, "--help")
    assert result.code == 0
    for action in dict(parsers())[command]._actions:
        assert action.help
        for name in action.option_strings or [str(action.metavar)]:
            assert name in result.out


def test_help_and_version_do_not_import_torch_or_chroma() -> None:
    code = (
        "import sys; from gte_rag.cli import main; assert main(['--help']) == main(['--version']) == 0; "
        "print(sorted({'torch', 'chromadb', 'rich', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = result.stdout.splitlines()
    assert set(COMMANDS) <= set(result.stdout.split())
    assert lines[-2:] == [f"gte-rag {gte_rag.__version__}", "[]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["serach"], "invalid choice: 'serach'"),
        (["search", "x"], "--db"),
        (["search", "x", "--db", "d", "-k", "0"], "'0' is no whole number of at least 1"),
        (["search", "x", "--db", "d", "-k", "3.5"], "'3.5' is no whole number of at least 1"),
        (["search", "x", "--db", "d", "--sparse-weight", "nan"], "'nan' is no finite number of at least 0"),
        (["search", "x", "--db", "d", "--dense-weight", "-1"], "'-1' is no finite number of at least 0"),
        (["search", "x", "--db", "d", "--where", "{chunk: 0}"], "is not JSON"),
        (["search", "x", "--db", "d", "--where", "[1]"], "is a JSON list; give a JSON object"),
        (["encode", "x", "--no-dense", "--no-sparse"], "leave nothing to print"),
        (["encode", "x", "--query", "--document"], "not allowed with"),
        (["encode", "x", "--dimension", "32"], "dimension is 32; this model gives dense vectors of 64 to 384"),
        (["encode", "x", "--device", "warp"], "device 'warp' is not available"),
    ],
)
def test_wrong_call_exits_with_2_and_says_what_is_accepted(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_options_that_need_an_index_are_refused_with_2(run: Run, db: Path, notes: Path, tmp_path: Path) -> None:
    calls: list[tuple[list[str | Path], str]] = [
        (["search", "x", "--db", db, "--mode", "magic"], "available: 'rescore'"),
        (["search", "x", "--db", db, "--where", '{"a": {"$magic": 1}}'], "$magic"),
        (["index", notes, "--db", tmp_path / "new", "--chunk-tokens", "3"], "chunks have 16 to 8192 tokens"),
        (["index", notes, "--db", tmp_path / "new", "--dimension", "999"], "dimension is 999"),
        (["index", notes, "--db", db, "--collection", "a b"], "a b"),
    ]
    for arguments, message in calls:
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        assert message in result.err
    assert not (tmp_path / "new").exists()


def test_missing_package_is_one_line_with_the_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    for module in ("chromadb", "rich", "semantic_text_splitter"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for arguments in ("demo", f"search x --db {tmp_path}", f"index {tmp_path} --db {tmp_path / 'db'}"):
        result = run(*arguments.split())
        assert (result.code, result.out) == (2, "")
        assert re.fullmatch(r"gte-rag: .*'chromadb'.*pip install 'gte-rag\[cli\]'\n", result.err)
    assert not (tmp_path / "db").exists()


# --- index and search --------------------------------------------------------------------------------------------------


def test_index_reports_what_it_did_and_a_second_run_does_nothing(run: Run, notes: Path, tmp_path: Path) -> None:
    result = run("index", notes, "--db", tmp_path / "db")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(
        r"3 added, 0 updated, 0 unchanged, 0 removed; 3 passages written, 3 in the index \(\d+\.\d s\)\n", result.out
    )
    (notes / "bread.txt").write_text("Rye bread rises for a day.\n", encoding="utf-8")
    (notes / "net.md").unlink()
    (notes / "table.csv").touch()
    (notes / "blank.md").touch()
    assert run("index", notes, "--db", tmp_path / "db").out.startswith(
        "0 added, 1 updated, 1 unchanged, 1 removed, 1 without text, 1 files of other kinds passed over; 1 passages written"
    )


def test_what_cannot_be_read_is_named_and_the_exit_code_shows_it(run: Run, notes: Path, tmp_path: Path) -> None:
    (notes / "old.txt").write_bytes("Größe".encode("latin-1"))
    result = run("index", notes, "--db", tmp_path / "db")
    assert result.code == 1
    assert result.err == f"gte-rag: set aside: {notes / 'old.txt'} is not UTF-8 (byte 0xf6 at 2); convert it to UTF-8\n"
    assert "3 added, 0 updated, 0 unchanged, 0 removed, 1 set aside" in result.out


def test_standard_input_is_indexed_and_replaced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, done in (("Chalk is soft.", "1 added, 0 updated"), ("Granite is hard.", "0 added, 1 updated")):
        set_stdin(monkeypatch, text.encode())
        assert run("index", "-", "--db", tmp_path / "db").out.startswith(done)
    result = run("search", "stone", "--db", tmp_path / "db", "--json")
    assert [hit["text"] for hit in json.loads(result.out)["hits"]] == ["Granite is hard."]


def test_folder_without_documents_is_pointed_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("index", tmp_path / "empty", "--db", tmp_path / "db")
    assert result.code == 0
    assert result.err.startswith("gte-rag: warning: no .md, .markdown, .txt, .text or .rst files in")


def test_path_that_does_not_exist_makes_no_database(run: Run, tmp_path: Path) -> None:
    result = run("index", tmp_path / "nowhere", "--db", tmp_path / "db")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"gte-rag: '.*nowhere' does not exist; give files and folders that do\n", result.err)
    assert not (tmp_path / "db").exists()


def test_a_path_that_vanished_keeps_nothing_else_from_being_indexed(run: Run, notes: Path, tmp_path: Path) -> None:
    gone, folder, db = tmp_path / "gone.md", tmp_path / "folder", tmp_path / "db"
    gone.write_text("Chalk is soft.", encoding="utf-8")
    folder.mkdir()
    (folder / "a.md").write_text("Granite is hard.", encoding="utf-8")
    (folder / "b.md").write_text("Slate splits.", encoding="utf-8")
    assert run("index", gone, folder, "--db", db).out.startswith("3 added")
    gone.unlink()
    shutil.rmtree(folder)

    kept = run("index", gone, folder, notes, "--db", db)
    assert kept.code == 1
    assert re.match(r"\d added, 0 updated, 0 unchanged, 0 removed, 2 set aside;", kept.out)
    assert kept.err.count("does not exist; what the index has of it is kept (--remove-missing removes it)") == 2

    removed = run("index", gone, folder, notes, "--db", db, "--remove-missing")
    assert (removed.code, removed.err) == (0, "")
    assert re.match(r"0 added, 0 updated, \d unchanged, 3 removed;", removed.out)


def test_what_libraries_deprecate_is_not_for_who_types_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(arguments: argparse.Namespace) -> int:
        for category in (DeprecationWarning, PendingDeprecationWarning, UserWarning):
            warnings.warn(f"said as {category.__name__}", category, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_info", warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "gte-rag: warning: said as UserWarning\n"


def test_an_index_of_paths_that_all_vanished_is_emptied_on_demand_only(run: Run, tmp_path: Path) -> None:
    gone, db = tmp_path / "gone.md", tmp_path / "db"
    gone.write_text("Chalk is soft.", encoding="utf-8")
    refused = run("index", tmp_path / "nowhere", "--db", db, "--remove-missing")
    assert refused.code == 1
    assert "does not exist" in refused.err
    assert not db.exists()
    run("index", gone, "--db", db)
    gone.unlink()
    assert "does not exist; give files and folders that do" in run("index", gone, "--db", db).err
    assert run("index", gone, "--db", db, "--remove-missing").out.startswith(
        "0 added, 0 updated, 0 unchanged, 1 removed"
    )


def test_model_that_does_not_exist_makes_no_database(run: Run, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = run("index", notes, "--db", tmp_path / "db", "--model", tmp_path / "model")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "config.json" in result.err
    assert not (tmp_path / "db").exists()


def test_database_that_is_a_file_or_damaged_is_one_line(run: Run, notes: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "chroma.sqlite3").write_bytes(b"nonsense" * 1000)
    for database, message in ((file, "is a file; give a folder"), (damaged, f"Chroma in {damaged}: ")):
        result = run("index", notes, "--db", database)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert message in result.err


def test_search_prints_rank_scores_source_and_passage_without_escape_codes(run: Run, db: Path, notes: Path) -> None:
    result = run("search", "why do I get ECONNREFUSED?", "--db", db)
    assert (result.code, result.err) == (0, "")
    assert ESCAPE not in result.out
    lines = result.out.splitlines()
    assert re.fullmatch(
        rf"1\. \d\.\d{{3}}  dense \d\.\d{{3}}, sparse \d+\.\d{{3}}  {notes / 'net.md'} › Errors", lines[0]
    )
    assert lines[1:4] == ["   # Errors", "", "   ECONNREFUSED means that nothing listens on that port."]
    assert [line[:2] for line in lines if re.match(r"\d\.", line)] == ["1.", "2.", "3."]


def test_source_below_the_working_directory_is_shown_relative(
    run: Run, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("search", "bread", "--db", db, "-k", "1").out.splitlines()[0].endswith(f"  {Path('notes', 'bread.txt')}")


def test_search_prints_one_json_document_and_nothing_else(run: Run, db: Path, notes: Path) -> None:
    result = run("search", "北京", "--db", db, "--json", "-k", "2")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert {key: found[key] for key in ("query", "model", "collection")} == {
        "query": "北京",
        "model": "gte-mini",
        "collection": "documents",
    }
    first, second = found["hits"]
    assert (first["rank"], second["rank"]) == (1, 2)
    assert first["text"] == "北京是中国的首都。"
    assert first["metadata"]["source"] == str(notes / "北京.md")
    assert first["score"] == pytest.approx(first["dense_score"] + 0.3 * first["sparse_score"], rel=1e-5)
    assert "北京" in [match["token"] for match in first["matches"]]
    assert "gte_rag:sparse" not in result.out


def test_weights_filter_and_candidates_reach_the_retriever(run: Run, db: Path, notes: Path) -> None:
    where = json.dumps({"source": str(notes / "bread.txt")})
    options = [
        "--where",
        where,
        "--dense-weight",
        "0",
        "--sparse-weight",
        "1",
        "--candidates",
        "2",
        "--mode",
        "rescore",
    ]
    (hit,) = json.loads(run("search", "ECONNREFUSED bread", "--db", db, "--json", *options).out)["hits"]
    assert hit["text"].startswith("Sourdough bread")
    assert hit["score"] == pytest.approx(hit["sparse_score"], rel=1e-5)


def test_filter_that_nothing_fits_is_said_and_no_error(run: Run, db: Path) -> None:
    result = run("search", "bread", "--db", db, "--where", '{"chunk": 99}')
    assert (result.code, result.out, result.err) == (0, "", "gte-rag: no passage fits --where\n")


def test_search_never_makes_a_database(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "folder"):
        result = run("search", "x", "--db", folder)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert f"there is no index in {folder}; make one: gte-rag index PATH --db {folder}" in result.err
    assert not (tmp_path / "nowhere").exists()
    assert not list((tmp_path / "folder").iterdir())


def test_collections_that_cannot_be_searched_are_one_line(run: Run, db: Path, tmp_path: Path) -> None:
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(str(db), settings=Settings(anonymized_telemetry=False))
    client.create_collection("foreign", embedding_function=None)
    (tmp_path / "blank.md").touch()
    run("index", tmp_path / "blank.md", "--db", db, "--collection", "blank")
    for name, message in (
        ("nothing", "has no collection 'nothing'; it has: blank, documents, foreign. Choose with --collection"),
        ("foreign", "collection 'foreign' was not made by gte-rag"),
        ("blank", "is empty; index something first"),
    ):
        result = run("search", "x", "--db", db, "--collection", name)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert message in result.err


def test_index_remembers_model_and_dimension(run: Run, notes: Path, tmp_path: Path) -> None:
    database = tmp_path / "db"
    folder = build(find_variant("multilingual-base"), tmp_path / "model")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert run("index", notes, "--db", database, "--model", folder, "--dimension", "64").code == 0
    found = json.loads(run("search", "bread", "--db", database, "--json").out)
    assert found["model"] == str(folder)
    assert run("index", notes, "--db", database).out.startswith("0 added, 0 updated, 3 unchanged")
    same = run("search", "bread", "--db", database, "--model", elsewhere, "--json")
    assert json.loads(same.out)["hits"][0]["text"] == found["hits"][0]["text"]
    result = run("index", notes, "--db", database, "--dimension", "128")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "holds vectors of dimension 64" in result.err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "60")


@pytest.mark.usefixtures("terminal")
def test_terminal_shows_matching_words_in_bold_within_its_width(run: Run, db: Path) -> None:
    result = run("search", "ECONNREFUSED port", "--db", db, "-k", "1")
    assert f"{ESCAPE}[1;33mECONNREFUSED{ESCAPE}[0m" in result.out
    assert f"{ESCAPE}[1;33mport{ESCAPE}[0m" in result.out
    passage = re.sub(rf"{ESCAPE}\[[\d;]*m", "", result.out).splitlines()[1:]
    assert max(map(len, passage)) <= 60


@pytest.mark.usefixtures("terminal")
def test_no_color_means_no_escape_codes_at_all(run: Run, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    result = run("search", "ECONNREFUSED port", "--db", db)
    assert result.code == 0
    assert ESCAPE not in result.out + result.err


@pytest.mark.usefixtures("terminal")
def test_control_characters_of_a_document_do_not_reach_the_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / f"n{ESCAPE}[2J.md").write_text(f"bread {ESCAPE}]0;owned\x07 \x9b2J end", encoding="utf-8")
    run("index", tmp_path, "--db", tmp_path / "db")
    result = run("search", "bread", "--db", tmp_path / "db")
    assert "bread �]0;owned� �2J end" in result.out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.out)


@pytest.mark.parametrize(
    ("text", "query", "marked"),
    [
        ("ECONNREFUSED means that nothing listens.", "what is ECONNREFUSED?", ["ECONNREFUSED"]),
        ("Der Vermieter darf drei Monatsmieten verlangen.", "Monatsmieten Vermieter", ["Vermieter", "Monatsmieten"]),
        ("我们去北京看长城。", "北京", ["北京"]),
        ("ＡＢＣ123 ﬁnally", "ABC123", ["ＡＢＣ123"]),
        ("Nothing in common.", "北京", []),
        ("", "bread", []),
    ],
)
def test_whole_words_are_marked_where_they_match(encoder: GTEEncoder, text: str, query: str, marked: list[str]) -> None:
    weights = encoder.encode_queries([query]).sparse
    assert weights is not None
    tokens = {token for token, weight in encoder.token_weights(weights[0]).items() if weight > 0.5 and len(token) > 0}
    tokens -= {"what", "is"}
    assert [text[start:end] for start, end in matching_spans(encoder, text, tokens)] == marked


def test_syllable_within_a_word_is_not_marked(encoder: GTEEncoder) -> None:
    text = "Kopernikus Organisation"
    pieces = encoder.token_strings(encoder.tokenizer.encode(text).ids)
    inner = {piece for piece in pieces if piece and text.find(piece) > 0 and not text.split(piece)[0].endswith(" ")}
    for piece in inner - {"Organisation"}:
        for start, end in matching_spans(encoder, text, {piece}):
            assert text[start:end] in text.split()


def test_excerpt_holds_the_matches_and_ends_between_words(encoder: GTEEncoder) -> None:
    text = "filler words go on " * 60 + "ECONNREFUSED on the port " + "and more of them " * 60
    place = text.index("ECONNREFUSED")
    start, end = excerpt(text, [(place, place + 12)])
    assert start < place < end
    assert end - start <= 400
    assert text[start - 1].isspace()
    assert text[end].isspace()
    assert not text[start].isspace()
    assert excerpt("short", []) == (0, 5)
    assert excerpt("x" * 1000, [(990, 1000)]) == (600, 1000)


# --- encode, info, demo ------------------------------------------------------------------------------------------------


def test_encode_prints_the_vectors_of_the_encoder(run: Run, encoder: GTEEncoder) -> None:
    texts = ["Bread needs flour.", "北京", ""]
    result = run("encode", *texts)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["text"] for line in lines] == texts
    encoding = encoder.encode_documents(texts)
    assert encoding.dense is not None
    assert encoding.sparse is not None
    for line, dense, sparse in zip(lines, encoding.dense, encoding.sparse, strict=True):
        np.testing.assert_array_equal(np.float32(line["dense"]), dense)  # nothing is lost by printing
        assert {int(token): np.float32(weight) for token, weight in line["sparse"].items()} == sparse.to_dict()


def test_encode_leaves_out_cuts_and_names_tokens(run: Run, encoder: GTEEncoder) -> None:
    (dense,) = map(json.loads, run("encode", "bread", "--query", "--no-sparse", "--dimension", "64").out.splitlines())
    assert set(dense) == {"text", "dense"}
    assert len(dense["dense"]) == 64
    (sparse,) = map(json.loads, run("encode", "bread and 北京", "--no-dense", "--tokens").out.splitlines())
    assert set(sparse) == {"text", "sparse"}
    assert "北京" in sparse["sparse"]
    assert list(sparse["sparse"].values()) == sorted(sparse["sparse"].values(), reverse=True)


@pytest.mark.parametrize("arguments", [["-"], []])
def test_encode_reads_a_text_a_line(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(cli, "_ENCODE_GROUP", 2)
    set_stdin(monkeypatch, "\ufeffone\r\n\nthree\u2028still three".encode())
    lines = [json.loads(line)["text"] for line in run("encode", "--no-dense", *arguments).out.splitlines()]
    assert lines == ["one", "", "three\u2028still three"]


def test_encode_names_the_line_that_is_no_utf8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_stdin(monkeypatch, b"one\ntw\xf6\n")
    result = run("encode", "-")
    assert result.code == 1
    assert result.err.startswith("gte-rag: line 2 of standard input is not UTF-8")


def test_encode_refuses_an_argument_that_is_no_unicode_with_one_line(run: Run) -> None:
    result = run("encode", "caf\udce9")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "lone surrogate" in result.err


def test_cut_text_is_one_line_of_warning(run: Run, encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "max_length", 8)
    result = run("encode", "one two three four five six seven eight nine ten", "--no-dense")
    assert result.code == 0
    assert re.fullmatch(
        r"gte-rag: warning: 1 of 1 texts are longer than max_length=8 tokens and were cut\n", result.err
    )


def test_info_tells_what_the_model_is(run: Run, encoder: GTEEncoder) -> None:
    result = run("info")
    assert (result.code, result.err) == (0, "")
    told = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    assert told["gte-rag"] == gte_rag.__version__
    assert told["model"] == "gte-mini"
    assert told["fingerprint"] == encoder.fingerprint
    assert told["dimension"] == "384, or 64 and more"
    assert told["sparse head"] == "yes"
    assert told["parameters"].replace(",", "") == str(encoder.num_parameters)


def test_demo_answers_counts_and_says_what_to_try_next(run: Run) -> None:
    result = run("demo")
    assert (result.code, result.err) == (0, "")
    assert ESCAPE not in result.out
    assert len(re.findall(r"^\? ", result.out, flags=re.MULTILINE)) == 10
    assert len(re.findall(r"^[123]\. ", result.out, flags=re.MULTILINE)) == 30
    *_, summary, first, second = result.out.splitlines()
    right = re.fullmatch(r"(\d+) of 10 questions have the right document first \(\d+\.\d s\)\.", summary)
    assert right
    assert int(right[1]) == result.out.count("✓")
    assert "gte-rag index" in first
    assert "gte-rag search" in second


# --- repair ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torn(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A database with the notes in it, whose graph was written and then cut off."""
    folder = tmp_path / "torn db"
    client: Any = chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))
    for name in ("documents", "others"):
        configuration = {"hnsw": {"space": "cosine", "sync_threshold": 2}}
        client.create_collection(name, embedding_function=None, configuration=configuration)
    graph = find_segment(folder, str(client.get_collection("documents", embedding_function=None).id)).folder
    client.close()
    for name in ("documents", "others"):
        assert cli.main(["index", str(notes), "--db", str(folder), "--collection", name]) == 0
    os.truncate(graph / "header.bin", 50)
    client.clear_system_cache()  # what the commands above have read is of another process
    capsys.readouterr()
    return folder


def test_a_damaged_index_is_refused_with_the_command_that_mends_it(run: Run, torn: Path, notes: Path) -> None:
    for arguments in (("search", "bread", "--db", torn), ("index", notes, "--db", torn)):
        result = run(*arguments)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert result.err.endswith(f"mend it: gte-rag repair --db '{torn}' --collection documents\n")
    assert run("search", "bread", "--db", torn, "--collection", "others").code == 0


def test_repair_mends_what_is_damaged_and_says_what_it_did(run: Run, torn: Path) -> None:
    result = run("repair", "--db", torn)
    assert result.code == 0
    assert "documents: header.bin has 50 bytes instead of 100" in result.err
    mended, place, whole = result.out.splitlines()
    assert re.fullmatch(r"documents: mended; [0-3] of 3 texts encoded again \(\d+\.\d s\)", mended)
    assert str(torn / "gte_rag" / "damaged-") in place
    assert whole == "others: whole, nothing was changed"
    hits = json.loads(run("search", "bread that rises", "--db", torn, "--json", "--mode", "dense").out)["hits"]
    assert hits[0]["metadata"]["source"].endswith("bread.txt")
    assert run("repair", "--db", torn, "--collection", "documents").out == "documents: whole, nothing was changed\n"


def test_what_repair_refuses_is_one_line(run: Run, torn: Path, tmp_path: Path) -> None:
    result = run("repair", "--db", tmp_path / "nowhere")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "is no Chroma database" in result.err
    assert not (tmp_path / "nowhere").exists()
    result = run("repair", "--db", torn, "--collection", "elsewhere")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "has no collection 'elsewhere'; it has: documents, others" in result.err


# --- as a process ------------------------------------------------------------------------------------------------------


def python(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "gte_rag", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
        **options,
    )


def written(database: Path) -> int:
    """Return how many records a Chroma folder holds, looking at its file only."""
    try:
        with sqlite3.connect(f"file:{database / 'chroma.sqlite3'}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])
    except sqlite3.Error:
        return 0


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_an_index_that_can_be_searched_and_completed(run: Run, tmp_path: Path) -> None:
    notes, database = tmp_path / "notes", tmp_path / "db"
    notes.mkdir()
    for number in range(1200):
        (notes / f"{number:04}.md").write_text(f"Note {number}: sourdough bread rises.", encoding="utf-8")
    # A suite that runs in the background of a script ignores the signal, and hands that down.
    process = python("index", notes, "--db", database, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 90
    while not written(database) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    assert "can be searched" in err
    assert "run again" in err

    done = written(database)
    assert 0 < done < 1200
    assert json.loads(run("search", "bread", "--db", database, "--json").out)["hits"]
    assert run("index", notes, "--db", database).out.startswith(f"{1200 - done} added, 0 updated, {done} unchanged")
    assert run("index", notes, "--db", database).out.startswith("0 added, 0 updated, 1200 unchanged")


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe that can be closed")
def test_reader_that_goes_away_is_no_error_message() -> None:
    process = python("encode", "--no-sparse", *["bread"] * 200)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_output_that_is_no_unicode_is_escaped_not_a_crash() -> None:
    process = python("encode", "北京", "--no-dense", "--tokens", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.isascii()
    assert json.loads(out)["text"] == "北京"


def test_convert_writes_what_other_tools_load(run: Run, tmp_path: Path) -> None:
    result = run("convert", "gte-mini", str(tmp_path / "native"), "--dtype", "float32")
    assert result.code == 0
    assert "with its sparse head" in result.out
    assert (tmp_path / "native" / "model.safetensors").is_file()
    again = run("convert", "gte-mini", str(tmp_path / "native"))
    assert again.code == 2
    assert "not an empty folder" in again.err


def test_search_finds_by_words_alone_and_by_other_fusions(run: Run, db: Path) -> None:
    for options in (["--mode", "sparse"], ["--mode", "union", "--fusion", "reciprocal_rank"]):
        assert run("search", "bread", "--db", str(db), *options).code == 0
    result = run("search", "bread", "--db", str(db), "--fusion", "magic")
    assert result.code == 2
    assert "fusion is 'magic'; available:" in result.err


# --- eval --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A retrieval set, bitext and similarity below one folder."""
    folder = tmp_path / "data" / "cities"
    folder.mkdir(parents=True)
    texts = {"a": "ECONNREFUSED on port 8080", "b": "Sourdough bread rises", "c": "北京是中国的首都。"}
    queries = {"q1": "ECONNREFUSED", "q2": "bread", "q3": "北京"}
    for name, records in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in records.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "qrels.tsv").write_text("q1\ta\t1\nq2\tb\t1\nq3\tc\t1\n", encoding="utf-8")
    (folder.parent / "de-en.tsv").write_text("Brot\tbread\nWasser\twater\n", encoding="utf-8")
    (folder.parent / "sts.tsv").write_text("5\ta cat\ta cat\n0\ta cat\tthe stock market\n", encoding="utf-8")
    return folder.parent


def test_eval_prints_a_table_for_each_task_and_writes_all_results(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    arguments = ["eval", str(labelled), "--mode", "sparse", "--mode", "hybrid", "--dimension", "all"]
    assert cli.main([*arguments, "--sparse-weight", "0.01", "--depth", "1000", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    for words in ("Retrieval: gte-mini", "nDCG@10", "Bitext: gte-mini", "Similarity: gte-mini", "Spearman"):
        assert words in printed.out
    assert re.search(r"cities +sparse +1\.0000", printed.out)
    assert printed.err == ""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    hybrid = [result for result in results if result["mode"] == "hybrid"]
    assert {(result["sparse_weight"], result["candidates"]) for result in hybrid} == {(0.01, 1000)}
    assert len(hybrid) > 1  # one for each dimension


def test_eval_compares_with_saved_results_and_saved_results_with_each_other(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = str(tmp_path / "one.json"), str(tmp_path / "other.json")
    assert cli.main(["eval", str(labelled), "--mode", "dense", "--max-queries", "2", "--json", one]) == 0
    assert cli.main(["eval", str(labelled / "cities"), "--mode", "dense", "--json", other, "--compare", one]) == 0
    assert f"Before: {one}; after: this run" in capsys.readouterr().out
    assert cli.main(["eval", "--compare", one, other]) == 0
    printed = capsys.readouterr().out
    assert f"Before: {one}; after: {other}" in printed
    assert re.search(r"cities +dense \d+d +nDCG@10 .* 2\n", printed.replace(" \n", "\n"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "nothing to evaluate"),
        (["absent"], 1, "there is nothing at absent"),
        (["DATA", "--mode", "fast"], 2, "mode is 'fast'; available: 'dense'"),
        (["DATA", "--dimension", "9999"], 2, "--dimension 9999: gte-mini gives"),
        (["DATA", "--json", "absent/run.json"], 2, "there is no folder absent"),
        (["DATA", "--compare", "DATA/sts.tsv"], 1, "holds no results of an evaluation"),
    ],
)
def test_eval_says_what_it_cannot_do(
    labelled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["eval", *(argument.replace("DATA", str(labelled)) for argument in arguments)]) == code
    assert message in capsys.readouterr().err


def test_eval_refuses_a_file_it_could_not_write_and_a_set_it_could_not_read_before_it_begins(
    labelled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gte_rag.evaluation.evaluate", lambda *_, **__: pytest.fail("has begun"))
    for target in (str(labelled), "."):
        assert cli.main(["eval", str(labelled), "--json", target]) == 2
        assert "this is a folder; give a file" in capsys.readouterr().err
        assert cli.main(["explain", "a", "a", "--html", target]) == 2
        assert "this is a folder; give a file" in capsys.readouterr().err
    assert cli.main(["eval", str(labelled), "--max-queries", "1"]) == 1
    assert "whose scores do not differ" in capsys.readouterr().err
    (labelled / "zz.tsv").write_text("one column\n", encoding="utf-8")
    assert cli.main(["eval", str(labelled)]) == 1
    assert "zz.tsv" in capsys.readouterr().err


def test_eval_shows_names_as_they_are(tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = labelled / "sts[dev] [link=http:evil]x.tsv"
    (labelled / "sts.tsv").rename(odd)
    assert cli.main(["eval", str(odd), "--json", str(tmp_path / "one.json")]) == 0
    assert "sts[dev] [link=http:evil]x" in capsys.readouterr().out
    assert cli.main(["eval", "--compare", str(tmp_path / "one.json"), str(tmp_path / "one.json")]) == 2
    (tmp_path / "two.json").write_bytes((tmp_path / "one.json").read_bytes())
    assert cli.main(["eval", "--compare", str(tmp_path / "one.json"), str(tmp_path / "two.json")]) == 0
    assert "sts[dev] [link=http:evil]x" in capsys.readouterr().out


def test_control_characters_of_refused_arguments_do_not_reach_the_terminal(run: Run) -> None:
    result = run("index", f"--x{ESCAPE}]0;owned\a", "notes", "--db", "d")
    assert result.code == 2
    assert "unrecognized arguments: --x" in result.err
    assert ESCAPE not in result.err
    assert "\a" not in result.err
