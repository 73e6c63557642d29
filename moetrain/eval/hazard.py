"""Hazard of the first error by call: flat where errors are independent, rising where they follow from the length."""

from collections.abc import Sequence
from typing import Any

from moetrain.eval.rates import rate_row, wilson_of
from moetrain.rollout.types import Trajectory

_EDGES = (0, 10, 25, 50, 100, 200, 300, 500, 1000)
"""Bounds of the ranges of calls; the last range has no end."""


def hazard(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Return, by range of calls, the calls carried out without an earlier error and the first errors among them.

    Counted are scored trajectories whose environment measures progress and whose task says how many calls it requires.
    The first error of a trajectory that fails comes after its share of right calls, at the last call
    at the latest. Each row has the rate of errors per
    call with Wilson's 95 % interval.
    """
    lives = []
    for trajectory in trajectories:
        needed, progress, success = trajectory.num_calls_needed, trajectory.progress, trajectory.grade.success
        if trajectory.is_scored and progress is not None and needed:
            lives.append((needed if success else min(progress * needed, needed - 1), success))
    rows = []
    for low, high in zip(_EDGES, [*_EDGES[1:], float("inf")], strict=True):
        calls = sum(max(0.0, min(life, high) - low) for life, _ in lives)
        errors = sum(not success and low <= life < high for life, success in lives)
        if calls or errors:
            rate = wilson_of(errors, count=round(max(calls, errors)))
            rows.append({"from": low, "to": None if high == float("inf") else high, **rate_row(rate)})
    return rows
