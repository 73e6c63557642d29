"""What an RL algorithm provides. The trainer knows no algorithm.

N predicted tokens, G trajectories of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from moetrain.rollout.types import Trajectory


class Normalizer(StrEnum):
    """What the sum of token losses of a step is divided by; counted over all ranks."""

    sampled_tokens = "sampled_tokens"
    """Sampled tokens of all scored trajectories, those without an advantage included."""
    trained_tokens = "trained_tokens"
    """Sampled tokens of the trajectories that have an advantage."""
    trajectories = "trajectories"
    """Scored trajectories."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of each predicted token, float32 [N] with a graph, and sums over tokens to report as means per token."""

    loss_N: torch.Tensor
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """How graded trajectories become a loss. An implementation is a dataclass whose fields are its `rl.options`."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that `token_loss` reads; `moetrain.rl.columns.COLUMNS` lists them."""

    @property
    def normalizer(self) -> Normalizer:
        """What the sum of token losses is divided by."""

    def advantages(self, group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Return an advantage for each token of each segment of each trajectory of one task.

        `moetrain.rl.advantage.constant` gives every token of a trajectory the same one. The group has at least two
        members, all of them scored.
        """

    def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> TokenLoss:
        """Return the loss of each predicted token.

        logprobs_N: float32, of the present policy at the temperature that the token was sampled at, with a graph.
        columns: each [N].
        """
