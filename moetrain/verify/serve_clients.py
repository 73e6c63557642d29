"""Clients of `verify serve`: requests of every kind, well-behaved or not, and what became of each.

They use sockets and the standard library, so that they can break off, stall, and see every byte of a response.
"""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any

from moetrain.files import to_json

CHAT = "/v1/chat/completions"
_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up a value.",
        "parameters": {
            "type": "object",
            "properties": {"row": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["row"],
            "additionalProperties": False,
        },
    },
}
_MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[1]",
    b'{"messages": "\xff"}',
    b"[" * 10_000,
    b'{"messages": []}',
    b'{"messages": [{"role": "robot", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {}}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 999999999}',
)
"""Bodies that the server must refuse."""
_OVERLOADED = (503, 504)  # statuses with which any request may be refused: too many, and no end in time
_WORDS = ("table", "value", "row", "find", "then", "next", "read", "name", "step", "of")
_SLOW_BYTES, _SLOW_S = 256, 0.01  # what a slow reader reads at a time, and how long it waits before


class Kind(StrEnum):
    """What a client does: asks for a response, a stream or a call; repeats a seed; reads slowly; leaves in the middle
    of a response or of its own request; sends what is no request."""

    plain = "plain"
    stream = "stream"
    call = "call"
    repeat = "repeat"
    slow = "slow"
    leave = "leave"
    half = "half"
    malformed = "malformed"


class End(StrEnum):
    """What became of a request: a whole answer, an error of the API, left by the client, a connection that broke, no
    end in time, or something that the API does not allow."""

    answered = "answered"
    refused = "refused"
    left = "left"
    broken = "broken"
    lost = "lost"
    wrong = "wrong"


@dataclass(kw_only=True)
class Request:
    """A request and what became of it. Times are of `time.monotonic`.

    token_times: of the events of a stream that add something. content: what must be the same for the same seed.
    """

    kind: Kind
    began: float
    end: End = End.lost
    detail: str = ""
    ended: float = 0.0
    token_times: list[float] = field(default_factory=list)
    content: object = None


class _ContractError(Exception):
    """Something that the API does not allow."""


