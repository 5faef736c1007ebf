"""The command line ``gte-rag``: argument parsing and printing only.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the command could not do (all of) its work,
2 it was called wrongly or a package is missing, 130 interrupted. When the reader of stdout goes away, it ends silently with 1.

Everything that takes time to import is imported where it is needed, so that ``gte-rag --help`` answers at once and works
without the optional packages.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gte_rag import __version__
from gte_rag.errors import (
    CheckpointError,
    CollectionMismatchError,
    DamagedCollectionError,
    MissingExtraError,
    missing_extra,
)

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from rich.console import Console
    from rich.text import Text

    from gte_rag.encoder import GTEEncoder
    from gte_rag.explanation import Explanation, Mark, TokenMatch
    from gte_rag.indexing import Document, IndexReport, Progress
    from gte_rag.results import Result
    from gte_rag.retriever import Hit

_DEFAULT_MODEL = "gte-mini"
# Lines of standard input that `encode` reads, encodes and prints together.
_ENCODE_GROUP = 64
# Control characters of a text, a name or a database must not reach the terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
# Characters that JSON allows in strings, and that terminals obey or that readers of lines take for the end of one.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class _CommandError(Exception):
    """A command cannot go on; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code.
    """
    _accept_every_character(sys.stdout, sys.stderr)
    resume = ""
    try:
        arguments = _parser().parse_args(argv)
        resume = arguments.resume
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse has printed help, version or a usage error
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        _say(f"interrupted{resume}")
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except _CommandError as error:
        _say(str(error))
        return error.code
    except MissingExtraError as error:
        _say(str(error))
        return 2
    except (CheckpointError, CollectionMismatchError, DamagedCollectionError, OSError) as error:
        _say(str(error))
        return 1
    except _chroma_errors("ChromaError") as error:  # a damaged or read-only database, a full disk
        _say(f"Chroma in {arguments.db}: {error}" if "db" in arguments else f"Chroma: {error}")
        return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning in one line; what libraries deprecate is for their callers and not for whoever types a command."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        _say(f"warning: {message}")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose messages repeat no control characters of the arguments."""

    def error(self, message: str) -> NoReturn:
        super().error(_harmless(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gte-rag",
        description="Dense and sparse GTE embeddings and hybrid search in a local Chroma.",
        epilog="gte-rag COMMAND --help explains a command. Start with: gte-rag demo",
    )
    parser.add_argument("--version", action="version", version=f"gte-rag {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    index = _command(commands, "index", _index, "index text and Markdown files; run again to synchronise")
    index.set_defaults(
        resume="; what is indexed so far can be searched, and the same command, run again, does the rest"
    )
    index.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a UTF-8 file, a folder (searched for .md, .markdown, .txt, .text, .rst), or - for standard input",
    )
    _add_database_options(index)
    _add_model_options(index, "the model of the index, gte-mini for a new one")
    index.add_argument(
        "--dimension",
        type=_count,
        metavar="N",
        help="length of the dense vectors (default: that of the index, the model's largest for a new one)",
    )
    index.add_argument(
        "--chunk-tokens",
        type=_count,
        metavar="N",
        help="longest passage in tokens (default: 256); documents split otherwise are split anew",
    )
    index.add_argument(
        "--remove-missing",
        action="store_true",
        help="remove what the index has of a PATH that does not exist any more (default: it is kept, and reported)",
    )

    search = _command(commands, "search", _search, "search an index")
    search.add_argument("query", metavar="QUESTION", help="a question or search words, in any language")
    _add_database_options(search)
    _add_model_options(search, "the model of the index")
    search.add_argument("-k", type=_count, default=5, metavar="N", help="number of hits (default: %(default)s)")
    search.add_argument(
        "--candidates", type=_count, metavar="N", help="nearest dense vectors that are scored (default: 100)"
    )
    search.add_argument("--dense-weight", type=_weight, metavar="X", help="weight of the cosine (default: 1.0)")
    search.add_argument("--sparse-weight", type=_weight, metavar="X", help="weight of the sparse score (default: 0.3)")
    search.add_argument("--mode", help="how passages are found: rescore, union, dense or sparse (default: rescore)")
    search.add_argument(
        "--fusion",
        help="how the scores become one: weighted, reciprocal_rank, relative_score, distribution_based (default: weighted)",
    )
    search.add_argument(
        "--where", type=_json_object, metavar="JSON", help="""Chroma's filter on metadata, e.g. '{"chunk": 0}'"""
    )
    search.add_argument("--full", action="store_true", help="print whole passages, not excerpts of them")
    search.add_argument("--json", action="store_true", help="print one JSON document and nothing else")

    repair = _command(
        commands, "repair", _repair, "mend an index that Chroma cannot read after a process was killed while it wrote"
    )
    repair.set_defaults(resume="; the same command, run again, does the rest")
    repair.add_argument("--db", required=True, type=Path, metavar="DIR", help="folder of the Chroma database")
    repair.add_argument(
        "--collection",
        action="append",
        metavar="NAME",
        help="collection in it; may be repeated (default: all that are there)",
    )
    _add_model_options(repair, "the model of the index; name it for a collection that gte-rag did not make")

    explain = _command(commands, "explain", _explain, "show which words make the score of a text for a query")
    explain.add_argument("query", metavar="QUERY", help="a question or search words")
    explain.add_argument("text", metavar="TEXT", help="the text it is compared with, or - for standard input")
    explain.add_argument(
        "--dense-weight", type=_weight, default=1.0, metavar="X", help="weight of the cosine (default: 1.0)"
    )
    explain.add_argument(
        "--sparse-weight", type=_weight, default=0.3, metavar="X", help="weight of the sparse score (default: 0.3)"
    )
    explain.add_argument("--dimension", type=_count, metavar="N", help="length of the dense vectors")
    output = explain.add_mutually_exclusive_group()
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page for the browser instead")
    output.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    _add_model_options(explain, "gte-mini")

    encode = _command(commands, "encode", _encode, "print vectors of texts as JSON lines")
    encode.add_argument("texts", nargs="*", metavar="TEXT", help="a text, or - for one text a line of standard input")
    kind = encode.add_mutually_exclusive_group()
    kind.add_argument("--query", action="store_true", help="encode as search queries")
    kind.add_argument("--document", action="store_true", help="encode as documents (the default)")
    encode.add_argument("--no-dense", action="store_true", help="leave out the dense vectors")
    encode.add_argument("--no-sparse", action="store_true", help="leave out the sparse weights")
    encode.add_argument("--tokens", action="store_true", help="key sparse weights by token strings, highest first")
    encode.add_argument("--dimension", type=_count, metavar="N", help="length of the dense vectors")
    _add_model_options(encode, "gte-mini")

    info = _command(commands, "info", _info, "show versions and what a model is")
    _add_model_options(info, "gte-mini")

    convert = _command(
        commands, "convert", _convert, "write a checkpoint in the layout other tools load without remote code"
    )
    convert.add_argument("source", metavar="NAME", help="a folder, or a Hugging Face or ModelScope id")
    convert.add_argument("folder", metavar="DIR", help="where to write: a new or empty folder")
    convert.add_argument(
        "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 (default: that of the checkpoint)"
    )

    bulk = _command(commands, "encode-files", _encode_files, "encode many files on Ray into Parquet or a vector store")
    bulk.set_defaults(resume="; finished parts are kept, and the same command, run again, does the rest")
    bulk.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a .parquet, .jsonl, .ndjson or .txt file (one text a line), or a folder with such files",
    )
    bulk.add_argument(
        "--out", required=True, metavar="DIR", help="output folder; with a store it keeps plan, marks and errors"
    )
    store = bulk.add_mutually_exclusive_group()
    store.add_argument("--qdrant", metavar="URL", help="fill a Qdrant server (key: QDRANT_API_KEY in the environment)")
    store.add_argument("--milvus", metavar="URL", help="fill a Milvus server (token: MILVUS_TOKEN in the environment)")
    store.add_argument("--chroma", metavar="URL", help="fill a Chroma server (token: CHROMA_TOKEN in the environment)")
    bulk.add_argument(
        "--collection", default="documents", metavar="NAME", help="collection of the store (default: %(default)s)"
    )
    bulk.add_argument("--id-column", default="id", metavar="NAME", help="column with the ids (default: %(default)s)")
    bulk.add_argument(
        "--text-column", default="text", metavar="NAME", help="column with the texts (default: %(default)s)"
    )
    bulk.add_argument("--columns", nargs="*", metavar="NAME", help="other columns to keep (default: all)")
    bulk.add_argument("--model", metavar="NAME", help="gte-mini, a folder or a Hugging Face id (default: gte-mini)")
    bulk.add_argument("--precision", default="auto", metavar="NAME", help="float32, bf16, int8 or auto (default: auto)")
    bulk.add_argument("--dimension", type=_count, metavar="N", help="length of the dense vectors")
    bulk.add_argument(
        "--rows-per-part", type=_count, default=4096, metavar="N", help="rows of a part (default: %(default)s)"
    )
    bulk.add_argument(
        "--workers", type=_count, metavar="N", help="number of workers (default: as many as there is room)"
    )
    bulk.add_argument("--cpus-per-worker", type=_count, metavar="N", help="cores and threads of a worker")
    bulk.add_argument("--gpus-per-worker", type=_weight, metavar="X", help="GPUs of a worker, parts of one allowed")
    bulk.add_argument("--address", metavar="ADDRESS", help="a Ray cluster (default: RAY_ADDRESS, else this machine)")
    evaluate = _command(commands, "eval", _eval, "measure a model on labelled data, or compare saved results")
    _add_evaluation_options(evaluate)

    demo = _command(commands, "demo", _demo, "index the bundled documents and answer the bundled questions")
    _add_model_options(demo, "gte-mini")
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> _Parser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, resume="")
    return parser


