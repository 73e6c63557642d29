"""Plugin that `verify faults` loads into real runs. It stops a rank at a chosen moment, or puts NaN into a batch.

The rest of the package does not depend on it. It wraps functions of the system and of torch (fsync, rename,
collectives), so that moments are defined by file operations and messages and not by the package's code. Exceptions are
collectives in shared memory and the injected faults, which wrap functions of the package.
`MOETRAIN_FAULT` contains a `Plan` as JSON. Without it, and after an elastic restart, the plugin does nothing.

A rank that reaches its moment writes it to `<folder>/gate_<rank>` and stops itself with SIGSTOP, which stops all its
threads until `verify faults` kills or resumes it. `<folder>/pid_<rank>` contains the process id, and
`<folder>/place_<rank>` the collective that the rank last entered or left.
"""

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.data.batch import WEIGHT
from moetrain.parallel.host_memory import HostMemory
from moetrain.runtime import rank, seed_of

VARIABLE = "MOETRAIN_FAULT"
COLLECTED = "collected"
"""Beginning of the names of the files with the trajectories that a rank finished."""
COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "reduce",
)
SHARED_MEMORY_COLLECTIVES = ("sum_", "gather", "exchange")
"""Collectives of `HostMemory`, which ranks on one host perform in shared memory."""
_FINAL = re.compile(r"^step_\d{8}$")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to inject into one attempt of a run.

    folder: where ranks write their reports. moment: `fsync` (in a partially written checkpoint), `before_rename` or
    `after_rename` (to a checkpoint's final name), `collective`, `trajectory` (RL has finished one), or `none`. number:
    which occurrence, from 1. rank: the rank that stops. nan_row: first row of the batch whose last row gets a loss
    weight of NaN; -1 for none.
    planted: fault on resuming: `step` (one step too late), `weight` (one row changed) or `none`.
    """

    folder: str
    moment: str = "none"
    number: int = 1
    rank: int = 0
    nan_row: int = -1
    planted: str = "none"


class _Gate:
    """Counts the occurrences of the plan's moment and stops the process at the chosen one."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan, self._rank, self._seen = plan, rank, 0

    def count(self, moment: str, detail: str) -> None:
        """Count `moment` if it is the plan's, and stop this process at the planned occurrence."""
        if moment != self._plan.moment or self._rank != self._plan.rank:
            return
        self._seen += 1
        if self._seen == self._plan.number:
            Path(self._plan.folder, f"gate_{self._rank}").write_text(
                f"{moment} {self._seen}: {detail}\n", encoding="utf-8"
            )
            os.kill(os.getpid(), signal.SIGSTOP)


def _watch_files(gate: _Gate) -> None:
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/.step_" in path:
            gate.count("fsync", path)
        fsync(descriptor)

    def watched_rename(source: Any, target: Any, **options: Any) -> None:
        is_final = _FINAL.match(Path(target).name) is not None
        if is_final:
            gate.count("before_rename", str(target))
        rename(source, target, **options)
        if is_final:
            gate.count("after_rename", str(target))

    os.fsync = watched_fsync  # type: ignore[assignment]
    os.rename = watched_rename  # type: ignore[assignment]


def _watch_collectives(gate: _Gate, place: Path) -> None:
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT)

    def with_reports(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(*values: Any, **options: Any) -> Any:
            gate.count("collective", name)
            os.pwrite(descriptor, f"in  {name:30}\n".encode(), 0)
            try:
                return collective(*values, **options)
            finally:
                os.pwrite(descriptor, f"out {name:30}\n".encode(), 0)

        return call

    for name in SHARED_MEMORY_COLLECTIVES:
        setattr(HostMemory, name, with_reports(name, getattr(HostMemory, name)))
    for name in COLLECTIVES:
        setattr(dist, name, with_reports(name, dist.__dict__[name]))


def _watch_trajectories(gate: _Gate, path: Path) -> None:
    """Write the task and sample of each trajectory that RL finishes to `path`, and count it as a moment."""
    from moetrain.rollout.journal import Journal

    add = Journal.add

    def watched_add(self: Journal, request: Any, trajectory: Any) -> None:
        add(self, request, trajectory)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{request.task_index}/{request.sample}\n")
        gate.count("trajectory", f"{request.task_index}/{request.sample}")

    Journal.add = watched_add  # type: ignore[method-assign]


def _inject_nan(first_row: int) -> None:
    from moetrain.data.loader import Loader

    rows_between = Loader.rows_between

    def with_nan(self: Loader, start: int, stop: int) -> Any:
        batch = rows_between(self, start, stop)
        if start != first_row:
            return batch
        weights_BT = torch.ones(batch.tokens_BT.shape)
        weights_BT[-1] = float("nan")  # a single row, so that only one rank gets it
        return batch.with_columns({WEIGHT: weights_BT})

    Loader.rows_between = with_nan  # type: ignore[method-assign]


def _inject_on_resume(planted: str) -> None:
    import torch

    from moetrain.train import loop

    resume = loop.__dict__["resume"]

    def faulty_resume(engine: Any, *values: Any, **options: Any) -> Any:
        resumed = resume(engine, *values, **options)
        if resumed.step == 0:
            return resumed
        if planted == "step":
            return replace(resumed, step=resumed.step + 1)
        factor_M = torch.ones(engine.model.lm_head.weight.shape[0])
        factor_M[seed_of(0, "planted") % len(factor_M)] = 1.0 + 2.0**-10
        engine.multiply_rows({"lm_head.weight": factor_M})
        return resumed

    vars(loop)["resume"] = faulty_resume


def install() -> None:
    """Install the hooks for the plan in the environment variable `MOETRAIN_FAULT`, if it is set."""
    text = os.environ.get(VARIABLE)
    if text is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    plan = Plan(**json.loads(text))
    own = rank()
    Path(plan.folder, f"pid_{own}").write_text(str(os.getpid()), encoding="utf-8")
    gate = _Gate(plan, own)
    _watch_files(gate)
    _watch_collectives(gate, Path(plan.folder, f"place_{own}"))
    _watch_trajectories(gate, Path(plan.folder, f"{COLLECTED}_{own}"))
    if plan.nan_row >= 0:
        _inject_nan(plan.nan_row)
    if plan.planted != "none":
        _inject_on_resume(plan.planted)


install()
