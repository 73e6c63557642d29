"""Config of an export. Does not import torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.quant.consumers import Consumer


class ExportFormat(StrEnum):
    """How the routed experts are stored; all other tensors are stored in the same way."""

    quantized = "quantized"
    """Codes and scales in the format `quant.format`, in the layout of compressed-tensors."""
    bf16 = "bf16"
    """The float32 masters, cast to bf16. They differ from the quantised weights that training multiplied with."""
    bf16_dequantized = "bf16_dequantized"
    """Codes and scales, dequantised to bf16: for engines without a kernel for the format."""


@dataclass(kw_only=True)
class ExportConfig:
    """Export of a model for other programs."""

    format: ExportFormat = ExportFormat.quantized
    """How the routed experts are stored."""
    consumers: list[Consumer] = field(default_factory=lambda: [Consumer.transformers])
    """Programs that must compute the model as it was trained. The export is refused when one of them would compute it
    differently. [moetrain] writes a folder that only this package must read."""
    shard_megabytes: int = 4096
    """Largest size of a weight file in MiB; a tensor is never split over files."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shard_megabytes < 1:
            raise ConfigError(f"export.shard_megabytes is {self.shard_megabytes}: give at least 1")
        if not self.consumers:
            raise ConfigError(f"export.consumers is empty: give at least one of {', '.join(Consumer)}")
