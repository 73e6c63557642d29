"""Config of an export. Does not import torch."""

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from moetrain.errors import ConfigError
from moetrain.quant.config import QuantConfig
from moetrain.quant.consumers import Consumer
from moetrain.ranges import check_unused


class ExportFormat(StrEnum):
    """How the routed experts are stored; all other tensors are stored in the same way."""

    quantized = "quantized"
    """Codes and scales in the format `quant.format`, in the layout of compressed-tensors."""
    bf16 = "bf16"
    """The float32 masters, cast to bf16. They differ from the quantised weights that training multiplied with."""
    bf16_dequantized = "bf16_dequantized"
    """Codes and scales, dequantised to bf16: for engines without a kernel for the format."""
    gguf = "gguf"
    """One GGUF file for llama.cpp: codes and scales as Q4_0 blocks if the experts are quantised, else `gguf_dtype`."""


class GgufDtype(StrEnum):
    """How a GGUF file stores the tensors that are neither quantised nor read in float32."""

    bf16 = "bf16"
    """In bf16, as a folder of safetensors does."""
    float32 = "float32"
    """In float32, without rounding."""


@dataclass(kw_only=True)
class ExportConfig:
    """Export of a model for other programs."""

    format: ExportFormat = ExportFormat.quantized
    """How the routed experts are stored."""
    gguf_dtype: GgufDtype = GgufDtype.bf16
    """How format=gguf stores the tensors that are not quantised, except those that are always float32."""
    consumers: list[Consumer] | None = None
    """Programs that must compute the model as it was trained. The export is refused when one of them would compute it
    differently. [moetrain] writes a folder that only this package must read. null: llama_cpp for gguf, else
    transformers."""
    shard_megabytes: int = 4096
    """Largest size of a weight file in MiB; a tensor is never split over files."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shard_megabytes < 1:
            raise ConfigError(f"export.shard_megabytes is {self.shard_megabytes}: give at least 1")
        if self.format is not ExportFormat.gguf:
            reason = f"export.format is {self.format}"
            check_unused(self, prefix="export.", fields=("gguf_dtype",), reason=reason)
        if self.consumers is not None and not self.consumers:
            raise ConfigError(f"export.consumers is empty: give at least one of {', '.join(Consumer)}")

    @property
    def wanted(self) -> list[Consumer]:
        """Programs that must compute the model as it was trained."""
        if self.consumers is not None:
            return self.consumers
        return [Consumer.llama_cpp if self.format is ExportFormat.gguf else Consumer.transformers]

    def check_library(self) -> None:
        """Raise ConfigError when the package that writes the format is not installed."""
        if self.format is ExportFormat.gguf and find_spec("gguf") is None:
            raise ConfigError(
                "export.format=gguf requires the package gguf, which is not installed: pip install 'moetrain[gguf]'"
            )


def exported_quant(trained: QuantConfig | None, *, given: QuantConfig) -> QuantConfig:
    """Return how weights are exported: as they were trained, or as `given` if they were trained without quantisation.

    Raises ConfigError if both are quantised and differ, or if `given` has settings but is not enabled.
    """
    if trained is None or not trained.enabled:
        if not given.enabled and given != QuantConfig():
            raise ConfigError("quant has settings but quant.enabled is false: give quant=int4 or quant=mxfp4")
        return given
    for name in ("format", "grid", "group_size"):
        default, wanted, own = getattr(QuantConfig(), name), getattr(given, name), getattr(trained, name)
        is_given = wanted != default or (name == "format" and given.enabled)
        if wanted != own and is_given:
            raise ConfigError(
                f"quant.{name} is {wanted}, and the weights were trained with {own}: leave quant out, because an "
                "export keeps the codes and scales of training"
            )
    return trained
