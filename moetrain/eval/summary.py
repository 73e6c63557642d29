"""Summarises trajectories of an evaluation: success rates by calls and after tool errors, and counts of endings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.errors import RolloutError
from moetrain.eval.hazard import hazard
from moetrain.eval.rates import Difference, paired_difference, rate_row, wilson
from moetrain.rollout.types import Trajectory


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return success rates of one mode (overall, by calls needed, with and without a tool failure) and ending counts.

    Unscored trajectories are excluded from the rates; `unscored` counts them. `outcomes` contains success by task
    number and calls needed, for pairing with another evaluation of the same tasks.
    """
    endings = dict(sorted(Counter(t.ending.value for t in trajectories).items()))
    num_all, trajectories = len(trajectories), [t for t in trajectories if t.is_scored]
    by_calls = sorted({calls for trajectory in trajectories if (calls := trajectory.num_calls_needed) is not None})
    return {
        "all": rate_row(wilson([t.grade.success for t in trajectories])),
        "by_calls": {
            str(calls): rate_row(wilson([t.grade.success for t in trajectories if t.num_calls_needed == calls]))
            for calls in by_calls
        },
        "after_tool_error": rate_row(wilson([t.grade.success for t in trajectories if t.num_transient_errors])),
        "without_tool_error": rate_row(wilson([t.grade.success for t in trajectories if not t.num_transient_errors])),
        "reward": _mean([t.reward for t in trajectories]),
        "reward_parts": _parts(trajectories),
        "endings": endings,
        "unscored": num_all - len(trajectories),
        "grades": dict(sorted(Counter(t.grade.reason for t in trajectories if t.ending == "answered").items())),
        "hazard": hazard(trajectories),
        "mean_segments": sum(len(t.segments) for t in trajectories) / max(len(trajectories), 1),
        "mean_sampled_tokens": sum(t.num_sampled for t in trajectories) / max(len(trajectories), 1),
        "mean_calls": sum(t.num_calls for t in trajectories) / max(len(trajectories), 1),
        "outcomes": {f"{t.task}/{t.num_calls_needed}": t.grade.success for t in trajectories},
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _parts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the mean of each part of the rewards, over the trajectories whose grade has it."""
    names = sorted({name for trajectory in trajectories for name in trajectory.grade.parts})
    found = {name: [t.grade.parts[name] for t in trajectories if name in t.grade.parts] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def paired(before: Mapping[str, bool], after: Mapping[str, bool]) -> Difference | None:
    """Return the paired difference over the tasks that both evaluations contain; None when there are none."""
    tasks = [task for task in before if task in after]
    if not tasks:
        return None
    return paired_difference([before[task] for task in tasks], [after[task] for task in tasks])


def metric_values(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the main numbers of `eval.json` as metrics: success by mode, nats per character by source, divergence."""
    values: dict[str, float | None] = {}
    for weights in ("modes", "masters"):
        prefix = "success" if weights == "modes" else "success_of_masters"
        for mode, summary in numbers.get(weights, {}).items():
            values[f"{prefix}/{mode}"] = summary["all"]["value"] if summary["all"]["count"] else None
            values[f"{prefix}_after_tool_error/{mode}"] = (
                summary["after_tool_error"]["value"] if summary["after_tool_error"]["count"] else None
            )
    for source, nats in numbers.get("language", {}).items():
        values[f"nats_per_character/{source}"] = nats
    for name in ("mean_kl", "top1_changed"):
        values[f"divergence/{name}"] = numbers.get("divergence", {}).get(name)
    return {name: value for name, value in values.items() if value is not None}


_REASONS = {
    "environment_failed": "the environment failed each time; see the log",
    "prompt_too_long": "the prompts leave no room for a turn within rollout.max_tokens: raise it, or lower "
    "rollout.max_turn_tokens",
    "max_seconds": "all took longer than rollout.max_seconds: raise it",
}
"""Why a trajectory is not scored, by its ending."""


def check_scored(numbers: Mapping[str, Any]) -> None:
    """Raise RolloutError if an evaluation ran trajectories and could score none of them."""
    modes = numbers["modes"].values()
    if modes and not any(summary["all"]["count"] for summary in modes):
        endings = sum((Counter(summary["endings"]) for summary in modes), Counter[str]())
        counts = ", ".join(f"{name} {count}" for name, count in sorted(endings.items()))
        most = max(_REASONS, key=lambda ending: endings[ending])
        raise RolloutError(f"no trajectory could be scored ({counts}): {_REASONS[most]}")
