"""Protocol of an RL algorithm. The trainer depends on the protocol, and on no particular algorithm.

N predicted tokens, G trajectories of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from moetrain.rollout.types import Trajectory


class Normalizer(StrEnum):
    """Divisor of a step's sum of token losses, counted over all ranks."""

    sampled_tokens = "sampled_tokens"
    """Sampled tokens of all scored trajectories, including those whose advantages are 0."""
    trained_tokens = "trained_tokens"
    """Sampled tokens of the trajectories with an advantage other than 0."""
    trajectories = "trajectories"
    """Number of scored trajectories."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of each predicted token, float32 [N] with a graph, and sums over tokens to report as means per token."""

    loss_N: torch.Tensor
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """Computes a loss from graded trajectories. An implementation is a dataclass whose fields are its `rl.options`."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns that `token_loss` reads; `moetrain.rl.columns.COLUMNS` lists them."""

    @property
    def normalizer(self) -> Normalizer:
        """Divisor of the sum of token losses."""

    def advantages(self, group_G: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Return an advantage for each token of each segment of each trajectory of one task.

        `moetrain.rl.advantage.constant` gives every token of a trajectory the same advantage. The group has at least
        two trajectories, all of them scored.
        """

    def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> TokenLoss:
        """Return the loss of each predicted token.

        logprobs_N: float32 with a graph, logprob of each token under the present policy, at the temperature at which it
        was sampled. columns: each [N].
        """
