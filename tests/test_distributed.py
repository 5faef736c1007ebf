"""Bulk encoding: every id once whatever is killed, resumed runs, rows set aside, and the stores."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("ray")

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from checkpoints import TEXTS, build, find_variant
from gte_rag import BulkError, CollectionMismatchError, GTEEncoder, HybridCollection, sinks
from gte_rag.cluster import Cluster, start_ray
from gte_rag.corpus import Columns, Rows, select_sources
from gte_rag.distributed import ERRORS_FILE, BulkReport, ChromaSink, MilvusSink, QdrantSink, encode_files
from qdrant_server import QdrantServer, qdrant_server

ROWS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build(find_variant("multilingual-base"), tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tiny(model: str) -> GTEEncoder:
    return GTEEncoder.from_pretrained(model, device="cpu")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray of two cores for the module."""
    start_ray("local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]  # workers cannot import the tests
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def qdrant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    """Qdrant's engine on loopback."""
    pytest.importorskip("qdrant_client")
    pytest.importorskip("qdrant_edge")
    with qdrant_server(tmp_path_factory.mktemp("qdrant")) as server:
        yield server


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run scan and workers in this process, one after the other, through the same JSON."""

    def results(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return (json.loads(function({"item": json.dumps(item)})["result"]) for item in items)

    monkeypatch.setattr(Cluster, "map", lambda self, function, items: results(function, items))
    monkeypatch.setattr(Cluster, "pool", lambda self, worker, given, items: results(worker(1, 0, *given), items))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"id": f"a{n}", "text": TEXTS[n % len(TEXTS)], "n": n} for n in range(ROWS)])
    return folder


def write_jsonl(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ids_of(folder: Path) -> list[str]:
    ids: list[str] = pq.read_table(folder).column("id").to_pylist()
    return ids


def errors_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ERRORS_FILE).read_text(encoding="utf-8").splitlines()]


def run(corpus: Path, out: Path, model: str, **options: Any) -> BulkReport:
    return encode_files([corpus], out, **{"model": model, "rows_per_part": 10, **options})


# --- on Ray ------------------------------------------------------------------------------------------------------------


class KillsItsWorker(sinks.Sink):
    """A sink that kills its worker, once, at a certain part: when it has been encoded, or only when it has been written.

    A worker begins to write when there are two of them, each of which has left its number in `together`.
    """

    def __init__(self, sink: sinks.Sink, part: int, folder: Path, *, written: bool) -> None:
        self.sink, self.part, self.written = sink, part, written
        self.killed, self.together = folder / "killed", folder / "together"

    def faults(self) -> tuple[type[Exception], ...]:
        return self.sink.faults()

    def describe(self) -> dict[str, str]:
        return self.sink.describe()

    def prepare(self, encoder: GTEEncoder) -> None:
        self.sink.prepare(encoder)

    def open(self, encoder: GTEEncoder, schema: pa.Schema) -> sinks.Writer:
        writer = self.sink.open(encoder, schema)
        write, encode = writer.write, encoder.encode_documents
        current = -1

        def die(number: int) -> None:
            if number == self.part and not self.killed.exists():
                self.killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

        def encode_and_die(*args: Any, **options: Any) -> Any:
            encoding = encode(*args, **options)
            die(-1 if self.written else current)
            return encoding

        def write_and_die(number: int, rows: Rows) -> None:
            nonlocal current
            current = number
            (self.together / str(os.getpid())).touch()
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and len(list(self.together.iterdir())) < 2:
                time.sleep(0.02)
            write(number, rows)
            die(number)

        encoder.encode_documents = encode_and_die  # type: ignore[method-assign]
        writer.write = write_and_die  # type: ignore[method-assign]
        return writer


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["parquet", "qdrant", "milvus"])
def test_a_worker_killed_in_the_middle_of_a_part_costs_and_doubles_nothing(
    corpus: Path, tmp_path: Path, model: str, tiny: GTEEncoder, kind: str, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    sink = sinks.ParquetSink(str(out)) if kind == "parquet" else server_sink(kind, request)
    # What stores are for: the part is there when the worker dies, and is written once more.
    killing = KillsItsWorker(sink, 5, tmp_path, written=kind != "parquet")
    killing.together.mkdir()
    report = run(corpus, out, model, to=killing, workers=2, cpus_per_worker=1)
    assert (report.written, report.set_aside, report.abandoned, report.parts) == (ROWS, 0, 0, 12)
    state = out / "_gte_rag"
    attempts = (state / "begun" / "00005").read_text().split()
    assert attempts[0] == killing.killed.read_text()
    assert len(attempts) == 2
    workers = {json.loads(mark.read_text())["worker"] for mark in state.glob("done/*")}
    assert len(list(killing.together.iterdir())) > 1, "there was only one worker"
    assert os.getpid() not in workers
    assert attempts[1] in {str(worker) for worker in workers}
    found = stored(sink)
    assert sorted(found) == sorted(f"a{n}" for n in range(ROWS))
    expected = tiny.encode_documents(TEXTS)
    assert expected.dense is not None
    assert expected.sparse is not None
    for row_id, (text, n, dense, sparse) in found.items():
        row = int(row_id[1:]) % len(TEXTS)
        assert (text, n) == (TEXTS[row], int(row_id[1:]))
        # Other neighbours in the batch: the rounding of float32.
        np.testing.assert_allclose(dense, expected.dense[row], atol=1e-5)
        indices = expected.sparse[row].indices.tolist()
        if kind == "milvus" and not indices:  # it refuses an empty vector
            assert sparse.pop(0) < 1e-5
        assert sorted(sparse) == indices
        np.testing.assert_allclose([sparse[index] for index in indices], expected.sparse[row].values, atol=1e-4)
    # Without the wrapper it is the same run, and finished.
    assert run(corpus, out, model, to=sink).earlier == 12


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_there_is_room_for_are_refused_instead_of_waited_for() -> None:
    with pytest.raises(ValueError, match="room for 2 workers of 1 CPUs and 0 GPUs each, and 3 are wanted"):
        list(Cluster(None, 3, 1, 0).pool(dict, (), [1]))


@pytest.mark.parametrize(
    "message", ["The current node timed out during startup. This could", "Timed out waiting for file /tmp/ray"]
)
@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (1, 2), (2, 2)])
def test_a_slow_start_of_ray_is_tried_once_more_and_then_reported(
    monkeypatch: pytest.MonkeyPatch, failures: int, starts: int, message: str
) -> None:
    calls: list[str] = []

    def init(address: str, **options: Any) -> None:
        calls.append("init")
        if calls.count("init") <= failures:
            raise RuntimeError(message)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    if failures == 2:
        with pytest.raises(BulkError, match="Ray did not start within 30 seconds, twice"):
            start_ray("local")
    else:
        start_ray("local")
    assert (calls.count("init"), calls.count("shutdown")) == (starts, failures)


# --- without Ray -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_an_interrupted_run_goes_on_and_encodes_no_finished_part_again(
    corpus: Path, tmp_path: Path, model: str
) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, out, model, on_progress=interrupt)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(before) == 4
    steps: list[tuple[int, int]] = []
    report = run(corpus, out, model, on_progress=lambda done, total: steps.append((done, total)))
    assert (report.earlier, report.parts, report.written) == (4, 12, ROWS)
    assert steps == [(done, ROWS) for done in range(50, ROWS + 1, 10)]
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    assert ids_of(out) == [f"a{n}" for n in range(ROWS)]
    assert run(corpus, out, model).earlier == 12


@pytest.mark.usefixtures("inline")
def test_a_part_that_was_written_but_not_marked_or_is_damaged_is_written_again(
    corpus: Path, tmp_path: Path, model: str
) -> None:
    out = tmp_path / "out"
    run(corpus, out, model)
    (out / "_gte_rag" / "done" / "00003.json").unlink()
    (out / "part-00005.parquet").write_bytes(b"PAR1")
    (out / "part-00007.parquet").unlink()
    report = run(corpus, out, model)
    assert report.earlier == 9
    assert ids_of(out) == [f"a{n}" for n in range(ROWS)]


@pytest.mark.usefixtures("inline")
def test_the_parquet_output_holds_what_the_encoder_gives(tmp_path: Path, tiny: GTEEncoder, model: str) -> None:
    table = pa.table(
        {"key": list(range(len(TEXTS))), "body": list(TEXTS), "lang": ["x"] * len(TEXTS), "left": [0] * len(TEXTS)}
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    out = tmp_path / "out"
    encode_files(
        [tmp_path / "in.parquet"],
        out,
        model=model,
        dimension=64,
        rows_per_part=7,
        id_column="key",
        text_column="body",
        columns=["lang"],
    )
    found = pq.read_table(out)
    assert found.column_names == ["id", "text", "lang", "dense", "sparse_indices", "sparse_values"]
    assert found.schema.field("dense").type == pa.list_(pa.float32(), 64)
    assert found.schema.metadata[b"gte_rag:fingerprint"].decode() == tiny.fingerprint
    assert found.column("id").to_pylist() == [str(number) for number in range(len(TEXTS))]
    expected = tiny.encode_documents(TEXTS, dimension=64)
    assert expected.dense is not None
    assert expected.sparse is not None
    # Other neighbours in the batch: the rounding of float32.
    np.testing.assert_allclose(np.stack(found.column("dense").to_pylist()), expected.dense, atol=1e-5)
    for row, vector in enumerate(expected.sparse):
        assert found.column("sparse_indices")[row].as_py() == vector.indices.tolist()
        np.testing.assert_allclose(found.column("sparse_values")[row].as_py(), vector.values, atol=1e-4)


@pytest.mark.usefixtures("inline")
def test_unusable_rows_are_set_aside_with_the_reason_and_the_rest_goes_on(tmp_path: Path, model: str) -> None:
    lines = [
        b'\xef\xbb\xbf{"id": "good", "text": "one"}',
        b'{"id": "surrogate", "text": "\\ud800"}',
        b'{"text": "no id"}',
        b'{"id": "", "text": "x"}',
        b'{"id": 1.5, "text": "x"}',
        b'{"id": "number", "text": 5}',
        b'{"id": "null", "text": null}',
        b"",
        b"[1]",
        b"{",
        b"\xff",
        b'{"id": "nan", "text": "x", "n": NaN}',
        b'{"id": "good", "text": "again"}',
        b'{"id": 7, "text": "seven", "deep": {"\\ud800": [1]}}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path / "out"
    report = encode_files([tmp_path / "in.jsonl"], out, model=model, rows_per_part=3)
    assert ids_of(out) == ["good", "7"]
    assert (report.rows, report.written, report.set_aside) == (13, 2, 11)
    reasons = {entry["row"]: entry["reason"] for entry in errors_of(out)}
    for row, reason in {
        2: "lone surrogate",
        3: "it has no id",
        4: "its id is empty",
        5: "its id is of type float",
        6: "its text is of type int, not a string",
        7: "it has no text",
        9: "is a JSON list, not an object",
        10: "is not JSON",
        11: "is not UTF-8",
        12: "NaN is no JSON",
        13: f"its id is that of {(tmp_path / 'in.jsonl').resolve()}:1, which comes first",
    }.items():
        assert reason in reasons.pop(row)
    assert not reasons


@pytest.mark.usefixtures("inline")
def test_of_repeated_ids_the_first_row_counts_across_parts_and_files(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"id": f"{n % 5}", "text": f"a{n}"} for n in range(12)])
    pq.write_table(
        pa.table({"id": [4, 5, 5], "text": ["b0", "b1", "b2"], "metadata": ["{}"] * 3}), folder / "b.parquet"
    )
    (folder / "c.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    out = tmp_path / "out"
    report = run(folder, out, model, rows_per_part=4)
    found = pq.read_table(out)
    assert dict(zip(found.column("id").to_pylist(), found.column("text").to_pylist(), strict=True)) == {
        **{str(n): f"a{n}" for n in range(5)},
        "5": "b1",
        "c.txt:1": "one",
        "c.txt:3": "two",
    }
    assert report.set_aside == 9


@pytest.mark.usefixtures("inline")
def test_a_damaged_file_and_one_without_the_columns_are_set_aside_whole(
    corpus: Path, tmp_path: Path, model: str
) -> None:
    (corpus / "b.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"id": ["1"]}), corpus / "c.parquet")
    report = run(corpus, tmp_path / "out", model)
    assert (report.written, report.set_aside) == (ROWS, 2)
    (first, second) = errors_of(tmp_path / "out")
    assert first["row"] is None
    assert "cannot be read as Parquet" in first["reason"]
    assert second["reason"] == "has no column 'text', or several; its columns: id"


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": 64}, "with dimension 128, and this call has 64"),
        ({"id_column": "n"}, "with id_column 'id', and this call has 'n'"),
        ({"rows_per_part": 11}, "with rows_per_part 10, and this call has 11"),
    ],
)
def test_a_folder_refuses_another_run(
    corpus: Path, tmp_path: Path, model: str, change: dict[str, Any], message: str
) -> None:
    run(corpus, tmp_path / "out", model)
    with pytest.raises(BulkError, match=message):
        run(corpus, tmp_path / "out", model, **change)


@pytest.mark.usefixtures("inline")
def test_changed_input_and_foreign_folders_are_refused(corpus: Path, tmp_path: Path, model: str) -> None:
    run(corpus, tmp_path / "out", model)
    write_jsonl(corpus / "b.jsonl", [])
    with pytest.raises(BulkError, match=r"of other input: .*b\.jsonl came, went or changed since"):
        run(corpus, tmp_path / "out", model)
    with pytest.raises(BulkError, match="holds other files"):
        run(corpus, corpus, model)


@pytest.mark.usefixtures("inline")
def test_a_part_that_kills_every_worker_is_left_alone_and_reported(corpus: Path, tmp_path: Path, model: str) -> None:
    out = tmp_path / "out"

    def pretend(done: int, total: int) -> None:
        (out / "_gte_rag" / "begun" / "00005").write_text("1\n2\n3\n")

    report = run(corpus, out, model, on_progress=pretend)
    assert (report.abandoned, report.written) == (1, ROWS - 10)
    assert run(corpus, out, model).abandoned == 0
    assert ids_of(out) == [f"a{n}" for n in range(ROWS)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows_per_part": 0}, ValueError, "rows_per_part is 0; it must be at least 1"),
        ({"workers": True}, TypeError, "workers is True; give a whole number"),
        ({"text_column": "id"}, ValueError, "id_column and text_column are both 'id'"),
        ({"columns": "lang"}, TypeError, "columns is the string 'lang'"),
        ({"to": "qdrant"}, TypeError, "to is str; give a QdrantSink"),
    ],
)
def test_wrong_arguments_are_refused(
    corpus: Path, tmp_path: Path, model: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(corpus, tmp_path / "out", model, **options)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_named_apart_or_read_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="would give the same ids"):
        select_sources([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        select_sources([tmp_path / "three"])
    with pytest.raises(TypeError, match="give a list"):
        select_sources(str(tmp_path))
    assert [source.name for source in select_sources([tmp_path])] == ["one/a.txt", "two/a.txt"]


# --- stores ------------------------------------------------------------------------------------------------------------


def server_sink(kind: str, request: pytest.FixtureRequest) -> sinks.Sink:
    """A sink into a new collection of a server that any process can reach."""
    name = f"bulk_{uuid4().hex}"
    if kind == "qdrant":
        return QdrantSink(request.getfixturevalue("qdrant").url, name)
    return MilvusSink(request.getfixturevalue("milvus_server"), name)


def stored(sink: sinks.Sink) -> dict[str, tuple[str, int, Any, dict[int, float]]]:
    """Return what was written, by the rows' ids, each of which must be there once: text, n, dense and sparse vector."""
    found: list[tuple[str, tuple[str, int, Any, dict[int, float]]]] = []
    if isinstance(sink, sinks.ParquetSink):
        for row in pq.read_table(sink.folder).to_pylist():
            weights = dict(zip(row["sparse_indices"], row["sparse_values"], strict=True))
            found.append((row["id"], (row["text"], json.loads(row["metadata"])["n"], row["dense"], weights)))
    elif isinstance(sink, QdrantSink):
        for point in sink._client().scroll(sink.collection, limit=2 * ROWS, with_vectors=True)[0]:
            sparse = point.vector["langchain-sparse"]
            assert point.id == sinks.point_id(point.payload["id"])
            weights = dict(zip(sparse.indices, sparse.values, strict=True))
            values = (point.payload["page_content"], point.payload["metadata"]["n"], point.vector[""], weights)
            found.append((point.payload["id"], values))
    else:
        assert isinstance(sink, MilvusSink)
        fields = ["text", "n", "dense", "sparse"]
        for row in sink._client().query(sink.collection, filter='pk != ""', output_fields=fields, limit=2 * ROWS):
            found.append((row["pk"], (row["text"], row["n"], row["dense"], row["sparse"])))
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.usefixtures("inline")
def test_a_chroma_server_is_filled_through_the_hybrid_collection_and_twice_is_once(
    corpus: Path, tmp_path: Path, model: str, tiny: GTEEncoder, chroma_server: tuple[str, int]
) -> None:
    import chromadb

    write_jsonl(corpus / "b.jsonl", [{"id": "bad", "text": "x", "nested": {"a": 1}}])
    host, port = chroma_server
    sink = ChromaSink(f"http://{host}:{port}", "bulk", token="secret-token")
    for name in ("out", "again"):
        report = run(corpus, tmp_path / name, model, to=sink)
        assert (report.written, report.set_aside) == (ROWS, 1)
        assert "its metadata['nested']" in errors_of(tmp_path / name)[0]["reason"]
    collection = HybridCollection(chromadb.HttpClient(host=host, port=port), "bulk", encoder=tiny)
    assert collection.count() == ROWS
    assert collection.get(["a5"])[0].metadata == {"n": 5}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"secret-token" not in path.read_bytes()
    assert "secret-token" not in repr(sink)


def store_sink(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if kind == "qdrant":
        qdrant_client = pytest.importorskip("qdrant_client")
        client = qdrant_client.QdrantClient(":memory:")
        monkeypatch.setattr(client, "close", lambda: None)
        monkeypatch.setattr(QdrantSink, "_client", lambda self: client)
        return QdrantSink("http://127.0.0.1:6333", "bulk"), client
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    from pymilvus import MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    monkeypatch.setattr(client, "close", lambda: None)
    monkeypatch.setattr(MilvusSink, "_client", lambda self: client)
    return MilvusSink(str(folder / "milvus.db"), "bulk"), client


@pytest.mark.usefixtures("inline")
def test_qdrant_is_filled_and_twice_is_once(
    corpus: Path, tmp_path: Path, model: str, tiny: GTEEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, client = store_sink("qdrant", tmp_path, monkeypatch)
    for name in ("out", "again"):
        assert run(corpus, tmp_path / name, model, to=sink).written == ROWS
    assert client.count("bulk").count == ROWS
    (point,) = client.retrieve("bulk", [sinks.point_id("a3")], with_vectors=True)
    assert point.payload == {"id": "a3", "page_content": TEXTS[3], "metadata": {"n": 3}}
    expected = tiny.encode_documents([TEXTS[3]])
    assert expected.dense is not None
    (point,) = client.retrieve("bulk", [sinks.point_id("a0")], with_vectors=True)
    expected = tiny.encode_documents([TEXTS[0]])
    assert expected.sparse is not None
    assert sorted(point.vector["langchain-sparse"].indices) == expected.sparse[0].indices.tolist()
    with pytest.raises(CollectionMismatchError, match="vectors of dimension 128"):
        run(corpus, tmp_path / "other", model, to=sink, dimension=64)


@pytest.mark.usefixtures("inline")
def test_a_store_that_goes_away_stops_the_run_and_the_same_call_goes_on(
    corpus: Path, tmp_path: Path, model: str, qdrant: QdrantServer
) -> None:
    sink = QdrantSink(qdrant.url, f"bulk_{uuid4().hex}")

    def go_away(done: int, total: int) -> None:
        qdrant.down = done == 40

    stopped = r"stopped: part 4 \(.*a\.jsonl, row 41 on\) cannot be written: .*503"
    try:
        with pytest.raises(BulkError, match=stopped):
            run(corpus, tmp_path / "out", model, to=sink, on_progress=go_away)
        with pytest.raises(BulkError, match=r"the store cannot be prepared: .*503"):
            run(corpus, tmp_path / "out", model, to=sink)
    finally:
        qdrant.down = False
    report = run(corpus, tmp_path / "out", model, to=sink)
    assert (report.earlier, report.written) == (4, ROWS)
    assert sorted(stored(sink)) == sorted(f"a{n}" for n in range(ROWS))


@pytest.mark.usefixtures("inline")
def test_milvus_is_filled_and_twice_is_once(
    corpus: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(corpus / "b.jsonl", [{"id": "long", "text": "x" * 70000}, {"id": "taken", "text": "x", "dense": 1}])
    sink, client = store_sink("milvus", tmp_path, monkeypatch)
    for name in ("out", "again"):
        report = run(corpus, tmp_path / name, model, to=sink, max_length=64)
        assert (report.written, report.set_aside) == (ROWS, 2)
    assert [entry["reason"] for entry in errors_of(tmp_path / "out")] == [
        "its text has 70000 bytes; Milvus stores 65535",
        "its metadata have the field 'dense', which the collection uses itself",
    ]
    (count,) = client.query("bulk", output_fields=["count(*)"])
    assert count["count(*)"] == ROWS
    (row,) = client.query("bulk", ids=["a3"], output_fields=["text", "n"])
    assert (row["text"], row["n"]) == (TEXTS[3], 3)


def test_the_plan_names_no_secret_in_an_address() -> None:
    sink = QdrantSink("https://user:secret@127.0.0.1:6333", "bulk", api_key="secret")
    assert "secret" not in json.dumps(sink.describe())
    assert asdict(Columns()) == {"id": "id", "text": "text", "kept": None}
