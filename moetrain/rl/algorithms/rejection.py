"""Rejection-sampled fine-tuning: maximises the likelihood of solved trajectories. A baseline for RL algorithms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moetrain.rl.advantage import constant
from moetrain.rl.protocol import Normalizer, TokenLoss
from moetrain.rollout.types import Trajectory


@dataclass(kw_only=True)
class Rejection:
    """Loss of a token: -advantage * log p, where the advantage is 1 for a solved trajectory and 0 for any other."""

    columns = ("advantage",)
    normalizer = Normalizer.trained_tokens

    def advantages(self, group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Return 1 for each token of a solved trajectory, 0 for each token of any other."""
        return [constant(trajectory, float(trajectory.grade.success)) for trajectory in group_G]

    def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> TokenLoss:
        """Return the loss of each token."""
        return TokenLoss(loss_N=-columns["advantage"] * logprobs_N)
