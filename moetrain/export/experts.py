"""The codes and scales of the experts that an export writes: those of the weights, else quantised from masters."""

from collections.abc import Mapping

import torch

from moetrain.parallel.protocol import StateReader
from moetrain.quant.config import LIMITS, GridName, QuantConfig
from moetrain.quant.grids import Quantized, num_zero_groups, quantize
from moetrain.quant.masters import CodeReader, num_changed_groups


class ExpertCodes:
    """Returns codes and scales of one expert at a time, and counts what it returned."""

    def __init__(
        self,
        reader: StateReader,
        codes: CodeReader | None,
        *,
        quant: QuantConfig,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        """Take codes from `codes` where it has them; quantise the tensors of `reader` with `quant` elsewhere."""
        self._reader = reader
        self._codes = codes
        self._packed = frozenset(codes.packed_experts() if codes is not None else ())
        self._quant = quant
        self._shapes = shapes
        self.format = quant.format
        self._num_changed = dict.fromkeys(LIMITS[quant.format].grids, 0)
        self.num_quantized = 0
        """Number of parameters."""
        self.num_groups = 0
        self.num_zero_groups = 0

    def quantizes(self, name: str) -> bool:
        """Return whether the tensor `name` is written as codes: of weights that are stored as codes, only these."""
        return not self._packed or name in self._packed

    def of(self, name: str, expert: int, *, top: int, bottom: int) -> Quantized:
        """Return the rows [top, bottom) of one expert's matrix in the fused tensor `name`. [1, O, I]."""
        if name in self._packed and self._codes is not None:
            whole = self._codes.codes(name, first=expert, last=expert + 1)
            quantized = Quantized(codes_XOI=whole.codes_XOI[:, top:bottom], scales_XOG=whole.scales_XOG[:, top:bottom])
            for grid in self._num_changed:
                self._num_changed[grid] += num_changed_groups(quantized, grid=grid)
        else:
            _, rows, inputs = self._shapes[name]
            first, last = (expert * rows + top) * inputs, (expert * rows + bottom) * inputs
            weight_1OI = self._reader.read(name, first=first, last=last).view(1, bottom - top, inputs)
            quantized = quantize(weight_1OI, grid=self._quant.grid, group_size=self._quant.group_size)
        self.num_quantized += quantized.codes_XOI.numel()
        self.num_groups += quantized.scales_XOG.numel()
        self.num_zero_groups += num_zero_groups(quantized)
        return quantized

    @property
    def grid(self) -> GridName:
        """The grid that reproduces all codes and scales that were returned, or else the one that reproduces most."""
        if not any(self._num_changed.values()):
            return self._quant.grid
        return min(self._num_changed, key=lambda grid: self._num_changed[grid])

    @property
    def num_changed(self) -> int:
        """Number of groups that were returned as stored and that `grid` would change."""
        return self._num_changed[self.grid]
