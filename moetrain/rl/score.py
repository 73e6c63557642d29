"""Selects the rows that a step trains on, and computes the divisor of their losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.rl.advantage import penalise_malformed
from moetrain.rl.columns import Row
from moetrain.rl.protocol import Algorithm, Normalizer
from moetrain.rollout.types import Trajectory

_SMALLEST_GROUP = 2
"""Smallest number of scored trajectories for a baseline."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rows that a step trains on.

    divisor: the sum of token losses is divided by it. num_small_groups: groups without a baseline.
    """

    rows: list[Row]
    divisor: float
    num_small_groups: int


def score(groups: Sequence[Sequence[Trajectory]], algorithm: Algorithm, *, malformed_penalty: float = 0.0) -> Scored:
    """Return the segments that have an advantage other than 0.

    Unscored trajectories are excluded, and so are groups with fewer than two scored ones, which have no baseline. A
    segment whose advantages are all 0 has no policy gradient. Its tokens still count in the divisor when the algorithm
    divides by all sampled tokens. malformed_penalty: see `rl.malformed_penalty`. Raises ConfigError for advantages that
    do not have one number per token.
    """
    scored = [[trajectory for trajectory in group if trajectory.is_scored] for group in groups]
    scored_groups = [group for group in scored if len(group) >= _SMALLEST_GROUP]
    rows: list[Row] = []
    trajectories = [trajectory for group in scored_groups for trajectory in group]
    advantages = [per_segment for group in scored_groups for per_segment in _advantages(algorithm, group)]
    for number, (trajectory, of_algorithm) in enumerate(zip(trajectories, advantages, strict=True)):
        per_segment = penalise_malformed(trajectory, of_algorithm, penalty=malformed_penalty)
        for segment, per_token in zip(trajectory.segments, per_segment, strict=True):
            if segment.num_sampled and any(per_token):
                rows.append(Row(trajectory=trajectory, segment=segment, advantages=per_token, trajectory_id=number))
    trained = {row.trajectory_id: row.trajectory for row in rows}
    divisor = {
        Normalizer.sampled_tokens: sum(trajectory.num_sampled for trajectory in trajectories),
        Normalizer.trained_tokens: sum(trajectory.num_sampled for trajectory in trained.values()),
        Normalizer.trajectories: len(trajectories),
    }[algorithm.normalizer]
    return Scored(rows=rows, divisor=float(max(divisor, 1)), num_small_groups=len(scored) - len(scored_groups))


def _advantages(algorithm: Algorithm, group: Sequence[Trajectory]) -> list[list[list[float]]]:
    """Return the advantages of a group, after a check of their lengths."""
    advantages = algorithm.advantages(group)
    try:
        lengths = [[len(per_token) for per_token in per_segment] for per_segment in advantages]
    except TypeError:  # a number where a list belongs
        lengths = []
    if lengths != [[len(segment.tokens) for segment in trajectory.segments] for trajectory in group]:
        raise ConfigError(
            f"{type(algorithm).__name__}.advantages does not return one number per token: return a list per "
            "trajectory, of a list per segment, of a number per token; moetrain.rl.advantage.constant returns those "
            "of one trajectory"
        )
    numbers = [value for per_segment in advantages for per_token in per_segment for value in per_token]
    if bad := [value for value in numbers if not _is_finite(value)]:
        raise ConfigError(f"{type(algorithm).__name__}.advantages returns {bad[0]!r}: return finite numbers")
    return advantages


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]  # an algorithm of a plugin may return anything
    except TypeError:
        return False
