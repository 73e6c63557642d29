"""From rewards to advantages, group by group."""

from collections.abc import Sequence

from moetrain.rl.config import Algorithm


def group_advantages(rewards_G: Sequence[float], algorithm: Algorithm) -> list[float]:
    """Return one advantage a trajectory of a group.

    policy: reward minus the group's mean, not divided by its deviation (arXiv 2602.02276, eq. 1; 2503.20783).
    rejection: 1 for a right trajectory, 0 for a wrong one.
    """
    if algorithm is Algorithm.rejection:
        return [float(reward > 0) for reward in rewards_G]
    mean = sum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]
