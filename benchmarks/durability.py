"""Kill an indexing process at random moments, many times, and check that nothing reported done is lost.

    python benchmarks/durability.py --rounds 200

Each round a child process continues to index 5,000 documents and is killed (SIGKILL) at a random moment: while it opens the
database, or within one of the next 25 groups, so that the speed of the machine does not matter. In a share of the rounds
(`--aim`) it is killed just after Chroma has begun to write its graph over. Another process then opens the database and
checks every record: text, dense vector, sparse vector and lexical index must belong together, and every group the child had
reported must be there. When all documents are in, the next round replaces every text, or starts an empty database.

A kill while Chroma writes its graph can leave files that Chroma cannot read (chroma-core/chroma#7678). Opening such a
collection must be refused; it is then repaired as a user would do it, counted under "repairs", and checked. A process that
Chroma crashes counts as refused if `repair` finds the damage. Anything else is a failure. Ctrl-C ends the run early, with the
result of the rounds so far.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import chromadb
import numpy as np
from chromadb.config import Settings

from gte_rag import DamagedCollectionError, HybridCollection
from gte_rag.records import RESERVED_KEY, open_seal
from gte_rag.repair import repair_collection
from gte_rag.vectors import Encoding
from synthetic import SyntheticEncoder

NAME = "durability"
DOCUMENTS = 5000
GROUP = 50
EDITIONS = 2
# A process that takes longer than this hangs.
PATIENCE_S = 600


def text_of(number: int, edition: int) -> str:
    """Return the text of a document in one of its editions."""
    return f"document {number}, edition {edition}"


class RememberingEncoder(SyntheticEncoder):
    """Encodes every text once; the processes of all rounds inherit the vectors."""

    def __init__(self) -> None:
        super().__init__()
        texts = [text_of(number, edition) for edition in range(EDITIONS) for number in range(DOCUMENTS)]
        self._rows = {text: row for row, text in enumerate(texts)}
        self._all = super().encode_documents(texts)

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, **_: object
    ) -> Encoding:
        """Return the vectors of some of the texts."""
        assert self._all.dense is not None
        assert self._all.sparse is not None
        rows = np.array([self._rows[text] for text in texts], dtype=np.int64)
        return Encoding(self._all.dense[rows] if dense else None, self._all.sparse.take(rows) if sparse else None)


@cache
def encoder() -> Any:  # noqa: ANN401  # the type checker would not take it for an encoder
    """Return the one encoder."""
    return RememberingEncoder()


def open_collection(folder: str) -> HybridCollection:
    """Open the collection with synthetic vectors."""
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    return HybridCollection(client, NAME, encoder=encoder())


def index(folder: str, first: int, edition: int, done: Connection) -> None:
    """Write groups of documents from `first` on and report each after it is written."""
    collection = open_collection(folder)
    done.send("open")
    for start in range(first, DOCUMENTS, GROUP):
        numbers = range(start, min(start + GROUP, DOCUMENTS))
        collection.upsert(
            [f"d{number}" for number in numbers],
            [text_of(number, edition) for number in numbers],
            metadatas=[{"edition": edition} for _ in numbers],
        )
        done.send(numbers.stop)
    done.send("complete")


def check(folder: str, reported: int, edition: int, result: Connection) -> None:
    """Check every record; send how many there are and what is wrong, or that the collection is damaged."""
    try:
        collection = open_collection(folder)
    except DamagedCollectionError as error:
        result.send(str(error))
        return
    found = collection.collection.get(include=["documents", "metadatas", "embeddings"])
    texts = cast(list[str], found["documents"])
    wrong: list[str] = []
    records = dict(zip(found["ids"], texts, strict=True))
    wrong += [
        f"d{number} was reported done and is {records.get(f'd{number}')!r}"
        for number in range(reported)
        if records.get(f"d{number}") != text_of(number, edition)
    ]
    if texts:
        encoding = encoder().encode_documents(texts)
        assert encoding.dense is not None
        assert encoding.sparse is not None
        cosines = np.einsum("nd,nd->n", np.asarray(found["embeddings"]), encoding.dense)
        wrong += [f"{found['ids'][row]}: dense vector of another text" for row in np.flatnonzero(cosines < 0.999)]
        for record_id, text, metadata in zip(found["ids"], texts, cast(Any, found["metadatas"]), strict=True):
            if open_seal(metadata.get(RESERVED_KEY), text, encoder().fingerprint) is None:
                wrong.append(f"{record_id}: sparse vector of another text")
            if f"edition {metadata['edition']}" not in text:
                wrong.append(f"{record_id}: metadata of another text")
        lexical = collection.lexical_index()
        if set(lexical.ids()) != set(found["ids"]):
            wrong.append("the lexical index holds other records than the collection")
        sample = range(0, len(texts), max(1, len(texts) // 20))
        for row in sample:
            best = lexical.search(encoding.sparse[row], 1)
            if not best or best[0][0] != found["ids"][row]:
                wrong.append(f"{found['ids'][row]}: not found by its own words")
            near = collection.nearest(encoding.dense[row][None], 1)[0]
            if not near or near[0].record.id != found["ids"][row]:
                wrong.append(f"{found['ids'][row]}: not found by its own dense vector")
    result.send((len(texts), wrong))


def repair(folder: str, result: Connection) -> None:
    """Repair the collection and send what was wrong with it."""
    result.send(repair_collection(folder, NAME, encoder=encoder()).damage)


def answer(work: Callable[..., None], *arguments: object) -> Any:  # noqa: ANN401  # what the process sends
    """Return what a process sends that does some work, or an `EOFError` if it ends or hangs without an answer."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=work, args=(*arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(PATIENCE_S) else EOFError("it hangs")
    except EOFError:
        process.join()
        return EOFError(f"it ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def checked(folder: str, reported: int, edition: int) -> tuple[int, list[str], str | None]:
    """Check every record, after a repair if one is needed.

    Returns:
        The number of records, what is wrong, and the damage that was repaired.
    """
    found = answer(check, folder, reported, edition)
    if isinstance(found, tuple):
        return *found, None
    print(f"damaged: {found}", file=sys.stderr, flush=True)
    damage = answer(repair, folder)
    if not isinstance(damage, str):
        return 0, [f"cannot be checked ({found}), and repair finds: {damage}"], None
    again = answer(check, folder, reported, edition)
    if not isinstance(again, tuple):
        return 0, [f"cannot be checked after a repair: {again}"], damage
    return *again, damage


class Messages:
    """What a child has reported."""

    def __init__(self, receive: Connection) -> None:
        self._receive = receive
        self.groups = 0
        self.reported: int | None = None
        self.complete = False
        self.ended = False

    def read(self, wait_s: float = 0.0) -> bool:
        """Read one message; return whether there was one."""
        try:
            if self.ended or not self._receive.poll(wait_s):
                return False
            message = self._receive.recv()
        except EOFError:
            self.ended = True
            return False
        if isinstance(message, int):
            self.groups, self.reported = self.groups + 1, message
        self.complete = self.complete or message == "complete"
        return True


def wait_for_some_groups(messages: Messages, groups: int, rng: random.Random) -> None:
    """Wait for so many groups and then for a part of the time that the last one took."""
    last_s = 0.0
    while messages.groups < groups and not messages.ended:
        before = time.monotonic()
        if messages.read(PATIENCE_S):
            last_s = time.monotonic() - before
    time.sleep(rng.uniform(0, 1.2) * last_s if groups else rng.uniform(0.05, 1.5))


def wait_for_the_graph(messages: Messages, folder: Path, rng: random.Random) -> bool:
    """Wait until Chroma begins to write its graph over, and a few milliseconds more; return whether it has."""

    def times() -> set[int]:
        return {path.stat().st_mtime_ns for path in folder.glob("*/header.bin")}

    before = set[int]()
    while not messages.ended and not messages.complete:
        while messages.read():
            pass
        now = times()
        if before and now != before:
            time.sleep(rng.choice([0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)]))
            return True
        before = now
        time.sleep(0.0002)
    return False