class _RefusalError(Exception):
    """An error in the form of the API."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """Sends requests to the server at `port` of this machine, one connection each.

    limit_s: seconds without a byte after which a request counts as lost. drops_ends: ignore the last event of each
    stream, a fault that must be noticed.
    """

    port: int
    model: str
    key: str | None
    prompt_words: int
    max_tokens: int
    limit_s: float
    drops_ends: bool = False

    def use(self, kind: Kind, stream: Random) -> Request:
        """Send one request of a kind, and return what became of it."""
        request = Request(kind=kind, began=time.monotonic())
        body = self._body(kind, stream)
        try:
            self._send(request, body, stream)
        except _ContractError as error:
            request.end, request.detail = End.wrong, str(error)
        except _RefusalError as error:
            request.end, request.detail = End.refused, str(error)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            request.end, request.detail = End.wrong, f"a response without a field, or no UTF-8: {error!r}"
        except TimeoutError:
            request.end = End.lost
        except (OSError, http.client.HTTPException) as error:
            request.end, request.detail = End.broken, f"{type(error).__name__}: {error}"
        request.ended = time.monotonic()
        return request

    def _body(self, kind: Kind, stream: Random) -> bytes:
        if kind is Kind.malformed:
            return stream.choice(_MALFORMED)
        words = Random(0) if kind is Kind.repeat else stream
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": " ".join(words.choice(_WORDS) for _ in range(self.prompt_words))}],
            "max_tokens": self.max_tokens,
            "seed": words.randrange(2**31),
            "return_token_ids": True,
        }
        if kind not in (Kind.plain, Kind.repeat):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind is Kind.call:
            body |= {"tools": [_TOOL], "tool_choice": "required", "thinking": {"type": "disabled"}}
        if kind in (Kind.plain, Kind.leave) and stream.random() < 0.3:
            body |= {"n": 2, "temperature": 0.7, "top_p": 0.9}
        return to_json(body).encode()

    def _send(self, request: Request, body: bytes, stream: Random) -> None:
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), timeout=self.limit_s)) as connection:
            if request.kind is Kind.slow:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            head += f"authorization: Bearer {self.key}\r\n" if self.key else ""
            sent = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
            if request.kind is Kind.half:
                connection.sendall(sent[: stream.randrange(1, len(sent))])
                request.end = End.left
                return
            connection.sendall(sent)
            if request.kind is Kind.leave and stream.random() < 0.3:  # before the first byte of the response
                time.sleep(stream.random() * 0.2)
                request.end = End.left
                return
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            self._read(request, response, stream)

    def _read(self, request: Request, response: http.client.HTTPResponse, stream: Random) -> None:
        if response.getheader("content-type", "").startswith("text/event-stream") and response.status == 200:
            if request.kind is Kind.malformed:
                raise _ContractError("a malformed request was accepted")
            num_read = stream.randrange(1, 6) if request.kind is Kind.leave else None
            self._read_stream(request, response, num_read=num_read)
            return
        content = _object(response.read().decode())
        if response.status != 200:
            raise _refusal(content, response.status, is_malformed=request.kind is Kind.malformed)
        if request.kind is Kind.malformed:
            raise _ContractError("a malformed request was accepted")
        _check_plain(content)
        request.content = [choice["token_ids"] for choice in content["choices"]]
        request.end = End.answered

    def _read_stream(self, request: Request, response: http.client.HTTPResponse, *, num_read: int | None) -> None:
        reasons: dict[int, str] = {}  # by choice
        arguments: dict[int, str] = {}
        has_usage = has_end = False
        for number, data in enumerate(_events(response, is_slow=request.kind is Kind.slow)):
            if number == num_read:
                request.end = End.left
                return
            if has_end:
                raise _ContractError(f"an event after the end: {data[:80]}")
            if data == "[DONE]":
                has_end = not self.drops_ends
                continue
            event = _object(data)
            if "error" in event:
                raise _refusal(event, 504 if event["error"]["code"] == "timeout" else 500, is_malformed=False)
            has_usage = has_usage or bool(event.get("usage"))
            for choice in event["choices"]:
                for call in choice["delta"].get("tool_calls", []):
                    arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
                if choice["index"] in reasons:
                    raise _ContractError("a delta after the finish reason")
                if choice["finish_reason"] is not None:
                    reasons[choice["index"]] = choice["finish_reason"]
                elif choice.get("token_ids"):
                    request.token_times.append(time.monotonic())
        if not has_end:
            raise http.client.IncompleteRead(b"", None)
        if not reasons or not has_usage or not set(reasons.values()) <= {"stop", "length", "tool_calls"}:
            raise _ContractError(f"a stream ended with the reasons {reasons} and usage {has_usage}")
        if request.kind is Kind.call:
            _check_calls(list(arguments.values()), reason=reasons[0])
        request.end = End.answered


def _events(response: http.client.HTTPResponse, *, is_slow: bool) -> Iterator[str]:
    """Yield the data of a stream's events; an event that was cut off is none."""
    rest = b""
    while True:
        if is_slow:
            time.sleep(_SLOW_S)
        part = response.read1(_SLOW_BYTES if is_slow else 65_536)
        if not part:
            return
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            text = event.decode()
            if not text.startswith("data: "):
                raise _ContractError(f"an event without data: {text[:80]}")
            yield text.removeprefix("data: ")


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise _ContractError(f"no JSON: {text[:80]}") from None
    if not isinstance(value, dict):
        raise _ContractError(f"no JSON object: {text[:80]}")
    return value


def _refusal(content: Mapping[str, Any], status: int, *, is_malformed: bool) -> Exception:
    """Return what an error response is: a refusal, or something wrong."""
    error = content.get("error")
    if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
        return _ContractError(f"status {status} with no error of the API: {str(content)[:80]}")
    if status not in _OVERLOADED and not (is_malformed and 400 <= status < 500):
        return _ContractError(f"status {status}: {error['message'][:120]}")
    return _RefusalError(f"status {status}: {error['message'][:120]}")


def _check_calls(arguments: list[str], *, reason: str) -> None:
    """Check a turn that must call the tool. One that was cut off may end within a call."""
    if reason == "length":
        return
    if not arguments or reason != "tool_calls":
        raise _ContractError(f"a required call is missing, and the finish reason is {reason}")
    for text in arguments:
        if not isinstance(_object(text)["row"], int):
            raise _ContractError(f"a call does not match its schema: {text[:80]}")


def _check_plain(content: Mapping[str, Any]) -> None:
    choices, usage = content["choices"], content["usage"]
    if [choice["index"] for choice in choices] != list(range(len(choices))) or not choices:
        raise _ContractError("the choices of a response are not numbered from 0")
    if usage["completion_tokens"] != sum(len(choice["token_ids"]) for choice in choices):
        raise _ContractError("usage and token ids of a response differ")
    for choice in choices:
        if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
            raise _ContractError(f"a response has the finish reason {choice['finish_reason']}")
