"""What an export holds. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError


class ExportFormat(StrEnum):
    """How the routed experts are stored; everything else is the same in each."""

    int4 = "int4"
    """Codes and scales, `pack-quantized` as compressed-tensors reads it."""
    bf16 = "bf16"
    """The masters, cast to bf16: not what a quantised model was trained as."""
    bf16_dequantized = "bf16_dequantized"
    """The numbers that codes and scales stand for, in bf16: for engines without an INT4 kernel."""


@dataclass(kw_only=True)
class ExportConfig:
    """Writing a model for other programs."""

    format: ExportFormat = ExportFormat.int4
    """How the routed experts are stored."""
    shard_megabytes: int = 4096
    """Largest size of a weight file; a tensor is never cut."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shard_megabytes < 1:
            raise ConfigError(f"export.shard_megabytes is {self.shard_megabytes}: give at least 1")
