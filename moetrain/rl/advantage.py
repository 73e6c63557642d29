"""Computes advantages per token. G trajectories of a group."""

from collections.abc import Sequence

from moetrain.rollout.types import Ending, Segment, Trajectory

_MALFORMED = (Ending.invalid_turn, Ending.turn_too_long, Ending.thought_too_long)


def constant(trajectory: Trajectory, value: float) -> list[list[float]]:
    """Return `value` for every token of every segment of a trajectory."""
    return [[value] * len(segment.tokens) for segment in trajectory.segments]


def centred(group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
    """Return each trajectory's reward minus the group's mean, for every token of its segments."""
    mean = sum(trajectory.reward for trajectory in group_G) / len(group_G)
    return [constant(trajectory, trajectory.reward - mean) for trajectory in group_G]


def penalise_malformed(trajectory: Trajectory, advantages: list[list[float]], *, penalty: float) -> list[list[float]]:
    """Return the advantages of a trajectory, minus `penalty` on its last turn if that turn is malformed.

    A turn is malformed when it cannot be parsed or is too long, which ends the trajectory. A penalty on the reward
    would also apply to the other turns, which are well formed.
    """
    if not penalty or trajectory.ending not in _MALFORMED:
        return advantages
    penalised = list(advantages)
    for number in reversed(range(len(penalised))):
        segment = trajectory.segments[number]
        first = _start_of_last_turn(segment)
        penalised[number] = [value - penalty * (place >= first) for place, value in enumerate(penalised[number])]
        if not number or trajectory.segments[number - 1].tokens != segment.tokens[:first]:
            break  # else the earlier segment ends within the same turn
    return penalised


def _start_of_last_turn(segment: Segment) -> int:
    """Return the number of the first token of the run of sampled tokens that ends a segment."""
    start = len(segment.tokens)
    while start and segment.is_sampled[start - 1]:
        start -= 1
    return start
