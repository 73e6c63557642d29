"""How a run is laid out over processes. No torch here."""

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
"""The ZeRO stage that keeps weights in parts."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout of a run; none of it may change a number beyond rounding."""

    engine: EngineName = EngineName.deepspeed
    """Training engine."""
    expert: int = 1
    """Ranks that share the experts of a layer (EP); must divide the world size and model.num_experts."""
    zero: int = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 the weights too."""
    recompute: Recompute = Recompute.none
    """blocks keeps the inputs of attention, feed-forward and experts alone, and computes the rest of them again in the
    backward pass; the router never runs twice. Same numbers, less memory, more time."""
    expert_rows: int | None = None
    """Most rows (a token times a chosen expert) that a rank's experts receive and compute on at once; more go in
    rounds, each computed again in the backward pass, so that memory does not depend on the router. null: no limit, and
    memory grows with the imbalance."""
    timeout_s: int = 1800
    """Seconds after which a collective that hangs is an error that names the step and the ranks that did not arrive."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="parallel.", ranges={COUNT: ("expert", "expert_rows", "timeout_s")})
        if self.zero not in (1, 2, 3):
            raise ConfigError(
                f"parallel.zero is {self.zero}: give 1, 2 or 3 (stage 0 leaves experts out of the gradient norm, or "
                "averages it over ranks that hold different experts)"
            )
        if self.engine is EngineName.torch and self.zero > 1:
            raise ConfigError(
                f"parallel.zero is {self.zero}: parallel.engine=torch runs in one process and cuts nothing, use 1 or "
                "parallel.engine=deepspeed"
            )

    def check_world_size(self, world_size: int) -> None:
        """Raise `ConfigError` when a run of that many processes cannot be laid out like this."""
        if self.engine is EngineName.torch and world_size > 1:
            raise ConfigError(f"parallel.engine is torch, which runs in one process, not {world_size}: use deepspeed")
        if self.engine is EngineName.torch and self.expert > 1:
            raise ConfigError(f"parallel.expert is {self.expert}: parallel.engine=torch runs in one process, use 1")
        if world_size % self.expert:
            raise ConfigError(f"parallel.expert is {self.expert}: it must divide the number of processes, {world_size}")
