"""A server on loopback that answers as it is told, faults included, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; `short` is how many bytes of the body stay behind."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    short: int = 0


RESET = Answer(status=-1)  # the connection is reset instead
HANG = Answer(status=-2)  # nothing is answered until the server ends


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: Any


class ScriptedServer:
    """Answers each request with the next answer of `script`; the last one is kept, and may be a function of the request."""

    def __init__(self, address: str) -> None:
        self.url = address
        self.script: list[Answer | Callable[[Request], Answer]] = []
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def next(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return answer if isinstance(answer, Answer) else answer(request)


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Run a server on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            answer = script.next(Request(self.path, dict(self.headers), json.loads(data)))
            if answer is HANG:
                script.closing.wait(timeout=30)
            if answer is RESET:  # linger of 0 seconds: a reset, not an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            if answer.status < 0:
                self.close_connection = True
                return
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - answer.short])
            self.close_connection = bool(answer.short)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing: a client that gives up is part of the script."""

    server = Server(("127.0.0.1", 0), Handler)
    script = ScriptedServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        script.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
