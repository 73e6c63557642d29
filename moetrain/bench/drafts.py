"""`moetrain bench drafts`: times trajectories of a model's tasks without drafts and with each kind of draft, in turn.

With native kernels all contestants generate the same tokens, which is checked: a draft changes the number of steps and
no token. In torch's kernels the order of sums depends on the number of rows; there, trajectories that differ are
counted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.table import Table

from moetrain.bench.spread import spread, spread_text
from moetrain.commands.bench_generation import BenchDraftsRun
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import BoundError
from moetrain.inference.native import NativeModel
from moetrain.inference.protocol import Counts, Model
from moetrain.inference.speculation import Speculation
from moetrain.log import progress
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.engine import make_generation
from moetrain.rollout.making import make_task
from moetrain.rollout.types import Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Split, TaskFamily


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to generate. model: the weights, with the module of multi-token prediction where it drafts."""

    name: str
    model: Model
    speculation: Speculation


def bench_drafts(
    run: BenchDraftsRun, *, contestants: Sequence[Contestant], family: TaskFamily, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return a row per contestant. The first one is what the others are compared with.

    Raises BoundError if two contestants with native kernels generate different trajectories.
    """
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    rows: dict[str, dict[str, Any]] = {}
    expected: list[Trajectory] | None = None
    with progress((run.repetitions + 1) * len(contestants), "bench drafts") as advance:
        for repetition in range(run.repetitions + 1):  # the first one warms up
            for contestant in contestants:
                config = replace(run.rollout, speculation=contestant.speculation)
                generation = make_generation(contestant.model, config, num_sequences=run.episodes)
                began = time.perf_counter()
                trajectories = collect(
                    _requests(run, family),
                    generation=generation,
                    family=family,
                    tokenizer=tokenizer,
                    config=config,
                    declare_tools=run.task.declare_tools,
                    policy=run.task.context,
                )
                taken = time.perf_counter() - began
                expected = trajectories if expected is None else expected
                pairs = zip(trajectories, expected, strict=True)
                num_changed = sum(one.segments != other.segments for one, other in pairs)
                if num_changed and isinstance(contestant.model, NativeModel):
                    raise BoundError(f"{contestant.name} generates other tokens than {contestants[0].name}")
                if repetition:
                    seconds[contestant.name].append(taken)
                rows[contestant.name] = {**_counts(generation.counts), "changed": num_changed}
                advance(contestant.name)
    assert expected is not None
    num_tokens = sum(trajectory.num_sampled for trajectory in expected)
    first = seconds[contestants[0].name]
    return {
        "tokens": num_tokens,
        "rows": [
            {
                "name": name,
                "tokens_per_s": spread([num_tokens / taken for taken in times]),
                "ratio": spread([plain / taken for plain, taken in zip(first, times, strict=True)]),
                **rows[name],
            }
            for name, times in seconds.items()
        ],
    }


def _requests(run: BenchDraftsRun, family: TaskFamily) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            task_index=index,
            task=make_task(partial(family.task, Split.held_out, index), limit_s=run.rollout.environment_deadline_s),
            sample=0,
            stream=seed_of(run.run.seed, "bench drafts", index),
        )
        for index in range(run.episodes)
    ]


def _counts(counts: Counts) -> dict[str, int]:
    return {"drafts": counts.num_drafts, "drafted": counts.num_drafted, "right": counts.num_right}


def render(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the table for the terminal."""
    table = Table("drafts", "tokens/s (min - max)", "ratio (min - max)", "drafts", "tokens", "right", "changed")
    for row in report["rows"]:
        share = f"{100 * row['right'] / row['drafted']:.0f} %" if row["drafted"] else "-"
        speed, ratio = spread_text(row["tokens_per_s"], digits=0), spread_text(row["ratio"], digits=2)
        table.add_row(
            row["name"], speed, ratio, f"{row['drafts']:,}", f"{row['drafted']:,}", share, str(row["changed"])
        )
    yield table
