"""How trajectories become a policy update. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges


class Algorithm(StrEnum):
    """policy: K2.5's token-level objective. rejection: fine-tuning on the right trajectories of the same batch, the
    control that an RL gain must beat."""

    policy = "policy"
    rejection = "rejection"


class BalanceLosses(StrEnum):
    """none: the objective is the policy's alone. model: the losses that `model.balance` gives a weight are added."""

    none = "none"
    model = "model"


@dataclass(kw_only=True)
class RlConfig:
    """One RL step: some tasks, a group of trajectories each, one update."""

    algorithm: Algorithm = Algorithm.policy
    """What the update is."""
    tasks_per_step: int = 16
    """Tasks an optimizer step (P)."""
    group_size: int = 8
    """Trajectories a task (G); the baseline is their mean reward."""
    ratio_low: float = 0.5
    """Probability ratio below which a token has no policy gradient, whatever the sign of its advantage."""
    ratio_high: float = 2.0
    """Probability ratio above which a token has no policy gradient."""
    tau: float = 1e-3
    """Weight of the squared log-ratio of each token (arXiv 2602.02276, eq. 1)."""
    balance_losses: BalanceLosses = BalanceLosses.none
    """Which balance losses are part of the objective; the balance bias moves in either case."""
    tokens_per_micro_batch: int = 16384
    """Tokens, padding included, that one rank holds in memory at once."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("tasks_per_step", "tokens_per_micro_batch")
        check_ranges(self, prefix="rl.", ranges={COUNT: counts, NOT_NEGATIVE: ("tau", "ratio_low", "ratio_high")})
        if self.group_size < 2:
            raise ConfigError(
                f"rl.group_size is {self.group_size}: a group baseline needs at least 2 trajectories a task"
            )
        if not 0 < self.ratio_low < 1 < self.ratio_high:
            raise ConfigError(
                f"rl.ratio_low, rl.ratio_high are {self.ratio_low}, {self.ratio_high}: give numbers below and above 1"
            )