def _add_database_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", required=True, type=Path, metavar="DIR", help="folder of the Chroma database")
    parser.add_argument(
        "--collection", default="documents", metavar="NAME", help="collection in it (default: %(default)s)"
    )


def _add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", metavar="NAME", help=f"gte-mini, a folder or a Hugging Face id (default: {default})")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="DIR",
        help="a data set, or a folder of them: BEIR's layout (corpus.jsonl, queries.jsonl, qrels.tsv or qrels/test.tsv), "
        ".tsv of sentence and translation, .tsv of score and two sentences; all may be .gz",
    )
    _add_model_options(parser, "gte-mini")
    parser.add_argument(
        "--mode",
        action="append",
        help="dense, sparse, hybrid (two engines: a score only from the list a passage is in), rescore, union, or all; may be "
        "repeated (default: dense, sparse and union)",
    )
    parser.add_argument(
        "--dimension",
        action="append",
        type=_count_or_all,
        metavar="N",
        help="length of the dense vectors, or all that the model was trained for; may be repeated (default: the largest)",
    )
    parser.add_argument("--precision", metavar="NAME", help="float32, bf16, int8 or auto (default: auto)")
    parser.add_argument(
        "--fusion",
        action="append",
        help="weighted, reciprocal_rank, relative_score, distribution_based, calibrated, or all; may be repeated (default: "
        "weighted)",
    )
    parser.add_argument("--dense-weight", type=_weight, default=1.0, metavar="X", help="default: %(default)s")
    parser.add_argument("--sparse-weight", type=_weight, metavar="X", help="default: 0.3 for weighted, else 1.0")
    parser.add_argument(
        "--candidates",
        "--depth",
        type=_count,
        default=100,
        metavar="N",
        help="passages each side contributes to hybrid, rescore and union (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queries", type=_count, metavar="N", help="take at most so many queries or pairs of a set"
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--max-length", type=_count, metavar="N", help="cut texts after so many tokens")
    parser.add_argument(
        "--skip-same-id",
        action="store_true",
        help="leave the passage with the query's own id out of its ranking (ArguAna, Quora)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results, query by query, to a file")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="compare with results written by --json; without DIR, the first file with the others",
    )


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else _count(text)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return value


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number of at least 0")
    return value


