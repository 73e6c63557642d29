"""Config of quantisation: whether experts are quantised, in which format and on which grid. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from moetrain.errors import ConfigError


class FormatName(StrEnum):
    """Name of a row of `quant.formats.FORMATS`: how codes and scales are stored."""

    int4 = "int4"
    mxfp4 = "mxfp4"


class GridName(StrEnum):
    """Name of a row of `quant.grids.GRIDS`: how weights become codes and scales."""

    kimi7 = "kimi7"
    fitted = "fitted"
    mx = "mx"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings that a format supports. grids: the grids whose codes it can store. group_step: group sizes must be
    multiples of it. largest_group: maximum group size, or None.
    """

    grids: tuple[GridName, ...]
    group_step: int
    largest_group: int | None = None


LIMITS: Mapping[FormatName, Limits] = MappingProxyType(
    {
        FormatName.int4: Limits(grids=(GridName.kimi7, GridName.fitted), group_step=8),  # 8 codes fill one int32 word
        FormatName.mxfp4: Limits(grids=(GridName.mx,), group_step=32, largest_group=32),
    }
)
"""The limits of each format."""


@dataclass(kw_only=True)
class QuantConfig:
    """Fake quantisation of the routed experts, with a straight-through gradient (quantisation-aware training)."""

    enabled: bool = False
    """Train with quantised expert weights."""
    format: FormatName = FormatName.int4
    """Storage format of codes and scales; it determines which programs can read an export."""
    grid: GridName = GridName.kimi7
    """Grid of codes and scales; the format must support it. kimi7 (INT4) is the grid of Kimi K2 Thinking, mx that of
    MXFP4. fitted (INT4) fits the scale to the weights of a group, which keeps the codes of other rules."""
    group_size: int = 32
    """Number of consecutive inputs that share a scale."""

    def __post_init__(self) -> None:
        """Check ranges, and that the format supports the grid."""
        limits = LIMITS[self.format]
        if self.grid not in limits.grids:
            names = ", ".join(limits.grids)
            raise ConfigError(
                f"quant.grid is {self.grid}: quant.format={self.format} stores {names}; "
                f"set both, or select the group quant={self.format}"
            )
        step, largest = limits.group_step, limits.largest_group or self.group_size
        if not step <= self.group_size <= largest or self.group_size % step:
            allowed = f"{step}" if limits.largest_group == step else f"a multiple of {step}"
            raise ConfigError(f"quant.group_size is {self.group_size}: quant.format={self.format} takes {allowed}")


def quant_config(fields: Mapping[str, Any]) -> QuantConfig:
    """Return the config stored in JSON fields; if `format` is missing, as in older versions, it is INT4."""
    named = {"format": FormatName.int4.value, **fields}
    names = {"format": FormatName(named["format"]), "grid": GridName(named["grid"])}
    return QuantConfig(**{**named, **names})
