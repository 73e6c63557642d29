"""Servers of scripted or tiny models, started in this process on a free port, and a plain HTTP client."""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai

from moetrain.chat.messages import Message
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.protocol import Counts, Generation, Model
from moetrain.inference.protocol import Sequence as TokenSequence
from moetrain.serve.config import ServeConfig
from moetrain.serve.server import Server
from moetrain.serve.service import Served

MAX_TOKENS = 2000


class Script:
    """A generation that says what `turn(prompt text)` returns, one token per step and sequence."""

    def __init__(self, turn: Callable[[str], Message | list[int]], tokenizer: Tokenizer) -> None:
        self.prompts: list[str] = []
        self.num_cancelled = 0
        self.num_steps = 0
        self.step_s = 0.0
        self.is_broken = False
        self._turn = turn
        self._tokenizer = tokenizer
        self._rest: dict[TokenSequence, list[int]] = {}

    @property
    def is_busy(self) -> bool:
        return any(not sequence.is_idle for sequence in self._rest)

    @property
    def counts(self) -> Counts:
        return Counts()

    def add(self, sequence: TokenSequence) -> None:
        sequence.give([], version=0)
        prompt = self._tokenizer.decode(sequence.tokens)
        self.prompts.append(prompt)
        turn = self._turn(prompt)
        if isinstance(turn, Message):
            names = self._tokenizer.special_ids
            turn = pieces_to_tokens(KIMI_K2.turn_pieces(turn), encode=self._tokenizer.encode, special_ids=names)[0]
        self._rest[sequence] = turn

    def extend(self, sequence: TokenSequence, tokens: list[int], *, limit: int) -> None:
        raise NotImplementedError("a server sends each turn as a new prompt")

    def step(self) -> list[TokenSequence]:
        if self.is_broken:
            raise RuntimeError("broken")
        time.sleep(self.step_s)
        self.num_steps += 1
        running = [sequence for sequence in self._rest if not sequence.is_idle]
        for sequence in running:
            sequence.take(self._rest[sequence].pop(0), logprob=-0.5, version=0)
        return [sequence for sequence in running if sequence.is_idle]

    def cancel(self, sequence: TokenSequence) -> None:
        self.num_cancelled += not sequence.is_idle
        del self._rest[sequence]

    def load(self, model: Model, *, version: int) -> None:
        raise NotImplementedError("a script has no weights")


@contextmanager
def serving(
    tokenizer: Tokenizer, make: Callable[[], Generation], *, max_tokens: int = MAX_TOKENS, **config: Any
) -> Iterator[Server]:
    """Run a server while the context lasts."""
    served = Served(
        name="tiny", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_tokens=max_tokens, digest="0123456789ab"
    )
    server = Server(served, config=ServeConfig(**{"port": 0, **config}), make_generation=make)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.wait(10)
        assert not server.is_running


def client(server: Server, *, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def post(
    server: Server, path: str, body: bytes | dict[str, Any], *, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and JSON of a response."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _request(server, "POST", path, content, headers=headers)


def get(server: Server, path: str, *, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and the JSON of a response, or its text."""
    return _request(server, "GET", path, None, headers=headers)


def _request(
    server: Server, method: str, path: str, body: bytes | None, *, headers: dict[str, str] | None
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        content = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(content) if content.startswith("{") else content
    finally:
        connection.close()


def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    """Wait for a condition, and fail if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def declared(name: str, **properties: Any) -> dict[str, Any]:
    """Return the declaration of a tool whose properties are all required."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"{name}s", "parameters": schema}}


def joined(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that the deltas of one choice add up to."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                assert call["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        for key in ("role", "content", "reasoning_content", "reasoning"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
    return message | ({"tool_calls": calls} if calls else {})