def _json_object(text: str) -> dict[str, Any]:
    example = """give a JSON object such as '{"chunk": 0}'"""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); {example}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is a JSON {type(value).__name__}; {example}")
    return value


# --- index -------------------------------------------------------------------------------------------------------------


def _index(arguments: argparse.Namespace) -> int:
    _require("chromadb", "rich", "semantic_text_splitter")
    from gte_rag.chroma import HybridCollection
    from gte_rag.indexing import CHUNK_TOKENS, Failure, Selection, Splitter, read_file, read_stdin, select_files, sync
    from gte_rag.segments import DATABASE_FILE

    started = time.monotonic()
    named = [path for path in arguments.paths if path != "-"]
    is_database = (arguments.db / DATABASE_FILE).is_file()
    # One name that leads nowhere keeps nobody from indexing the others; if none leads anywhere, it is a slip.
    missing_ok = (arguments.remove_missing and is_database) or len(named) < len(arguments.paths)
    selection = select_files(named, missing_ok=missing_ok or any(map(os.path.lexists, named)))
    roots, missing = selection.roots, selection.missing
    if arguments.remove_missing:
        roots, missing = (*roots, *missing), ()
    if not (selection.files or selection.failed or selection.missing or "-" in arguments.paths):
        _say(f"warning: no .md, .markdown, .txt, .text or .rst files in {', '.join(arguments.paths)}")
    client, recorded = None, {}
    if is_database:
        client = _open_client(arguments.db)
        recorded = _recorded(client, arguments.collection) or {}
    elif os.path.lexists(arguments.db) and not arguments.db.is_dir():
        raise _CommandError(f"--db {arguments.db} is a file; give a folder, or the name of a new one", 1)
    encoder = _load_encoder_of_index(arguments.model, arguments.device, arguments.dimension, recorded)
    chunk_tokens = arguments.chunk_tokens or min(CHUNK_TOKENS, encoder.max_length)
    with _as_usage_error():
        Splitter(encoder, chunk_tokens=chunk_tokens)  # refuses a length out of range before a database is made
    with _as_usage_error():
        collection = HybridCollection(client or _open_client(arguments.db), arguments.collection, encoder=encoder)

    def documents(selection: Selection) -> Iterator[Document | Failure]:
        for path in missing:
            yield Failure(path, "does not exist; what the index has of it is kept (--remove-missing removes it)")
        yield from selection.failed
        if "-" in arguments.paths:
            yield read_stdin()
        yield from map(read_file, selection.files)

    total = len(selection.files) + len(selection.failed) + len(missing) + ("-" in arguments.paths)
    with _progress(total) as on_progress:
        report = sync(
            collection,
            documents(selection),
            roots=roots,
            chunk_tokens=chunk_tokens,
            on_progress=on_progress,
        )
    for failure in report.failed:
        _say(f"set aside: {_shown_path(failure.source)} {failure.reason}")
    _print(_summary(report, selection.ignored, collection.count(), time.monotonic() - started))
    return 1 if report.failed else 0


