"""Hazard of the first error by call: flat where errors are independent, rising where they follow from the length."""

from collections.abc import Sequence
from typing import Any

from moetrain.eval.rates import rate_row, wilson_of
from moetrain.rollout.types import Ending, Trajectory

_EDGES = (0, 10, 25, 50, 100, 200, 300, 500, 1000)
"""Bounds of the ranges of calls; the last range has no end."""


_CENSORED = frozenset({Ending.max_turns, Ending.max_tokens, Ending.max_sampled_tokens})
"""Endings at a limit, which are no error. Such a trajectory counts with the calls that it made without one, unless its
environment says that it had erred before."""


def hazard(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Return, by range of calls, the calls carried out without an earlier error and the first errors among them.

    Counted are scored trajectories whose environment measures progress and whose task says how many calls it requires.
    The first error is placed at progress x required calls, so it may be some calls off. Each row has the rate of errors
    per call with Wilson's 95 % interval; `successes` is the number of errors and `count` that of calls.
    """
    lives = []  # (calls before the first error, whether there was one, calls counted)
    for trajectory in trajectories:
        needed, progress = trajectory.num_calls_needed, trajectory.progress
        if trajectory.is_scored and progress is not None and needed:
            right = needed if trajectory.grade.success else min(progress * needed, needed - 1)
            has_error = not trajectory.grade.success and (trajectory.has_erred or trajectory.ending not in _CENSORED)
            lives.append((right, has_error, right + has_error))
    rows = []
    for low, high in zip(_EDGES, [*_EDGES[1:], float("inf")], strict=True):
        calls = sum(max(0.0, min(counted, high) - low) for _, _, counted in lives)
        errors = sum(has_error and low <= right < high for right, has_error, _ in lives)
        if calls or errors:
            rate = wilson_of(errors, count=round(max(calls, errors)))
            rows.append({"from": low, "to": None if high == float("inf") else high, **rate_row(rate)})
    return rows
