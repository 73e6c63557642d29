"""Trajectories by hand: what the tests of this folder share."""

from collections.abc import Sequence

from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.tasks.protocol import Grade


def segment_of(length: int, *, num_sampled: int = 3, logprob: float = -0.5, temperature: float = 1.0) -> Segment:
    """Return a segment of `length` tokens, the last `num_sampled` of them sampled."""
    given = length - num_sampled
    return Segment(
        tokens=list(range(1, length + 1)),
        is_sampled=[False] * given + [True] * num_sampled,
        logprobs=[0.0] * given + [logprob] * num_sampled,
        versions=[4] * length,
        temperature=temperature,
    )


def draw_trajectory(
    segments: Sequence[Segment], *, reward: float = 1.0, ending: Ending = Ending.answered
) -> Trajectory:
    """Return a trajectory of these segments."""
    return Trajectory(
        task=0,
        sample=0,
        num_calls_needed=2,
        segments=list(segments),
        grade=Grade(reward=reward, reason="right"),
        ending=ending,
        num_turns=1,
        num_calls=0,
        num_errors=0,
        num_transient_errors=0,
    )
