"""Config of the layout of a run over processes. Does not import torch."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.model.config import Recompute
from moetrain.ranges import COUNT, check_ranges


class EngineName(StrEnum):
    """Training engine: DeepSpeed, or the plain torch loop that it is tested against (one process)."""

    deepspeed = "deepspeed"
    torch = "torch"


PARTITIONING_STAGE = 3
"""The ZeRO stage that shards weights."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout of a run. It changes no result beyond rounding."""

    engine: EngineName = EngineName.deepspeed
    """Training engine."""
    expert: int = 1
    """Ranks that share the experts of a layer (EP); must divide the world size and model.num_experts."""
    zero: int = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights."""
    recompute: Recompute = Recompute.none
    """blocks stores only the inputs of attention, feed-forward and experts, and recomputes these parts in the backward
    pass; the router never runs twice. Same results, less memory, more time."""
    expert_rows: int | None = None
    """Maximum rows (a token times a chosen expert) that a rank's experts receive at once. More rows are processed in
    rounds, which are recomputed in the backward pass, so memory does not depend on the router. null: no limit; memory
    grows with the imbalance."""
    timeout_s: int = 1800
    """Seconds after which a hanging collective is an error that names the step and the ranks that did not arrive."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="parallel.", ranges={COUNT: ("expert", "expert_rows", "timeout_s")})
        if self.zero not in (1, 2, 3):
            raise ConfigError(
                f"parallel.zero is {self.zero}: give 1, 2 or 3 (stage 0 leaves experts out of the gradient norm, or "
                "averages it over ranks with different experts)"
            )
        if self.engine is EngineName.torch and self.zero > 1:
            raise ConfigError(
                f"parallel.zero is {self.zero}: parallel.engine=torch runs in one process and shards nothing: "
                "give 1, or parallel.engine=deepspeed"
            )

    def check_world_size(self, world_size: int) -> None:
        """Raise `ConfigError` if this layout is impossible with `world_size` processes."""
        if self.engine is EngineName.torch and world_size > 1:
            raise ConfigError(f"parallel.engine is torch, which runs in one process, not {world_size}: give deepspeed")
        if self.engine is EngineName.torch and self.expert > 1:
            raise ConfigError(f"parallel.expert is {self.expert}: parallel.engine=torch runs in one process: give 1")
        if world_size % self.expert:
            raise ConfigError(f"parallel.expert is {self.expert}: it must divide the number of processes, {world_size}")
