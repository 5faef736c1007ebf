"""Requests to a service over HTTP: the key, time-outs, repetition of what may succeed next time, errors that say what happened.

Nothing here knows a model or a protocol; that is `gte_rag.remote`.
"""

from __future__ import annotations

import math
import os
import random
import threading
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gte_rag.errors import RemoteError, missing_extra

if TYPE_CHECKING:
    import httpx

# Waiting before a repeated request: doubled each time, between half of it and all of it, in seconds.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# A service that asks for more patience than this is reported instead of waited for.
_MOST_PATIENCE = 120.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Service:
    """Requests to one address: time-outs, repetition of what may succeed next time, errors that say what happened."""

    def __init__(self, base_url: str, key: Key, *, timeout: float, max_retries: int) -> None:
        parts = urlsplit(base_url) if isinstance(base_url, str) else None
        if parts is not None and (
            parts.username is not None or parts.query or parts.fragment
        ):  # may be secret: not shown
            raise ValueError("base_url has a user name, a password, a query or a fragment; a key is given as api_key")
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url is {base_url!r}; give an address such as 'http://127.0.0.1:8000/v1'")
        try:
            _ = parts.port, parts.hostname.encode("idna")
        except ValueError as error:
            raise ValueError(f"base_url is {base_url!r}: {error}") from error
        _check_number("timeout", timeout)
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"max_retries is {max_retries!r}; give a whole number, 0 for none")
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._timeout, self._max_retries = timeout, max_retries
        if key.read() is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            warnings.warn(f"the key for {parts.hostname} is sent over http, unencrypted; use https", stacklevel=4)
        self._start()

    def _start(self) -> None:
        try:
            import httpx
        except ImportError as error:
            raise missing_extra("httpx", "api") from error
        self._httpx = httpx
        self._client: httpx.Client | None = None
        self._starting = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base_url", "_key", "_timeout", "_max_retries")
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        with self._starting:
            if self._client is not None:
                self._client.close()
            self._client = None

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """Send a request and return the JSON object that answers it.

        Args:
            path: What follows `base_url`.
            body: What JSON can write.
            stop: Once it is set nothing is sent or waited for any more.

        Raises:
            RemoteError: It failed, or failed again each time it was repeated.
        """
        stop = threading.Event() if stop is None else stop
        url = f"{self.base_url}/{path}"
        for attempt in range(self._max_retries + 1):
            if stop.is_set():
                break
            try:
                return self._attempt(url, body)
            except _TemporaryError as failure:
                wait = max(_backoff(attempt), failure.wait)
                if attempt == self._max_retries:
                    raise failure.of(f"; tried {attempt + 1} times" if attempt else "") from None
                if wait > _MOST_PATIENCE:
                    raise failure.of(f"; it asks to wait for {wait:.0f} seconds") from None
            _pause(wait, stop)
        raise RemoteError(f"{url}: given up, because another request of the same call has failed")

    def _attempt(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        httpx, key = self._httpx, self._key.read()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            response = self._opened().post(url, json=body, headers=headers)
        except (httpx.HTTPError, RuntimeError) as error:  # the latter: closed meanwhile
            # Not repeated: the service may have done, and charged for, what it did not answer.
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RemoteError(_hidden(f"{url}: {reason}", key)) from None
        answer = _json(response)
        if response.status_code == 200:
            if not isinstance(answer, dict):
                raise RemoteError(f"{url}: the answer is no JSON object", status=200)
            return answer
        failure = _refusal(url, response.status_code, answer, response.reason_phrase, key)
        if response.status_code == 429 or response.status_code >= 500:
            raise _TemporaryError(
                str(failure),
                status=failure.status,
                code=failure.code,
                request_id=failure.request_id,
                wait=_seconds(response.headers.get("Retry-After")),
            )
        raise failure

    def _opened(self) -> httpx.Client:
        with self._starting:
            if self._client is None:
                self._client = self._httpx.Client(timeout=self._timeout, follow_redirects=False)
            return self._client


class Key:
    """A key, or the environment variable that holds it. It shows neither, and a pickle of it holds the variable's name only."""

    def __init__(self, key: str | None, variable: str | None) -> None:
        if key is not None and variable is not None:
            raise ValueError("api_key and api_key_variable are both given; give one of them")
        self._key, self.variable = key, variable
        self._lost = False
        if key is not None:
            _check_key(key, "api_key")

    def __repr__(self) -> str:
        return "<key>"

    def __getstate__(self) -> dict[str, Any]:
        return {"variable": self.variable, "lost": self._lost or self._key is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._key, self.variable, self._lost = None, state["variable"], state["lost"]

    def read(self) -> str | None:
        """Return the key, None where none is needed."""
        if self._lost:
            raise ValueError(
                "the key that was given as api_key is not kept in pickles; make this object anew, or let it read the key from "
                "an environment variable"
            )
        if self.variable is None:
            return self._key
        key = os.environ.get(self.variable, "")
        if not key:
            raise ValueError(f"there is no key: set the environment variable {self.variable}, or give api_key")
        return _check_key(key, self.variable)


def _check_key(key: str, name: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{name} is {type(key).__name__}; give a string")
    if not key or not key.isascii() or not key.isprintable() or " " in key:  # the key itself is not shown
        raise ValueError(f"{name} is empty or has a character that no key has, such as a space or a line break")
    return key


class _TemporaryError(RemoteError):
    """A failure that may be gone at the next attempt, and how many seconds the service asks to wait before it."""

    def __init__(self, message: str, *, wait: float = 0.0, **details: Any) -> None:  # noqa: ANN401
        super().__init__(message, **details)
        self.wait = wait

    def of(self, outcome: str) -> RemoteError:
        """Return the error for the caller, with how it ended."""
        return RemoteError(f"{self}{outcome}", status=self.status, code=self.code, request_id=self.request_id)


def _json(response: httpx.Response) -> Any:  # noqa: ANN401
    """Return what the body says, None if it is no JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):  # of JSON, of the body's encoding, of its depth
        return None


def _refusal(url: str, status: int, answer: Any, reason: str, key: str | None) -> RemoteError:  # noqa: ANN401
    """Return the error that an answer describes: ``{code, message, request_id}``, or OpenAI's ``{error: {...}}``."""
    fields = answer if isinstance(answer, dict) else {}
    inner = fields.get("error")
    described = inner if isinstance(inner, dict) else {"message": inner} if isinstance(inner, str) else fields
    code = described.get("code") or described.get("type")
    message = _hidden(str(described.get("message") or reason or "no reason given"), key)[:500]
    request_id = fields.get("request_id") or fields.get("id")
    shown = f"HTTP {status}" + (f" {_hidden(str(code), key)}" if code else "")
    return RemoteError(
        f"{url}: {shown}: {message}",
        status=status,
        code=_hidden(str(code), key) if code else None,
        request_id=str(request_id) if request_id else None,
    )


def _hidden(text: str, key: str | None) -> str:
    """Return a text without the key, which some servers repeat when they refuse it."""
    return text.replace(key, "<key>") if key else text


def _pause(seconds: float, stop: threading.Event) -> None:
    """Wait, until `stop` is set at most."""
    stop.wait(seconds)


def _backoff(attempt: int) -> float:
    """Return how many seconds to wait after an attempt, 0 the first: doubled each time, and no two callers alike."""
    longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0**attempt)
    return random.uniform(longest / 2, longest)  # noqa: S311


def _seconds(retry_after: str | None) -> float:
    """Return what a ``Retry-After`` header asks for, in seconds from now: a number of them, or a date."""
    if retry_after is None:
        return 0.0
    try:
        if retry_after.strip().isdigit():
            return float(retry_after)
        then = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return 0.0
    if then.tzinfo is None:
        then = then.replace(tzinfo=timezone.utc)
    return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; give a number of seconds")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; give a number of seconds greater than 0")
