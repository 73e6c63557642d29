"""What an export holds. No torch here."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.quant.consumers import Consumer


class ExportFormat(StrEnum):
    """How the routed experts are stored; everything else is the same in each."""

    quantized = "quantized"
    """Codes and scales in the format of the weights (`quant.format`), as compressed-tensors reads it."""
    bf16 = "bf16"
    """The masters, cast to bf16: not what a quantised model was trained as."""
    bf16_dequantized = "bf16_dequantized"
    """The numbers that codes and scales stand for, in bf16: for engines without a kernel for the format."""


@dataclass(kw_only=True)
class ExportConfig:
    """Writing a model for other programs."""

    format: ExportFormat = ExportFormat.quantized
    """How the routed experts are stored."""
    consumers: list[Consumer] = field(default_factory=lambda: [Consumer.transformers])
    """Programs that must compute from the folder what the model was trained to compute; a model that one of them would
    compute otherwise is refused. [moetrain] writes a folder that this package alone reads."""
    shard_megabytes: int = 4096
    """Largest size of a weight file; a tensor is never split."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shard_megabytes < 1:
            raise ConfigError(f"export.shard_megabytes is {self.shard_megabytes}: give at least 1")
        if not self.consumers:
            raise ConfigError(f"export.consumers is empty: give at least one of {', '.join(Consumer)}")
