"""Advantages per token. G trajectories of a group."""

from collections.abc import Sequence

from moetrain.rollout.types import Trajectory


def constant(trajectory: Trajectory, value: float) -> list[list[float]]:
    """Return `value` for every token of every segment of a trajectory."""
    return [[value] * len(segment.tokens) for segment in trajectory.segments]


def centred(group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
    """Return each trajectory's reward minus the group's mean, for every token of its segments."""
    mean = sum(trajectory.reward for trajectory in group_G) / len(group_G)
    return [constant(trajectory, trajectory.reward - mean) for trajectory in group_G]
