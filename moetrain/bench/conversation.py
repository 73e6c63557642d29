"""One long conversation on moetrain's engine: what the same number of tokens costs in its later turns, and how long the
first token after a long prompt takes, when the prompt is new and when it has been read before.

The given tokens are random. A conversation may be longer than the model was trained for, since only its time counts.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from moetrain.bench.spread import spread
from moetrain.commands.bench_generation import ConversationConfig
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.protocol import Model, Sequence

_NEARBY = 5
"""Turns on each side of a turn that its time is the median of."""
_SHOWN = (10, 25, 50, 100, 200, 300)
_REPEATED = 3
"""Times that a prompt is repeated."""


def time_conversation(model: Model, config: ConversationConfig, *, vocab_size: int, seed: int) -> dict[str, Any]:
    """Return {"turns": rows of turn, tokens before it, seconds, and ratio to the first row; "prefix": seconds}."""
    rng = random.Random(f"bench rollout:conversation:{seed}")

    def drawn(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    seconds = _seconds_of_turns(model, config, drawn)
    rows: list[dict[str, Any]] = []
    for turn in sorted({turn for turn in (*_SHOWN, config.turns) if turn <= config.turns}):
        near = seconds[max(0, turn - 1 - _NEARBY) : turn + _NEARBY]
        rows.append({"turn": turn, "tokens": (turn - 1) * config.turn_tokens, "seconds": spread(near)})
    for row in rows:
        row["ratio"] = row["seconds"]["median"] / rows[0]["seconds"]["median"]
    return {"turns": rows, "prefix": _seconds_of_prefix(model, config, drawn)}


def _seconds_of_turns(model: Model, config: ConversationConfig, drawn: Callable[[int], list[int]]) -> list[float]:
    longest = config.turns * config.turn_tokens
    engine = GenerationEngine(model, num_slots=1, max_tokens=longest)
    sequence = Sequence(tokens=drawn(config.given_tokens), stream=0, limit=config.turn_tokens)
    seconds = []
    for turn in range(config.turns):
        given = [] if turn == 0 else drawn(config.given_tokens)
        start = time.perf_counter()
        if turn == 0:
            engine.add(sequence)
        else:
            engine.extend(sequence, given, limit=(turn + 1) * config.turn_tokens)
        while not sequence.is_idle:
            engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def _seconds_of_prefix(model: Model, config: ConversationConfig, drawn: Callable[[int], list[int]]) -> dict[str, float]:
    """Return the seconds to the first token after a new prompt, and when it is repeated; and the cached tokens."""
    prompt = drawn(config.prefix_tokens)
    engine = GenerationEngine(model, num_slots=1, max_tokens=config.prefix_tokens + 1)
    seconds = []
    for stream in range(1 + _REPEATED):
        sequence = Sequence(tokens=list(prompt), stream=stream, limit=config.prefix_tokens + 1)
        start = time.perf_counter()
        engine.add(sequence)
        while not sequence.is_idle:
            engine.step()
        seconds.append(time.perf_counter() - start)
        engine.cancel(sequence)
    return {"first_s": seconds[0], "repeated_s": statistics.median(seconds[1:]), "cached": sequence.num_cached}


def render_conversation(report: Mapping[str, Any], config: Mapping[str, int]) -> Iterator[RenderableType]:
    """Yield the table of the turns and a line for the prompt."""
    tokens = config["given_tokens"] + config["new_tokens"]
    table = Table(
        "turn",
        "tokens before it",
        "ms (min - max)",
        f"against turn {report['turns'][0]['turn']}",
        title=f"one conversation: {config['turns']} turns of {tokens} tokens, {config['new_tokens']} of them new",
    )
    for row in report["turns"]:
        least, median, most = (1000 * row["seconds"][key] for key in ("min", "median", "max"))
        table.add_row(
            str(row["turn"]), f"{row['tokens']:,}", f"{median:.1f} ({least:.1f} - {most:.1f})", f"{row['ratio']:.2f}"
        )
    yield table
    first, repeated, cached = (report["prefix"][key] for key in ("first_s", "repeated_s", "cached"))
    yield (
        f"first token after a prompt of {config['prefix_tokens']:,} tokens: {1000 * first:,.0f} ms; "
        f"after the same prompt again, {cached:,} of them in the cache: {1000 * repeated:,.1f} ms, "
        f"{first / repeated:,.0f} x less"
    )
