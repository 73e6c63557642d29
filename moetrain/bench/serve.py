"""Measures an OpenAI-compatible endpoint under load: times to the first token and between tokens, and throughput.

Each client sends one streamed request after the other until the time is over. Latencies are those that clients see.
"""

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table

from moetrain.commands.bench import BenchServeRun
from moetrain.errors import RolloutError
from moetrain.runtime import python_stream
from moetrain.serve.endpoint import Endpoint, Reply

_WORDS = ("table", "value", "column", "find", "then", "next", "read", "name", "step", "of")
_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up a value.",
        "parameters": {
            "type": "object",
            "properties": {"table": {"type": "string"}, "row": {"type": "integer"}},
            "required": ["table", "row"],
            "additionalProperties": False,
        },
    },
}
_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(kw_only=True)
class _Load:
    """What the clients of one measurement have seen."""

    replies: list[Reply]
    failures: list[str]


def bench_serve(run: BenchServeRun, *, endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return one row per number of clients."""
    model = run.model or endpoint.model()
    _measure(run, endpoint=endpoint, model=model, num_clients=1, seconds=0.0)  # warms up: one request
    return [
        _row(_measure(run, endpoint=endpoint, model=model, num_clients=number, seconds=run.seconds), number=number)
        for number in run.clients
    ]


def _measure(run: BenchServeRun, *, endpoint: Endpoint, model: str, num_clients: int, seconds: float) -> _Load:
    load = _Load(replies=[], failures=[])
    end = time.perf_counter() + seconds

    def use(number: int) -> None:
        count = 0
        while count == 0 or time.perf_counter() < end:
            try:
                reply = endpoint.chat(_body(run, model=model, client=number, count=count))
            except RolloutError as error:
                load.failures.append(str(error))
                return
            if reply.status == 200 and reply.events and "error" not in reply.events[-1]:
                load.replies.append(reply)
            else:
                load.failures.append(f"status {reply.status}: {reply.content or reply.events[-1:]}")
            count += 1

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def _body(run: BenchServeRun, *, model: str, client: int, count: int) -> dict[str, Any]:
    stream = python_stream(run.run.seed, "bench serve", client, count)
    text = " ".join(stream.choice(_WORDS) for _ in range(run.prompt_words))
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": run.max_tokens,
        "seed": stream.randrange(2**31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"tools": [_TOOL], "tool_choice": "required"} if run.with_tools else {})


def _row(load: _Load, *, number: int) -> dict[str, Any]:
    token_times = [_token_times(reply) for reply in load.replies]
    seen = {
        "first_token_s": [times[0] for times in token_times if times],
        "between_s": [late - early for times in token_times for early, late in pairwise(times)],
        "whole_s": [reply.seconds for reply in load.replies],
    }
    tokens = sum(_num_tokens(reply) for reply in load.replies)
    busy = sum(reply.seconds for reply in load.replies) / number
    row: dict[str, Any] = {
        "clients": number,
        "requests": len(load.replies),
        "failures": len(load.failures),
        "first_failure": load.failures[0][:200] if load.failures else "",
        "tokens_per_s": tokens / busy if busy else 0.0,
        "requests_per_s": len(load.replies) / busy if busy else 0.0,
    }
    for name, values in seen.items():
        row |= {f"{name}_{share}": _quantile(values, _SHARES[share]) for share in _SHARES}
    return row


def _token_times(reply: Reply) -> list[float]:
    """Return the times of the events that add text or a call."""
    times = []
    for event, seconds in zip(reply.events, reply.times, strict=True):
        delta = event["choices"][0]["delta"] if event.get("choices") else {}
        if any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls")):
            times.append(seconds)
    return times


def _num_tokens(reply: Reply) -> int:
    usage = reply.events[-1].get("usage")
    return int(usage["completion_tokens"]) if isinstance(usage, Mapping) else len(reply.events)


def _quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie; NaN when there are none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def render(rows: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """Return the table for the terminal; times in milliseconds, as 50th / 95th / 99th percentile."""
    table = Table("clients", "requests", "failed", "tokens/s", "first token", "between tokens", "whole", title=title)
    for row in rows:
        times = [
            " / ".join(f"{1000 * row[f'{name}_{share}']:.0f}" for share in _SHARES)
            for name in ("first_token_s", "between_s", "whole_s")
        ]
        counts = (row["clients"], row["requests"], row["failures"], f"{row['tokens_per_s']:.0f}")
        table.add_row(*map(str, counts), *times)
    return table
