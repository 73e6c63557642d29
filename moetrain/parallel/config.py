"""How a run is laid out over processes. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError


class EngineName(StrEnum):
    """Training engine: DeepSpeed, or the plain torch loop that it is tested against (one process)."""

    deepspeed = "deepspeed"
    torch = "torch"


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout of a run; none of it may change a number beyond rounding."""

    engine: EngineName = EngineName.deepspeed
    """Training engine."""
    expert: int = 1
    """Ranks that share the experts of a layer (EP); must divide the world size and model.num_experts."""
    zero: int = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 gradients too."""
    timeout_s: int = 1800
    """Seconds after which a collective that hangs is an error that names the step and the ranks that did not arrive."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.expert < 1:
            raise ConfigError(f"parallel.expert is {self.expert}: give at least 1")
        if self.zero not in (1, 2):
            raise ConfigError(
                f"parallel.zero is {self.zero}: give 1 or 2 (stage 0 clips experts wrongly under expert parallelism, "
                "stage 3 is not offered yet)"
            )
