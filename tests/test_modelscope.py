"""ModelScope ids: fetched from a stand-in hub that the test serves on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

# Read by the client when it is imported: no waiting before a second try, and no third.
os.environ["MODELSCOPE_API_MAX_RETRIES"] = "1"
os.environ["MODELSCOPE_DOWNLOAD_MAX_RETRIES"] = "1"
os.environ["MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS"] = "1"

pytest.importorskip("modelscope_hub")

from checkpoints import build, find_variant
from gte_rag import CheckpointError, GTEEncoder, MissingExtraError
from gte_rag.checkpoint import find_folder

ID = "iic/gte_sentence-embedding_multilingual-base"
NAME = f"modelscope:{ID}"
UNWANTED = ("README.md", "pytorch_model.bin", "modeling.py", "configuration.json", "onnx/model.onnx")


@dataclass
class Hub:
    """What the stand-in serves, and what was asked of it.

    Attributes:
        files: Contents by revision and path.
        listed: What the listing says of a path in place of the truth.
        delivered: The bytes delivered of a path in place of all; the header still announces all.
        fetched: Paths in the order in which they were fetched.
        requests: Number of requests of any kind.
    """

    files: dict[str, dict[str, bytes]]
    listed: dict[str, dict[str, object]] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    requests: int = 0

    def entries(self, revision: str) -> list[dict[str, object]]:
        truth: list[dict[str, object]] = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for path, content in self.files[revision].items()
        ]
        folders: list[dict[str, object]] = [{"Path": "onnx", "Name": "onnx", "Type": "tree", "Size": 0}]
        return [{**entry, **self.listed.get(str(entry["Path"]), {})} for entry in truth] + folders


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests += 1
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            revision = query.get("Revision", "master")
            if url.path == f"/api/v1/models/{ID}/repo/files" and revision in hub.files:
                body = {"Code": 200, "Success": True, "Data": {"Files": hub.entries(revision)}}
                self.answer(200, json.dumps(body).encode())
            elif url.path == f"/api/v1/models/{ID}/repo" and query["FilePath"] in hub.files.get(revision, {}):
                hub.fetched.append(query["FilePath"])
                content = hub.files[revision][query["FilePath"]]
                self.answer(200, content, hub.delivered.get(query["FilePath"]))
            else:
                self.answer(404, json.dumps({"Code": 10010205001, "Success": False, "Message": "not found"}).encode())

        def answer(self, status: int, content: bytes, delivered: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:delivered])
            self.close_connection = delivered is not None

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = build(find_variant("multilingual-base"), tmp_path / "repository")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    stand_in = Hub({"master": {**files, **dict.fromkeys(UNWANTED, b"not wanted")}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield stand_in
    server.shutdown()
    server.server_close()


def test_an_encoder_comes_from_modelscope(hub: Hub, tmp_path: Path) -> None:
    encoder = GTEEncoder.from_pretrained(NAME, device="cpu")
    assert encoder.name == NAME
    assert encoder.fingerprint == GTEEncoder.from_pretrained(tmp_path / "repository", device="cpu").fingerprint


def test_only_the_files_of_a_checkpoint_are_fetched(hub: Hub) -> None:
    folder = find_folder(NAME)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert {path.name for path in folder.rglob("*") if path.is_file()} == set(hub.fetched)


def test_what_was_fetched_is_not_fetched_again(hub: Hub) -> None:
    first = find_folder(NAME)
    hub.fetched.clear()
    assert find_folder(NAME) == first
    assert hub.fetched == []


def test_offline_takes_what_was_fetched_and_asks_nobody(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=f"cannot fetch '{ID}' at revision 'master' from ModelScope"):
        find_folder(NAME, local_files_only=True)
    first = find_folder(NAME)
    hub.requests = 0
    assert find_folder(NAME, local_files_only=True) == first
    assert GTEEncoder.from_pretrained(NAME, local_files_only=True, device="cpu").has_sparse
    assert hub.requests == 0


def test_downloads_are_kept_where_the_caller_says(hub: Hub, tmp_path: Path) -> None:
    folder = find_folder(NAME, cache_dir=tmp_path / "elsewhere")
    assert tmp_path / "elsewhere" in folder.parents
    assert find_folder(NAME, cache_dir=tmp_path / "elsewhere", local_files_only=True) == folder


def test_a_revision_is_a_folder_of_its_own(hub: Hub) -> None:
    hub.files["v1.0"] = {"config.json": b"{}", "model.safetensors": b"other"}
    assert (find_folder(NAME, revision="v1.0") / "model.safetensors").read_bytes() == b"other"
    assert (find_folder(NAME) / "model.safetensors").read_bytes() == hub.files["master"]["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"cannot fetch .* at revision 'v2\.0' from ModelScope"):
        find_folder(NAME, revision="v2.0")
    with pytest.raises(CheckpointError, match=r"revision is '\.\./\.\./v1'; give a branch"):
        find_folder(NAME, revision="../../v1")


def test_a_changed_file_is_fetched_again(hub: Hub) -> None:
    find_folder(NAME)
    hub.files["master"]["config.json"] += b"\n"
    hub.fetched.clear()
    assert (find_folder(NAME) / "config.json").read_bytes() == hub.files["master"]["config.json"]
    assert hub.fetched == ["config.json"]


def test_an_unknown_id_is_an_error_that_names_it(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="cannot fetch 'iic/nothing' at revision 'master' from ModelScope"):
        find_folder("modelscope:iic/nothing")


@pytest.mark.parametrize("name", ["modelscope:", "modelscope:iic", "modelscope:a/b/c", "modelscope:../b"])
def test_what_is_no_id_is_refused_before_any_request(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .* a ModelScope id takes 'modelscope:' before it"):
        find_folder(name)
    assert hub.requests == 0


def test_a_repository_without_a_checkpoint_is_refused(hub: Hub) -> None:
    del hub.files["master"]["config.json"]
    with pytest.raises(CheckpointError, match=r"on ModelScope has no config\.json"):
        find_folder(NAME)
    assert hub.fetched == []


def test_a_truncated_download_is_an_error_and_leaves_no_file(hub: Hub, tmp_path: Path) -> None:
    hub.delivered["model.safetensors"] = 1000
    with pytest.raises(CheckpointError, match="cannot fetch"):
        find_folder(NAME)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.delivered.clear()
    content = (find_folder(NAME) / "model.safetensors").read_bytes()
    assert content == hub.files["master"]["model.safetensors"]


def test_a_file_of_another_size_or_digest_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.listed["tokenizer.json"] = {"Sha256": None, "Size": 5}
    with pytest.raises(CheckpointError, match=r"lists tokenizer\.json with 5 bytes and delivered another number"):
        find_folder(NAME)
    hub.listed["tokenizer.json"] = {"Sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="cannot fetch"):
        find_folder(NAME)
    assert not list((tmp_path / "cache").rglob("tokenizer.json"))


@pytest.mark.parametrize(
    "path",
    ["../../evil.safetensors", "{tmp_path}/evil.safetensors", "sub/../../evil.safetensors", "..\\evil.safetensors"],
)
def test_a_file_outside_the_folder_is_refused(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.files["master"][path.format(tmp_path=tmp_path)] = b"evil"
    with pytest.raises(CheckpointError, match="which leads out of its folder"):
        find_folder(NAME)
    assert hub.fetched == []
    assert not list(tmp_path.rglob("*evil*"))


def test_a_hub_that_is_not_there_is_an_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="Check the name, the revision and the connection"):
        find_folder(NAME)


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gte-rag\[modelscope\]'"):
        find_folder(NAME)


def test_the_client_is_imported_only_for_modelscope_ids(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    names: list[Callable[[], object]] = [lambda: find_folder("gte-mini"), lambda: find_folder(tmp_path / "repository")]
    assert all(name() for name in names)
