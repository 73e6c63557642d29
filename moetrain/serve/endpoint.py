"""A client of an OpenAI-compatible endpoint with the standard library alone, for comparisons and measurements."""

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moetrain.errors import ConfigError, RolloutError


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response. times: seconds from the request to each event of a stream. content: the JSON of a plain response."""

    status: int
    content: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()
    times: tuple[float, ...] = ()
    seconds: float = 0.0


class Endpoint:
    """An endpoint at a base URL such as http://127.0.0.1:8000/v1. Thread-safe: each request has its own connection."""

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 600.0) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets, or a port that is no number up to 65535
            is_address = False
        if not is_address or not parts.path.isascii():
            raise ConfigError(f"{url!r} is no address of an endpoint: give one such as http://127.0.0.1:8000/v1")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the key of the endpoint has characters other than printable ASCII: give another one")
        self.url = url
        self._parts = parts
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._timeout_s = timeout_s

    def model(self) -> str:
        """Return the name of the first model. Raises ConfigError when there is no answer."""
        try:
            reply = self._request("GET", "/models", None)
        except RolloutError as error:
            raise ConfigError(f"{error}: start the endpoint, or give another address") from None
        try:
            return str(reply.content["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(
                f"{self.url}/models answers with status {reply.status} and names no model: check address and key"
            ) from None

    def chat(self, body: Mapping[str, Any]) -> Reply:
        """Return the response to a chat completion. Raises RolloutError when the connection fails."""
        return self._request("POST", "/chat/completions", body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Reply:
        start = time.perf_counter()
        content = None if body is None else json.dumps(body).encode()
        with self._connection() as connection:
            connection.request(method, self._parts.path.rstrip("/") + path, body=content, headers=self._headers)
            response = connection.getresponse()
            if response.getheader("content-type", "").startswith("text/event-stream"):
                events, times = [], []
                for event in _events(response):
                    events.append(event)
                    times.append(time.perf_counter() - start)
                seconds = time.perf_counter() - start
                return Reply(status=response.status, events=tuple(events), times=tuple(times), seconds=seconds)
            found = response.read()
        try:
            value = json.loads(found)
        except ValueError:
            value = {}
        seconds = time.perf_counter() - start
        return Reply(status=response.status, content=value if isinstance(value, dict) else {}, seconds=seconds)

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=self._timeout_s)
        try:
            yield connection
        except (OSError, http.client.HTTPException) as error:
            raise RolloutError(f"{self.url}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a stream. Raises RolloutError for an event that is no JSON object."""
    for line in response:
        text = line.decode(errors="replace").strip()
        if not text.startswith("data:"):
            continue
        text = text.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        try:
            event = json.loads(text)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise RolloutError(f"an event of a stream is no JSON object: {text[:80]}")
        yield event
