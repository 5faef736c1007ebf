"""Kill an indexing process at random moments, many times, and check that nothing reported done is lost.

    python benchmarks/durability.py --rounds 200

Each round a child process continues to index 5,000 documents and is killed (SIGKILL) after a random time; another process
then opens the database and checks every record: text, dense vector, sparse vector and lexical index must belong together,
and every group the child had reported must be there. When all documents are in, the next round starts an empty database.
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
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import chromadb
import numpy as np
from chromadb.config import Settings

from gte_rag import HybridCollection
from gte_rag.records import RESERVED_KEY, open_seal
from synthetic import SyntheticEncoder

DOCUMENTS = 5000
GROUP = 50


def text_of(number: int, edition: int) -> str:
    """Return the text of a document in one of its editions."""
    return f"document {number}, edition {edition}"


def open_collection(folder: str) -> HybridCollection:
    """Open the collection with synthetic vectors."""
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    return HybridCollection(client, "durability", encoder=cast(Any, SyntheticEncoder()))


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
    """Check every record and send the list of what is wrong."""
    collection = open_collection(folder)
    encoder = collection.encoder
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
        encoding = encoder.encode_documents(texts)
        assert encoding.dense is not None
        assert encoding.sparse is not None
        cosines = np.einsum("nd,nd->n", np.asarray(found["embeddings"]), encoding.dense)
        wrong += [f"{found['ids'][row]}: dense vector of another text" for row in np.flatnonzero(cosines < 0.999)]
        for record_id, text, metadata in zip(found["ids"], texts, cast(Any, found["metadatas"]), strict=True):
            if open_seal(metadata.get(RESERVED_KEY), text, encoder.fingerprint) is None:
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


def main() -> None:
    """Run the rounds and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    fork = multiprocessing.get_context("fork")
    base = Path(tempfile.mkdtemp())
    folder, reported, edition = base / "0", 0, 0
    killed = completed = checked = 0
    survived = 0
    started = time.perf_counter()
    try:
        for round_number in range(options.rounds):
            receive, send = fork.Pipe(duplex=False)
            child = fork.Process(target=index, args=(str(folder), reported, edition, send))
            child.start()
            send.close()
            if rng.random() < 0.9:  # mostly while it writes, sometimes while it opens
                receive.poll(60)
            time.sleep(rng.uniform(0.05, 1.5))
            if child.is_alive():
                os.kill(cast(int, child.pid), signal.SIGKILL)
                killed += 1
            child.join()
            done = False
            try:
                while receive.poll():
                    message = receive.recv()
                    done = done or message == "complete"
                    reported = message if isinstance(message, int) else reported
            except EOFError:
                pass
            receive, send = fork.Pipe(duplex=False)
            checker = fork.Process(target=check, args=(str(folder), reported, edition, send))
            checker.start()
            count, wrong = receive.recv()
            checker.join()
            checked += count
            survived += not wrong
            for line in wrong[:5]:
                print(f"round {round_number}: {line}", file=sys.stderr)
            if done:  # the next rounds replace every text, or start an empty database
                completed += 1
                reported, edition = 0, edition + 1
                if edition == 2:
                    shutil.rmtree(folder)
                    folder, edition = base / str(round_number + 1), 0
    finally:
        shutil.rmtree(base)
    result = {
        "rounds": options.rounds,
        "survived": survived,
        "killed while running": killed,
        "passes over all documents": completed,
        "records checked": checked,
        "seconds": round(time.perf_counter() - started),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "chromadb": version("chromadb"),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(survived != options.rounds)


if __name__ == "__main__":
    main()