def _summary(report: IndexReport, ignored: int, count: int, seconds: float) -> str:
    parts = [
        f"{report.added} added, {report.updated} updated, {report.unchanged} unchanged, {report.removed} removed",
        *([f"{len(report.failed)} set aside"] if report.failed else []),
        *([f"{report.empty} without text"] if report.empty else []),
        *([f"{ignored} files of other kinds passed over"] if ignored else []),
    ]
    return f"{', '.join(parts)}; {report.chunks} passages written, {count} in the index ({seconds:.1f} s)"


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """Show on a terminal how far indexing has come; elsewhere show nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = _console(sys.stderr)
    written = TextColumn("passages written: {task.fields[chunks]}")
    columns = (TextColumn("documents"), BarColumn(), MofNCompleteColumn(), written, TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, chunks=0)
        yield lambda done, chunks: bar.update(task, completed=done, chunks=chunks)


# --- search ------------------------------------------------------------------------------------------------------------


def _search(arguments: argparse.Namespace) -> int:
    _require("chromadb", "rich")
    from gte_rag.chroma import MODEL_KEY, HybridCollection
    from gte_rag.retriever import HybridRetriever
    from gte_rag.segments import DATABASE_FILE

    if not (arguments.db / DATABASE_FILE).is_file():
        raise _CommandError(
            f"there is no index in {arguments.db}; make one:  gte-rag index PATH --db {arguments.db}", 1
        )
    client = _open_client(arguments.db)
    recorded = _recorded(client, arguments.collection)
    if recorded is None:
        names = ", ".join(sorted(collection.name for collection in client.list_collections())) or "none"
        raise _CommandError(
            f"{arguments.db} has no collection {arguments.collection!r}; it has: {names}. Choose with --collection", 1
        )
    if MODEL_KEY not in recorded:
        raise _CommandError(f"collection {arguments.collection!r} was not made by gte-rag; index into another one", 1)
    if not client.get_collection(arguments.collection, embedding_function=None).count():
        raise _CommandError(f"collection {arguments.collection!r} in {arguments.db} is empty; index something first", 1)
    encoder = _load_encoder_of_index(arguments.model, arguments.device, None, recorded)
    collection = HybridCollection(client, arguments.collection, encoder=encoder)
    named = ("candidates", "mode", "fusion", "dense_weight", "sparse_weight")
    options = {name: value for name in named if (value := getattr(arguments, name)) is not None}
    with _as_usage_error():
        hits = HybridRetriever(collection, k=arguments.k, **options).search(arguments.query, where=arguments.where)
    if arguments.json:
        _print_json(
            {
                "query": arguments.query,
                "model": encoder.name,
                "collection": arguments.collection,
                "hits": [_hit_as_json(rank, hit) for rank, hit in enumerate(hits, start=1)],
            }
        )
        return 0
    if not hits:
        _say("no passage fits --where" if arguments.where else "no passage shares a token with the query")
    console = _console(sys.stdout)
    for rank, hit in enumerate(hits, start=1):
        if rank > 1:
            console.print()
        _print_hit(console, encoder, rank, hit, _origin(hit), full=arguments.full)
    return 0


def _hit_as_json(rank: int, hit: Hit) -> dict[str, Any]:
    return {
        "rank": rank,
        "id": hit.id,
        "score": hit.score,
        "dense_score": hit.dense_score,
        "sparse_score": hit.sparse_score,
        "metadata": hit.metadata,
        "text": hit.text,
        "matches": [_match_as_json(match) for match in hit.matches],
    }


def _match_as_json(match: TokenMatch) -> dict[str, Any]:
    return {"token": match.token, "query_weight": match.query_weight, "document_weight": match.document_weight}


def _origin(hit: Hit) -> str:
    """Return where a hit comes from: path, heading, and which of the document's passages it is."""
    source, heading = hit.metadata.get("source"), hit.metadata.get("heading")
    chunk, chunks = hit.metadata.get("chunk"), hit.metadata.get("chunks")
    parts = [_shown_path(source) if isinstance(source, str) else hit.id]
    if heading:
        parts.append(f"› {heading}")
    if isinstance(chunk, int) and isinstance(chunks, int) and chunks > 1:
        parts.append(f"({chunk + 1}/{chunks})")
    return " ".join(parts)


def _print_hit(console: Console, encoder: GTEEncoder, rank: int, hit: Hit, origin: str, *, full: bool) -> None:
    from rich.text import Text

    console.print(
        Text.assemble(
            (f"{rank}. ", "bold"),
            (f"{hit.score:.3f}", "bold"),
            (f"  dense {hit.dense_score:.3f}, sparse {hit.sparse_score:.3f}  ", "dim"),
            (_harmless(origin).replace("\n", " "), "cyan"),
        ),
        soft_wrap=True,
    )
    text = _passage(encoder, hit, full=full)
    width = max(20, console.width - 3)
    lines: Iterable[Text] = text.wrap(console, width) if console.is_terminal else text.split("\n")
    for line in lines:
        line.rstrip()
        console.print(Text("   ") + line if line else line, soft_wrap=True)


def _passage(encoder: GTEEncoder, hit: Hit, *, full: bool) -> Text:
    from rich.text import Text

    from gte_rag.explanation import explain_hit
    from gte_rag.highlighting import excerpt

    marks = explain_hit(encoder, "", hit).text_marks
    start, end = (0, len(hit.text)) if full else excerpt(hit.text, [(mark.start, mark.end) for mark in marks])
    text = _marked(hit.text, marks)[start:end]
    text.rstrip()
    return Text.assemble("… " if start else "", text, " …" if end < len(hit.text) else "")


def _marked(text: str, marks: Iterable[Mark]) -> Text:
    from rich.text import Text

    marked = Text(_harmless(text))  # the same length: marks keep their places
    for mark in marks:
        marked.stylize("bold yellow", mark.start, mark.end)
    return marked


# --- repair ------------------------------------------------------------------------------------------------------------


def _repair(arguments: argparse.Namespace) -> int:
    _require("chromadb")
    from gte_rag.segments import DATABASE_FILE

    if not (arguments.db / DATABASE_FILE).is_file():
        raise _CommandError(f"{arguments.db} is no Chroma database: there is no {DATABASE_FILE} in it", 1)
    client = _open_client(arguments.db)
    known = sorted(collection.name for collection in client.list_collections())
    names = list(dict.fromkeys(arguments.collection or known))
    for name in names:
        if name not in known:
            raise _CommandError(f"{arguments.db} has no collection {name!r}; it has: {', '.join(known) or 'none'}", 1)
    failed = False
    for name in names:
        try:
            _repair_one(arguments, name, _recorded(client, name, damaged=True) or {})
        except (_CommandError, CheckpointError, CollectionMismatchError, ValueError, RuntimeError) as error:
            _say(f"{name}: {error}")
            failed = True
    return int(failed)


def _repair_one(arguments: argparse.Namespace, name: str, recorded: Mapping[str, Any]) -> None:
    from gte_rag.chroma import MODEL_KEY
    from gte_rag.repair import find_damage, repair_collection

    started = time.monotonic()
    damage = find_damage(arguments.db, name)
    if damage is None:
        _print(f"{name}: whole, nothing was changed")
        return
    _say(f"{name}: {damage}")
    if MODEL_KEY not in recorded and arguments.model is None:
        raise _CommandError(
            "gte-rag did not make this collection; name the model that made its vectors: --model NAME", 1
        )
    encoder = _load_encoder_of_index(arguments.model, arguments.device, None, recorded)
    report = repair_collection(
        arguments.db,
        name,
        encoder=encoder,
        adopt=arguments.model is not None,
        show_progress=sys.stderr.isatty(),
    )
    seconds = time.monotonic() - started
    _print(f"{name}: mended; {report.encoded:,} of {report.records:,} texts encoded again ({seconds:.1f} s)")
    if report.moved_to is not None:
        _print(f"{name}: the damaged files are in {report.moved_to}; delete them when the index is as it should be")


