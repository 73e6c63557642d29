"""Enables fake quantisation: attaches quantisers to the experts modules that the caller passes.

The caller passes the modules to quantise, the routed experts; no name is matched against a pattern.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.quant.config import QuantConfig
from moetrain.quant.fake_quant import FakeQuantizer, Keep
from moetrain.quant.grids import check_group_size


class QuantizableExperts(Protocol):
    """The attributes of an experts module that `apply` uses; `model.moe.Experts` has them."""

    fake_quant: FakeQuantizer | None

    @property
    def gate_up_proj(self) -> Tensor:
        """Master weights of gate and up."""

    @property
    def down_proj(self) -> Tensor:
        """Master weights of down."""


def apply(
    experts_modules: Iterable[QuantizableExperts], config: QuantConfig, *, keep: Keep = Keep.step
) -> list[FakeQuantizer]:
    """Attach a quantiser to each module, or remove it if `config.enabled` is false; return the attached quantisers.

    Raises ConfigError if there is nothing to quantise, or if the group size does not divide the matrices.
    """
    modules = list(experts_modules)
    if not config.enabled:
        for module in modules:
            module.fake_quant = None
        return []
    if not modules:
        raise ConfigError("quant.enabled is true, but the model has no routed experts: set quant.enabled=false")
    for module in modules:
        for weight_EOI in (module.gate_up_proj, module.down_proj):
            check_group_size(weight_EOI.shape[-1], group_size=config.group_size)
    quantizers = [FakeQuantizer(grid=config.grid, group_size=config.group_size, keep=keep) for _ in modules]
    for module, quantizer in zip(modules, quantizers, strict=True):
        module.fake_quant = quantizer
    return quantizers
