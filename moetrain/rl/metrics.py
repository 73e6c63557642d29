"""Metrics of a step's trajectories."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from moetrain.inference.protocol import Counts
from moetrain.log import TIME_PREFIX
from moetrain.rollout.types import Ending, Trajectory

GENERATION_PREFIX = "generation/"
"""Prefix of metrics of what was generated now: a step that resumes does not generate what it had already collected."""


def generation_metrics(counts: Sequence[Counts], *, seconds: float) -> dict[str, float]:
    """Return sums over the engines of all ranks: `cached_tokens` of prompts, `accepted_tokens` of drafts, and
    `preemptions`, the times that a sequence lost its pages and was read again. `time/generation_busy` is the share of
    `seconds`, summed over ranks, in which sequences were continued; the rest was spent waiting for environments.
    """
    return {
        GENERATION_PREFIX + "cached_tokens": float(sum(each.num_cached for each in counts)),
        GENERATION_PREFIX + "accepted_tokens": float(sum(each.num_right for each in counts)),
        GENERATION_PREFIX + "preemptions": float(sum(each.num_preemptions for each in counts)),
        TIME_PREFIX + "generation_busy": sum(each.busy_s for each in counts) / max(seconds, 1e-9),
    }


def staleness_metrics(groups: Sequence[Sequence[Trajectory]], *, step: int) -> dict[str, float]:
    """Return how many steps older than `step` the weights are that sampled the first token of a trajectory."""
    ages = [
        step - min(version for segment in trajectory.segments for version in segment.versions)
        for group in groups
        for trajectory in group
        if trajectory.segments
    ]
    return {"staleness": sum(ages) / max(len(ages), 1), "staleness_max": float(max(ages, default=0))}


def rollout_metrics(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Return rewards, lengths, errors and endings of a step's trajectories.

    `reward`, its parts and `success/*` are means over the scored trajectories, and are absent when there are none.
    `unscored` is the share of the other trajectories. `success/calls_n` is the success rate of tasks that require n
    calls. Per trajectory, `replaced` is the number of replaced attempts and `cut_outputs` that of tool results cut.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    count = max(len(trajectories), 1)
    endings = Counter(trajectory.ending for trajectory in trajectories)
    return {
        **_rewards([trajectory for trajectory in trajectories if trajectory.is_scored]),
        "unscored": sum(not trajectory.is_scored for trajectory in trajectories) / count,
        "groups_with_signal": sum(len({t.reward for t in group if t.is_scored}) > 1 for group in groups)
        / max(len(groups), 1),
        "sampled_tokens": sum(trajectory.num_sampled for trajectory in trajectories),
        "trajectory_tokens": sum(trajectory.num_tokens for trajectory in trajectories) / count,
        "turns": sum(trajectory.num_turns for trajectory in trajectories) / count,
        "replaced": sum(trajectory.num_replaced for trajectory in trajectories) / count,
        "cut_outputs": sum(trajectory.num_cut_outputs for trajectory in trajectories) / count,
        "tool_errors": sum(trajectory.num_errors for trajectory in trajectories) / count,
        **{f"ending/{ending.value}": endings[ending] / count for ending in Ending},
    }


def _rewards(scored: Sequence[Trajectory]) -> dict[str, float]:
    if not scored:
        return {}
    by_calls: dict[int, list[bool]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    for trajectory in scored:
        if trajectory.num_calls_needed is not None:
            by_calls[trajectory.num_calls_needed].append(trajectory.grade.success)
        for name, value in trajectory.grade.parts.items():
            parts[name].append(value)
    after_error = [trajectory.grade.success for trajectory in scored if trajectory.num_transient_errors]
    return {
        "reward": sum(trajectory.reward for trajectory in scored) / len(scored),
        "success": sum(trajectory.grade.success for trajectory in scored) / len(scored),
        **{f"reward/{name}": sum(values) / len(values) for name, values in sorted(parts.items())},
        **{f"success/calls_{calls}": sum(values) / len(values) for calls, values in sorted(by_calls.items())},
        **({"success/after_tool_error": sum(after_error) / len(after_error)} if after_error else {}),
    }