# --- explain -----------------------------------------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    _require("rich")
    from gte_rag.explanation import explain

    encoder = _load_encoder(arguments.model, arguments.device, arguments.dimension)
    if not encoder.has_sparse:
        raise _CommandError(f"{encoder.name} gives no sparse vectors, so no token matches; choose another --model", 1)
    if arguments.html:
        _check_target("--html", arguments.html)
    text = arguments.text if arguments.text != "-" else "\n".join(_lines_of_stdin())
    with _as_usage_error():
        explanation = explain(
            encoder,
            arguments.query,
            text,
            dense_weight=arguments.dense_weight,
            sparse_weight=arguments.sparse_weight,
        )
    if arguments.json:
        _print_json(
            {
                "query": explanation.query,
                "text": explanation.text,
                "model": explanation.model,
                "score": explanation.score,
                "dense_score": explanation.dense_score,
                "sparse_score": explanation.sparse_score,
                "dense_weight": explanation.dense_weight,
                "sparse_weight": explanation.sparse_weight,
                "matches": [
                    {**_match_as_json(match), "product": match.weight, "share": explanation.share(match)}
                    for match in explanation.matches
                ],
                "unmatched": [
                    {"token": token, "query_weight": weight} for token, weight in explanation.unmatched or ()
                ],
            }
        )
    elif arguments.html:
        _write_whole(arguments.html, explanation.to_html())
        _print(f"wrote {arguments.html}: {explanation.formula}")
    else:
        _print_explanation(_console(sys.stdout), explanation)
    return 0


