"""What is quantised and on which grid. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError


class GridName(StrEnum):
    """A row of `quant.grids.GRIDS`."""

    kimi7 = "kimi7"


@dataclass(kw_only=True)
class QuantConfig:
    """Fake-quant INT4 of the routed experts, with a straight-through gradient."""

    enabled: bool = False
    """Train with quantised expert weights."""
    grid: GridName = GridName.kimi7
    """Grid of codes and scales; kimi7 is the one of the released Kimi K2 Thinking."""
    group_size: int = 32
    """Consecutive inputs that share a scale."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.group_size < 8 or self.group_size % 8:
            raise ConfigError(
                f"quant.group_size is {self.group_size}: give a multiple of 8 (8 codes fill one int32 word)"
            )
