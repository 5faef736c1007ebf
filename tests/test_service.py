"""Requests to a service: what is repeated and what is not, what errors say, and that the key shows nowhere."""

from __future__ import annotations

import logging
import pickle
import socket
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from gte_rag.errors import RemoteError
from gte_rag.service import Key, Service
from scripted_server import HANG, RESET, Answer, ScriptedServer, scripted_server

pytest.importorskip("httpx")

KEY = "sk-very-secret-0123456789"
GOOD = Answer(body={"ok": True})


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without waiting; and no proxy between this process and itself."""
    waited: list[float] = []
    monkeypatch.setattr("gte_rag.service._pause", lambda seconds, stop: waited.append(seconds))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return waited


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def service(server: ScriptedServer, *, key: str | None = KEY, timeout: float = 10.0, max_retries: int = 3) -> Service:
    return Service(server.url, Key(key, None), timeout=timeout, max_retries=max_retries)


def test_a_request_carries_the_key_and_the_body(server: ScriptedServer) -> None:
    server.script = [GOOD]
    assert service(server).post("some/path", {"text": "北京"}) == {"ok": True}
    (request,) = server.requests
    assert (request.path, request.body) == ("/some/path", {"text": "北京"})
    assert request.headers["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_there_is_no_authorization(server: ScriptedServer) -> None:
    server.script = [GOOD]
    service(server, key=None).post("p", {})
    assert "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    "fault",
    [
        Answer(429, {}),
        Answer(500, {}),
        Answer(502, b"<html>"),
        Answer(503, {}),
    ],
    ids=["429", "500", "502", "503"],
)
def test_what_may_succeed_next_time_is_repeated(server: ScriptedServer, waits: list[float], fault: Answer) -> None:
    server.script = [fault, fault, GOOD]
    assert service(server).post("p", {}) == {"ok": True}
    assert len(server.requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_waiting_doubles_and_is_bounded_and_never_quite_the_same(server: ScriptedServer, waits: list[float]) -> None:
    server.script = [Answer(500, {})]
    for _ in range(2):
        with pytest.raises(RemoteError, match="tried 11 times"):
            service(server, max_retries=10).post("p", {})
    first, second = waits[:10], waits[10:]
    assert all(min(30, 0.5 * 2**n) / 2 <= wait <= min(30, 0.5 * 2**n) for n, wait in enumerate(first))
    assert first != second


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_what_cannot_succeed_is_not_repeated(server: ScriptedServer, waits: list[float], status: int) -> None:
    server.script = [
        Answer(status, {"code": "InvalidParameter", "message": "batch size is invalid", "request_id": "r-1"})
    ]
    with pytest.raises(RemoteError, match=f"HTTP {status} InvalidParameter: batch size is invalid$") as caught:
        service(server).post("p", {})
    assert (len(server.requests), waits) == (1, [])
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (status, "InvalidParameter", "r-1")


def test_retry_after_is_respected_in_seconds_and_as_a_date(server: ScriptedServer, waits: list[float]) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=40), usegmt=True)
    server.script = [
        Answer(429, {}, {"Retry-After": "7"}),
        Answer(503, {}, {"Retry-After": date}),
        Answer(429, {}, {"Retry-After": "soon"}),
        GOOD,
    ]
    service(server).post("p", {})
    assert waits[0] == 7
    assert 30 < waits[1] <= 40
    assert waits[2] <= 2


def test_a_service_that_asks_for_too_much_patience_is_reported(server: ScriptedServer, waits: list[float]) -> None:
    server.script = [Answer(429, {"code": "Throttling", "message": "later"}, {"Retry-After": "3600"})]
    with pytest.raises(RemoteError, match="HTTP 429 Throttling: later; it asks to wait for 3600 seconds"):
        service(server).post("p", {})
    assert waits == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (HANG, "ReadTimeout"),
        (RESET, "ReadError|RemoteProtocolError"),
        (Answer(body={"ok": True}, short=3), "RemoteProtocolError"),
    ],
    ids=["time-out", "reset", "truncated body"],
)
def test_what_may_have_been_done_unheard_is_not_repeated(
    server: ScriptedServer, waits: list[float], fault: Answer, error: str
) -> None:
    server.script = [fault, GOOD]
    same = service(server, timeout=0.5)
    with pytest.raises(RemoteError, match=error):
        same.post("p", {})
    assert waits == []
    assert same.post("p", {}) == {"ok": True}  # on a new connection


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(RemoteError, match=rf"{url}/p: ConnectError"):
        Service(url, Key(None, None), timeout=5, max_retries=1).post("p", {})


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff\xfe"], ids=["empty", "html", "list", "no text"])
def test_an_answer_that_is_no_object_is_refused_at_once(server: ScriptedServer, body: bytes) -> None:
    server.script = [Answer(200, body)]
    with pytest.raises(RemoteError, match="the answer is no JSON object"):
        service(server).post("p", {})
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no such model", "type": "not_found"}}, "HTTP 404 not_found: no such model"),
        ({"error": "unknown route"}, "HTTP 404: unknown route"),
        ({"error": {"message": None}}, "HTTP 404: Not Found"),
        (b"<html>", "HTTP 404: Not Found"),
    ],
)
def test_every_form_of_error_is_read(server: ScriptedServer, body: Any, said: str) -> None:
    server.script = [Answer(404, body)]
    with pytest.raises(RemoteError, match=f"{said}$"):
        service(server).post("p", {})


def test_the_key_shows_nowhere(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    asked = service(server)
    for answer in (
        Answer(401, {"error": {"message": f"Incorrect API key provided: {KEY}", "code": KEY}}),
        Answer(500, {"code": KEY, "message": f"{KEY} is wrong"}),
    ):
        server.script = [answer]
        with pytest.raises(RemoteError, match="<key>") as caught:
            asked.post("p", {})
        error = caught.value
        assert KEY not in f"{error!r} {error.code} {error.args} {error.__cause__!r} {error.__context__!r}"
    assert len(server.requests) == 5
    assert KEY not in caplog.text
    assert KEY not in repr(asked) + repr(asked._key)
    assert KEY.encode() not in pickle.dumps(asked)


def test_a_key_in_the_environment_survives_a_pickle_and_one_in_an_argument_says_that_it_did_not(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [GOOD]
    monkeypatch.setenv("SOME_KEY", KEY)
    named = Service(server.url, Key(None, "SOME_KEY"), timeout=5, max_retries=0)
    pickle.loads(pickle.dumps(named)).post("p", {})
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    restored = pickle.loads(pickle.dumps(service(server)))
    for lost in (restored, pickle.loads(pickle.dumps(restored))):
        with pytest.raises(ValueError, match="api_key is not kept in pickles"):
            lost.post("p", {})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, ValueError, "base_url is '127.0.0.1:8000'; give an address such as"),
        ({"base_url": None}, ValueError, "base_url is None"),
        ({"base_url": f"http://user:{KEY}@host"}, ValueError, "base_url has a user name"),
        ({"base_url": f"http://host/?key={KEY}"}, ValueError, "base_url has a user name, a password, a query"),
        ({"timeout": 0}, ValueError, "timeout is 0; give a number of seconds greater than 0"),
        ({"timeout": None}, TypeError, "timeout is None"),
        ({"max_retries": -1}, ValueError, "max_retries is -1; give a whole number"),
    ],
)
def test_bad_options_are_refused_without_showing_a_key(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"base_url": "http://127.0.0.1:1", "timeout": 1.0, "max_retries": 0, **options}
    with pytest.raises(error, match=message) as caught:
        Service(given["base_url"], Key(None, None), timeout=given["timeout"], max_retries=given["max_retries"])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", f"{KEY}\n", f"{KEY} ", "sk-ключ"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="api_key is empty or has a character that no key has") as caught:
        Key(key, None)
    assert KEY not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ValueError, match="SOME_KEY"):
        Key(None, "SOME_KEY").read()


def test_a_key_over_plain_http_to_another_machine_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"the key for example\.invalid is sent over http, unencrypted"):
        Service("http://example.invalid/v1", Key(KEY, None), timeout=1, max_retries=0)


def test_an_answer_too_deep_to_read_is_no_json(server: ScriptedServer) -> None:
    server.script = [Answer(body=b"[" * 200_000)]
    with pytest.raises(RemoteError, match="the answer is no JSON object"):
        service(server).post("p", {})


def test_a_date_that_no_clock_shows_is_not_waited_for(server: ScriptedServer, waits: list[float]) -> None:
    server.script = [Answer(429, {}, {"Retry-After": "Mon, 01 Jan 2100 00:00:00 +9999999999999"}), GOOD]
    service(server).post("p", {})
    assert waits[0] <= 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc/v1", "http://127.0.0.1:99999/v1", "https://exa_mple..com"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="base_url is"):
        Service(url, Key(None, None), timeout=1, max_retries=0)


def test_a_stopped_call_sends_nothing(server: ScriptedServer) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(RemoteError, match="given up"):
        service(server).post("p", {}, stop)
    assert server.requests == []