def _print_explanation(console: Console, explanation: Explanation) -> None:
    from rich.table import Table
    from rich.text import Text

    from gte_rag.explanation import shown_token

    console.print(
        Text.assemble((explanation.formula, "bold"), (f"  ({_harmless(explanation.model)})", "dim")), soft_wrap=True
    )
    for name, text, marks in (
        ("Query", explanation.query, explanation.query_marks),
        ("Text", explanation.text, explanation.text_marks),
    ):
        console.print(
            Text.assemble("\n", (f"{name}: ", "cyan"), _marked(text, marks)), soft_wrap=not console.is_terminal
        )
    console.print()
    if explanation.matches:
        table = Table(box=None, pad_edge=False, header_style="cyan")
        table.add_column("token", overflow="fold")
        for heading in ("query", "text", "product", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for match in explanation.matches:
            share = explanation.share(match)
            numbers = (f"{weight:.3f}" for weight in (match.query_weight, match.document_weight, match.weight))
            table.add_row(
                Text(_harmless(shown_token(match.token))),
                *numbers,
                f"{share:.0%}",
                Text("▇" * round(20 * share), "yellow"),
            )
        console.print(table)
    else:
        console.print("Query and text share no token.")
    if explanation.unmatched:
        lacking = ", ".join(f"{shown_token(token)} {weight:.3f}" for token, weight in explanation.unmatched)
        console.print(
            Text.assemble("\n", ("Only in the query: ", "cyan"), _harmless(lacking)), soft_wrap=not console.is_terminal
        )


def _check_target(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before work is done for it."""
    if path.is_dir() or not path.name:
        raise _CommandError(f"{option} {path}: this is a folder; give a file", 2)
    if not path.parent.is_dir():
        raise _CommandError(f"{option} {path}: there is no folder {path.parent}", 2)


def _write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- encode, info, demo ------------------------------------------------------------------------------------------------


def _encode(arguments: argparse.Namespace) -> int:
    if arguments.no_dense and arguments.no_sparse:
        raise _CommandError("--no-dense and --no-sparse leave nothing to print; give one of them at most", 2)
    if not arguments.texts and sys.stdin.isatty():
        raise _CommandError("nothing to encode; give a TEXT, or - to read one text a line from standard input", 2)
    encoder = _load_encoder(arguments.model, arguments.device, arguments.dimension)
    if not encoder.has_sparse and not arguments.no_sparse:
        raise _CommandError(f"{encoder.name} gives no sparse vectors; add --no-sparse", 1)
    texts = _lines_of_stdin() if arguments.texts in ([], ["-"]) else iter(arguments.texts)
    encode = encoder.encode_queries if arguments.query else encoder.encode_documents
    while group := list(itertools.islice(texts, _ENCODE_GROUP)):
        with _as_usage_error():
            encoding = encode(group, dense=not arguments.no_dense, sparse=not arguments.no_sparse)
        for row, text in enumerate(group):
            line: dict[str, Any] = {"text": text}
            if encoding.dense is not None:
                line["dense"] = _shortest(encoding.dense[row])
            if encoding.sparse is not None:
                vector = encoding.sparse[row]
                line["sparse"] = (
                    {token: _shortest([weight])[0] for token, weight in encoder.token_weights(vector).items()}
                    if arguments.tokens
                    else dict(zip(map(str, vector.indices.tolist()), _shortest(vector.values), strict=True))
                )
            _print_json(line, indent=None)
    return 0


def _lines_of_stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _CommandError(
                f"line {number} of standard input is not UTF-8 ({error.reason}); convert it", 1
            ) from None


def _shortest(values: Iterable[Any]) -> list[float]:
    """Return float32 numbers as the shortest decimals that name them."""
    import numpy as np

    return [float(str(np.float32(value))) for value in values]


def _info(arguments: argparse.Namespace) -> int:
    encoder = _load_encoder(arguments.model, arguments.device, None)
    packages = (
        "torch",
        "tokenizers",
        "numpy",
        "chromadb",
        "semantic-text-splitter",
        "langchain-core",
        "llama-index-core",
    )
    config = encoder.config
    rows = [
        ("gte-rag", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in packages),
        ("model", encoder.name),
        ("parameters", f"{encoder.num_parameters:,}"),
        ("dimension", f"{config.hidden_size}, or {config.min_dimension} and more"),
        ("max length", f"{encoder.max_length:,} tokens"),
        ("vocabulary", f"{encoder.vocab_size:,} tokens"),
        ("sparse head", "yes" if encoder.has_sparse else "no"),
        ("query prompt", repr(encoder.query_prompt) if encoder.query_prompt else "none"),
        ("device", str(encoder.device)),
        ("precision", encoder.precision),
        ("fused", "yes" if encoder.fused else "no (on a CPU with vector instructions: pip install 'gte-rag[fast]')"),
        ("fingerprint", encoder.fingerprint),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        _print(f"{name:<{width}}  {value}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from gte_rag.checkpoint import convert

    with _as_usage_error():
        checkpoint = convert(arguments.source, arguments.folder, dtype=arguments.dtype)
    head = (
        "with its sparse head"
        if checkpoint.sparse_head
        else "with its reranking head"
        if checkpoint.rerank_head
        else "dense"
    )
    _print(
        f"{arguments.folder} holds {arguments.source} ({head}); transformers and sentence-transformers load it as it is"
    )
    return 0


def _encode_files(arguments: argparse.Namespace) -> int:
    _require("rich")
    from gte_rag.distributed import ChromaSink, MilvusSink, QdrantSink, Sink, encode_files
    from gte_rag.errors import BulkError

    name, environment = arguments.collection, os.environ
    sink: Sink | None = None
    if arguments.qdrant:
        sink = QdrantSink(arguments.qdrant, name, environment.get("QDRANT_API_KEY"))
    elif arguments.milvus:
        sink = MilvusSink(arguments.milvus, name, environment.get("MILVUS_TOKEN"))
    elif arguments.chroma:
        sink = ChromaSink(arguments.chroma, name, environment.get("CHROMA_TOKEN"))
    with _rows_progress() as on_progress, _as_usage_error():
        try:
            report = encode_files(
                arguments.paths,
                arguments.out,
                to=sink,
                model=arguments.model or _DEFAULT_MODEL,
                precision=arguments.precision,
                dimension=arguments.dimension,
                id_column=arguments.id_column,
                text_column=arguments.text_column,
                columns=arguments.columns,
                rows_per_part=arguments.rows_per_part,
                workers=arguments.workers,
                cpus_per_worker=arguments.cpus_per_worker,
                gpus_per_worker=arguments.gpus_per_worker,
                address=arguments.address,
                on_progress=on_progress,
            )
        except BulkError as error:
            raise _CommandError(str(error), 1) from error
    if report.set_aside:
        _say(f"{report.set_aside:,} rows or files set aside; the reasons are in {_shown_path(report.errors_file)}")
    if report.abandoned:
        _say(
            f"{report.abandoned} parts killed their worker every time and are missing; the same command tries them again"
        )
    if report.truncated:
        _say(f"warning: {report.truncated:,} texts are too long for the model and were cut")
    earlier = f", {report.earlier} of them by earlier runs" if report.earlier else ""
    _print(
        f"{report.written:,} of {report.rows:,} rows written in {report.parts} parts{earlier} ({report.seconds:.1f} s)"
    )
    return 1 if report.set_aside or report.abandoned else 0


@contextmanager
def _rows_progress() -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how many rows are done; elsewhere show nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = _console(sys.stderr)
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- eval --------------------------------------------------------------------------------------------------------------

# Words for people: heading of a task's table, and its measures.
_TASKS = {
    "retrieval": (
        "Retrieval",
        {"ndcg@10": "nDCG@10", "recall@20": "recall@20", "recall@100": "recall@100", "mrr@10": "MRR@10"},
    ),
    "bitext": ("Bitext", {"f1": "F1", "accuracy": "accuracy", "f1_back": "F1 back", "accuracy_back": "accuracy back"}),
    "similarity": ("Similarity", {"spearman": "Spearman", "pearson": "Pearson"}),
}


def _eval(arguments: argparse.Namespace) -> int:
    _require("rich", extra="eval")
    from gte_rag.results import read, save

    with _as_data_error():
        saved = {path: read(path) for path in arguments.compare}
    if not arguments.paths and len(saved) < 2:
        raise _CommandError("nothing to evaluate; give a DIR, or --compare with at least two different files", 2)
    if arguments.json:
        _check_target("--json", arguments.json)
    console = _console(sys.stdout)
    results: list[Result] = []
    if arguments.paths:
        results = _evaluated(arguments)
        _print_results(console, results)
        if arguments.json:
            save(results, arguments.json)
    runs = [(str(path), saved[path]) for path in saved]
    if results:
        for name, run in runs:
            _print_comparisons(console, run, results, name, "this run")
    else:
        for name, run in runs[1:]:
            _print_comparisons(console, runs[0][1], run, runs[0][0], name)
    return 0


def _evaluated(arguments: argparse.Namespace) -> list[Result]:
    """Evaluate the data sets one after the other; a progress line on a terminal says which."""
    _require("ir_measures", extra="eval")
    from gte_rag.datasets import Dataset, find, load, names
    from gte_rag.evaluation import MODES, evaluate
    from gte_rag.fusion import FUSIONS

    def read(path: Path, name: str) -> Dataset:
        dataset = load(path, name=name)
        return dataset if arguments.max_queries is None else dataset.sample(arguments.max_queries, seed=arguments.seed)

    with _as_data_error():
        found = list(dict.fromkeys(path for root in arguments.paths for path in find(root)))
        named = list(zip(found, names(found), strict=True))
        for path, name in named:  # all of them before hours are spent on the first
            read(path, name)
    encoder = _load_encoder(
        arguments.model, arguments.device, None, precision=arguments.precision, max_length=arguments.max_length
    )
    modes = arguments.mode or (["dense", "sparse", "union"] if encoder.has_sparse else ["dense"])
    dimensions = arguments.dimension
    if dimensions is not None and "all" in dimensions:
        dimensions = sorted(encoder.config.matryoshka_dimensions) or [encoder.dimension]
    for dimension in dimensions or ():
        if not encoder.config.min_dimension <= dimension <= encoder.dimension:
            raise _CommandError(
                f"--dimension {dimension}: {encoder.name} gives {encoder.config.min_dimension} to {encoder.dimension}",
                2,
            )
    fusions = arguments.fusion or ["weighted"]
    results: list[Result] = []
    show_progress = sys.stderr.isatty()
    for number, (path, name) in enumerate(named, start=1):
        with _as_data_error():
            dataset = read(path, name)
        if show_progress:
            _say(f"{dataset.name} ({number} of {len(found)}), {len(dataset)} queries or pairs")
        with _as_usage_error():
            results += evaluate(
                encoder,
                dataset,
                modes=MODES if "all" in modes else modes,
                dimensions=dimensions,
                fusions=list(FUSIONS) if "all" in fusions else fusions,
                dense_weight=arguments.dense_weight,
                sparse_weight=arguments.sparse_weight,
                candidates=arguments.candidates,
                skip_same_id=arguments.skip_same_id,
                show_progress=show_progress,
            )
    return results


def _print_results(console: Console, results: Sequence[Result]) -> None:
    """Print a table for each task, with the mean of each way of searching where there are several sets."""
    for task, (heading, measures) in _TASKS.items():
        of_task = [result for result in results if result.task == task]
        if not of_task:
            continue
        rows = [
            [result.dataset, result.method, *(f"{result.scores[name]:.4f}" for name in measures), f"{result.queries:,}"]
            for result in of_task
        ]
        methods = dict.fromkeys(result.method for result in of_task)
        for method in methods if len({result.dataset for result in of_task}) > 1 else ():
            same = [result for result in of_task if result.method == method]
            means = (f"{sum(result.scores[name] for result in same) / len(same):.4f}" for name in measures)
            rows.append([f"mean of {len(same)}", method, *means, ""])
        count = "queries" if task == "retrieval" else "pairs"
        _print_table(console, f"{heading}: {of_task[0].model}", ["set", "method", *measures.values(), count], rows)


def _print_comparisons(
    console: Console, first: Sequence[Result], second: Sequence[Result], first_name: str, second_name: str
) -> None:
    from gte_rag.results import compare, paired

    with _as_data_error():
        comparisons = [compare(*pair) for pair in paired(first, second)]
    if not comparisons:
        _say(f"{first_name} and {second_name} have no data set, mode and fusion in common; nothing to compare")
        return
    rows = []
    for one in comparisons:
        measure = _TASKS[one.second.task][1][one.score]
        dimensions = {one.first.dimension, one.second.dimension}
        method = one.second.method + (f" (was {one.first.dimension}d)" if len(dimensions) > 1 else "")
        figures = (f"{one.first_score:.4f}", f"{one.second_score:.4f}", f"{one.difference:+.4f}")
        chance = ("", "") if math.isnan(one.p_value) else (f"{one.error:.4f}", f"{one.p_value:.4f}")
        rows.append([one.second.dataset, method, measure, *figures, *chance, f"{one.queries:,}" if one.queries else ""])
    headings = ["set", "method", "measure", "before", "after", "change", "s.e.", "p", "queries"]
    _print_table(console, f"Before: {first_name}; after: {second_name}", headings, rows)
    better, worse = (
        sum(1 for one in comparisons if sign * one.difference > 0 and one.p_value < 0.05) for sign in (1, -1)
    )
    mean = sum(one.difference for one in comparisons) / len(comparisons)
    tested = sum(1 for one in comparisons if not math.isnan(one.p_value))
    _print(
        f"Mean change {mean:+.4f} over {len(comparisons)} rows; of {tested} tested, {better} better and {worse} worse "
        "with p < 0.05 (paired randomisation test; some of many rows differ by chance)."
    )


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: on a narrow terminal its words wrap, elsewhere it is as wide as it needs to be."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    _print(_harmless(title))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        widths = [len(heading), *(len(row[place]) for row in rows)]
        table.add_column(
            heading,
            justify="left" if place < 2 else "right",
            overflow="fold",
            min_width=max(widths) if place > 1 else 8,
        )
    for row in rows:
        table.add_row(*(Text(_harmless(cell)) for cell in row))  # a plain string would be read as markup
    if not console.is_terminal:
        console.width = 1000  # tables do not expand
    console.print(table)


@contextmanager
def _as_data_error() -> Iterator[None]:
    """Report data that cannot be read or compared."""
    try:
        yield
    except ValueError as error:
        raise _CommandError(str(error), 1) from error


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _demo(arguments: argparse.Namespace) -> int:
    _require("chromadb", "rich")
    from gte_rag import demo

    encoder = _load_encoder(arguments.model, arguments.device, None)
    console = _console(sys.stdout)
    started = time.monotonic()
    documents = {document.id: document for document in demo.read_documents()}
    languages = {document.language for document in documents.values()}
    console.print(
        f"Indexing {len(documents)} documents in {len(languages)} languages with {encoder.name} …", markup=False
    )
    right = count = 0
    for answer in demo.answers(encoder):
        console.print()
        console.print(f"? {answer.question.question}", style="bold", markup=False, soft_wrap=True)
        for rank, hit in enumerate(answer.hits, start=1):
            mark = " ✓" if rank == 1 and answer.is_right else ""
            document = documents[hit.id]
            _print_hit(console, encoder, rank, hit, f"{document.title} [{document.language}]{mark}", full=False)
        right += answer.is_right
        count += 1
    console.print()
    _print(f"{right} of {count} questions have the right document first ({time.monotonic() - started:.1f} s).")
    _print("Index your own files:   gte-rag index PATH --db ./index")
    _print('and ask them:           gte-rag search "your question" --db ./index')
    return 0


# --- shared ------------------------------------------------------------------------------------------------------------


def _require(*modules: str, extra: str = "cli") -> None:
    for module in modules:
        if module not in sys.modules and find_spec(module) is None:
            raise missing_extra(module.replace("_", "-"), extra)


def _load_encoder(
    model: str | None,
    device: str | None,
    dimension: int | None,
    *,
    precision: str | None = None,
    max_length: int | None = None,
    local_files_only: bool = False,
) -> GTEEncoder:
    from gte_rag.encoder import GTEEncoder

    name = model or _DEFAULT_MODEL
    if name != _DEFAULT_MODEL and os.path.isdir(name):
        name = os.path.abspath(name)  # an index remembers it and may be searched from elsewhere
    given: dict[str, Any] = {
        key: value for key, value in (("precision", precision), ("max_length", max_length)) if value is not None
    }
    with _as_usage_error():
        return GTEEncoder.from_pretrained(
            name, device=device, dimension=dimension, local_files_only=local_files_only, **given
        )


def _load_encoder_of_index(
    model: str | None, device: str | None, dimension: int | None, recorded: Mapping[str, Any]
) -> GTEEncoder:
    """Load the model that a collection remembers, or one that was named in its place."""
    from gte_rag.chroma import DIMENSION_KEY, FINGERPRINT_KEY, MODEL_KEY

    if model is None:
        name = recorded.get(MODEL_KEY)
        try:
            return _load_encoder(name, device, dimension or recorded.get(DIMENSION_KEY), local_files_only=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. The index names this model, and only what is on this machine is loaded for it; if you trust the "
                f"name, give it yourself: --model {name}"
            ) from error
    encoder = _load_encoder(model, device, dimension)
    if dimension is None and recorded.get(FINGERPRINT_KEY) == encoder.fingerprint:  # the same model by another name
        encoder = _load_encoder(model, device, recorded[DIMENSION_KEY])
    return encoder


def _open_client(folder: Path) -> ClientAPI:
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))


def _recorded(client: ClientAPI, name: str, *, damaged: bool = False) -> dict[str, Any] | None:
    """Return what a collection, which may be damaged, remembers of its model; None if there is no such collection."""
    from chromadb.errors import NotFoundError

    from gte_rag.chroma import DIMENSION_KEY, FINGERPRINT_KEY, MODEL_KEY, refuse_damaged

    try:
        collection = client.get_collection(name, embedding_function=None)
    except NotFoundError:
        return None
    if not damaged:
        refuse_damaged(client, collection)
    recorded = dict(collection.metadata or {})
    for key, kind in ((FINGERPRINT_KEY, str), (MODEL_KEY, str), (DIMENSION_KEY, int)):
        if key in recorded and type(recorded[key]) is not kind:
            raise _CommandError(
                f"collection {name!r} has {recorded[key]!r:.80} as {key}, which gte-rag does not write: it is damaged or "
                "was made by hand; index into another one",
                1,
            )
    return recorded


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """Report what the called code refuses as a wrong call: a dimension, a device, a filter, a name."""
    try:
        yield
    except (CheckpointError, CollectionMismatchError):
        raise
    except ValueError as error:
        raise _CommandError(str(error), 2) from error
    except _chroma_errors("InvalidArgumentError") as error:
        raise _CommandError(str(error), 2) from error


def _chroma_errors(name: str) -> tuple[type[Exception], ...]:
    """Return Chroma's exception of this name; none while Chroma is not imported."""
    errors = sys.modules.get("chromadb.errors")
    return (getattr(errors, name),) if errors else ()


def _console(stream: TextIO) -> Console:
    """Return a console without colour and other escape codes when the stream is piped or NO_COLOR is set."""
    from rich.console import Console

    return Console(file=stream, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


def _shown_path(source: str) -> str:
    """Return a path relative to the working directory where that is shorter, without control characters."""
    folder = os.getcwd().rstrip(os.sep) + os.sep
    return _harmless(source.removeprefix(folder)).replace("\n", "\ufffd")


def _harmless(text: str) -> str:
    return text.translate(_CONTROLS)


def _print(line: str) -> None:
    print(_harmless(line))


def _print_json(value: dict[str, Any], indent: int | None = 2) -> None:
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, ensure_ascii=not is_unicode, indent=indent).translate(_JSON_ESCAPES))


def _say(message: str) -> None:
    print(f"gte-rag: {_harmless(' '.join(message.split()))}", file=sys.stderr)


def _accept_every_character(*streams: TextIO) -> None:
    """Let characters that a stream cannot write become escapes instead of a crash."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _abandon_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's own flush at exit is silent, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