def main() -> None:
    """Run the rounds and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--aim", type=float, default=0.25, help="share of rounds aimed at the writing of the graph")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    fork = multiprocessing.get_context("fork")
    base = Path(tempfile.mkdtemp())
    folder, reported, edition = base / "0", 0, 0
    killed = completed = records = aimed = rounds = 0
    encoder()
    survived = 0
    repairs: list[str] = []
    started = time.perf_counter()
    try:
        for round_number in range(options.rounds):
            receive, send = fork.Pipe(duplex=False)
            child = fork.Process(target=index, args=(str(folder), reported, edition, send))
            child.start()
            send.close()
            messages = Messages(receive)
            if rng.random() < options.aim:
                aimed += wait_for_the_graph(messages, folder, rng)
            else:
                wait_for_some_groups(messages, rng.randint(0, 25), rng)
            if child.is_alive():
                os.kill(cast(int, child.pid), signal.SIGKILL)
                killed += 1
            child.join()
            while messages.read():
                pass
            reported, done = messages.reported or reported, messages.complete
            count, wrong, damage = checked(str(folder), reported, edition)
            repairs += [f"round {round_number}: {damage}"] if damage else []
            records += count
            survived += not wrong
            rounds += 1
            if rounds % 10 == 0:
                print(f"{rounds} rounds, {len(repairs)} repairs", file=sys.stderr, flush=True)
            for line in wrong[:5]:
                print(f"round {round_number}: {line}", file=sys.stderr, flush=True)
            if done:  # the next rounds replace every text, or start an empty database
                completed += 1
                reported, edition = 0, edition + 1
                if edition == EDITIONS:
                    shutil.rmtree(folder)
                    folder, edition = base / str(round_number + 1), 0
    except KeyboardInterrupt:
        print(f"interrupted after {rounds} rounds", file=sys.stderr)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        shutil.rmtree(base)
    result = {
        "rounds": rounds,
        "survived": survived,
        "killed while running": killed,
        "killed while the graph was written": aimed,
        "passes over all documents": completed,
        "repairs": len(repairs),
        "repaired": repairs,
        "records checked": records,
        "seconds": round(time.perf_counter() - started),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "chromadb": version("chromadb"),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(survived != rounds)


if __name__ == "__main__":
    main()
