"""Qdrant's own engine (Qdrant Edge) behind as much of its REST API as a sink and a test ask for, on loopback.

The Qdrant server is not on any package index, its engine is: points are checked, stored, replaced and read by Qdrant's code,
and reach it through `qdrant_client` from any number of processes. Only what lies between the two is this file's.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any


class QdrantServer:
    """Collections of one shard each; one request at a time. While `down`, it answers like a proxy without its server."""

    def __init__(self, folder: Path) -> None:
        self.url = ""
        self.down = False
        self._folder = folder
        self._settings: dict[str, Any] = {}
        self._shards: dict[str, Any] = {}
        self._lock = threading.Lock()

    def answer(self, method: str, path: str, body: Any) -> Any:
        """Return the result of a request, or None if there is no such thing."""
        if path == "/":
            return {"title": "Qdrant Edge over HTTP", "version": version("qdrant-client")}
        found = re.fullmatch(r"/collections/([^/]+)(/.+)?", path)
        if found is None:
            return None
        name, rest = found.groups()
        with self._lock:
            if (method, rest) == ("GET", "/exists"):
                return {"exists": name in self._shards}
            if (method, rest) == ("PUT", None):
                return self._create(name, body)
            if name not in self._shards:
                return None
            return self._ask(method, rest, name, body)

    def _create(self, name: str, settings: Any) -> bool:
        import qdrant_edge as edge

        vectors = settings["vectors"]
        distance = edge.Distance.__dict__[vectors["distance"]]
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(vectors["size"], distance),
            sparse_vectors={key: edge.EdgeSparseVectorParams() for key in settings.get("sparse_vectors") or {}},
        )
        folder = self._folder / name
        folder.mkdir()
        self._shards[name] = edge.EdgeShard.create(str(folder), config)
        self._settings[name] = settings
        return True

    def _ask(self, method: str, rest: str | None, name: str, body: Any) -> Any:
        import qdrant_edge as edge

        shard = self._shards[name]
        if (method, rest) == ("GET", None):
            return _description(self._settings[name], shard.info())
        if (method, rest) == ("PUT", "/points"):
            points = [edge.Point(point["id"], _vectors(point["vector"]), point["payload"]) for point in body["points"]]
            shard.update(edge.UpdateOperation.upsert_points(points))
            return {"operation_id": 0, "status": "completed"}
        if (method, rest) == ("POST", "/points/scroll"):
            page = edge.ScrollRequest(
                limit=body["limit"], with_payload=body["with_payload"], with_vector=body["with_vector"]
            )
            records, following = shard.scroll(page)
            found = [{"id": str(one.id), "payload": one.payload, "vector": _as_json(one.vector)} for one in records]
            return {"points": found, "next_page_offset": following and str(following)}
        return None

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def _vectors(vectors: Any) -> Any:
    import qdrant_edge as edge

    return {
        key: edge.SparseVector(value["indices"], value["values"]) if isinstance(value, dict) else value
        for key, value in vectors.items()
    }


def _as_json(vectors: Any) -> Any:
    if vectors is None:
        return None
    return {
        key: value if isinstance(value, list) else {"indices": value.indices, "values": value.values}
        for key, value in vectors.items()
    }


def _description(settings: Any, info: Any) -> dict[str, Any]:
    params = {"vectors": settings["vectors"], "sparse_vectors": settings.get("sparse_vectors")}
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000}
    optimizer = {"deleted_threshold": 0.2, "vacuum_min_vector_number": 1000, "default_segment_number": 0}
    return {
        "status": "green",
        "optimizer_status": "ok",
        "segments_count": info.segments_count,
        "points_count": info.points_count,
        "config": {
            "params": params,
            "hnsw_config": hnsw,
            "optimizer_config": {**optimizer, "flush_interval_sec": 5},
            "metadata": settings.get("metadata"),
        },
        "payload_schema": {},
    }


@contextmanager
def qdrant_server(folder: Path) -> Iterator[QdrantServer]:
    """Serve collections kept in a folder on a free port of 127.0.0.1."""
    qdrant = QdrantServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond()

        def do_PUT(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def _respond(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                result = (
                    None
                    if qdrant.down
                    else qdrant.answer(self.command, self.path.partition("?")[0], json.loads(data or b"null"))
                )
                status = 503 if qdrant.down else 404 if result is None else 200
                answer = {
                    "result": result,
                    "status": "ok",
                    "time": 0.0,
                    **(result if self.path == "/" and result else {}),
                }
            except Exception as error:  # what the engine refuses is the client's to hear
                status, answer = 400, {"status": {"error": str(error)}, "time": 0.0}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client that is killed is what the tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    qdrant.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield qdrant
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        qdrant.close()
