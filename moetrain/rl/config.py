"""Config of the policy update. Does not import torch."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from moetrain.errors import ConfigError
from moetrain.inference.mode import Mode
from moetrain.kernels.config import Kernels
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges
from moetrain.rollout.config import RolloutConfig
from moetrain.train.config import ComputeDtype, TrainConfig


class BalanceLosses(StrEnum):
    """Balance losses in the objective. none: the policy loss only. model: also those weighted in `model.balance`."""

    none = "none"
    model = "model"


@dataclass(kw_only=True)
class RlConfig:
    """One RL step: a number of tasks, a group of trajectories for each, one update."""

    algorithm: str = "k2_5"
    """Algorithm of the update: k2_5, the token-level objective of Kimi K2.5; rejection, fine-tuning on the solved
    trajectories of the same batch; or an algorithm that a plugin registers."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the algorithm by name, the fields of its class, such as rl.options.tau=0.1 with k2_5."""
    tasks_per_step: int = 16
    """Tasks per optimizer step (P)."""
    group_size: int = 8
    """Trajectories per task (G); the baseline is their mean reward."""
    max_staleness: int = 0
    """Largest number of steps between the beginning of a group and its use. 0: each step collects its groups with its
    own weights, and runs are reproducible. Above 0, groups of later steps start early and continue with newer weights,
    so that the slowest trajectories of a step are not waited for. The cache of generation then stays allocated during
    updates, and rollout.max_seconds includes them."""
    malformed_penalty: float = 0.0
    """Subtracted from the advantage of each token of a turn that ends its trajectory because it cannot be parsed or is
    too long. The advantages of other turns are not changed."""
    balance_losses: BalanceLosses = BalanceLosses.none
    """Which balance losses are part of the objective. The balance bias is updated in both cases."""
    tokens_per_micro_batch: int = 16384
    """Largest number of tokens of a micro-batch of one rank, including padding."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("tasks_per_step", "tokens_per_micro_batch")
        check_ranges(self, prefix="rl.", ranges={COUNT: counts, NOT_NEGATIVE: ("malformed_penalty", "max_staleness")})
        if self.group_size < 2:
            raise ConfigError(
                f"rl.group_size is {self.group_size}: give at least 2 trajectories per task, for a group baseline"
            )


def check_mode(rollout: RolloutConfig, train: TrainConfig) -> None:
    """Raise ConfigError if rollouts must have the bits of training, and training does not use the native kernels."""
    if rollout.mode is not Mode.deterministic:
        return
    for name, value, cure in (
        ("kernels", train.kernels, Kernels.auto),
        ("compute_dtype", train.compute_dtype, ComputeDtype.bfloat16),
    ):
        if value in (Kernels.torch, ComputeDtype.float32):
            raise ConfigError(
                f"rollout.mode is deterministic and train.{name} is {value}: only the native kernels, in bfloat16, "
                f"give training and generation the same bits. Give train.{name}={cure}, or rollout.mode=fast"
            )


def kernels_for(rollout: RolloutConfig, train: TrainConfig) -> TrainConfig:
    """Return `train`; with deterministic rollouts it requires the native kernels instead of `auto`."""
    return replace(train, kernels=Kernels.native) if rollout.mode is Mode.deterministic else train
