"""Reads the masters of experts that are stored as codes and scales, to train them further."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.parallel.protocol import StateReader
from moetrain.quant.config import GridName
from moetrain.quant.masters import CodeReader, masters_of
from moetrain.runtime import torch_stream

_log = logging.getLogger(__name__)


class MastersReader:
    """Implements `StateReader`: masters of packed experts (`quant.masters`), and other tensors as they are.

    Masters do not depend on the ranges that are read: those of an expert follow from the seed, its tensor and its
    number. One expert is in memory at a time.
    """

    def __init__(self, reader: StateReader, codes: CodeReader, *, grid: GridName, seed: int | None) -> None:
        """Take experts from `codes` and all other tensors from `reader`. seed: spreads masters; None does not."""
        self._reader = reader
        self._codes = codes
        self._packed = frozenset(codes.packed_experts())
        self._grid = grid
        self._seed = seed
        self._last: tuple[str, int, Tensor] | None = None
        self.num_groups = 0
        self.num_changed = 0
        self._counted: set[tuple[str, int]] = set()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return self._reader.shapes()

    def read(self, name: str, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) of a flattened tensor; counts groups that the grid does not keep."""
        if name not in self._packed:
            return self._reader.read(name, first=first, last=last)
        _, rows, columns = self._reader.shapes()[name]
        size = rows * columns
        parts = [
            self._expert(name, expert)[max(first - expert * size, 0) : last - expert * size]
            for expert in range(first // size, -(-last // size))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def _expert(self, name: str, expert: int) -> Tensor:
        """Return the flattened masters of one expert."""
        if self._last is None or self._last[:2] != (name, expert):
            quantized = self._codes.codes(name, first=expert, last=expert + 1)
            stream = None if self._seed is None else torch_stream(self._seed, f"masters:{name}", expert)
            masters = masters_of(quantized, grid=self._grid, stream=stream)
            self._last = (name, expert, masters.weights_XOI.reshape(-1))
            if (name, expert) not in self._counted:
                self._counted.add((name, expert))
                self.num_groups += masters.num_groups
                self.num_changed += masters.num_changed
        return self._last[2]

    def report(self) -> None:
        """Log how many groups of the experts that this rank has read keep their codes and scales."""
        if self.num_changed:
            _log.warning(
                "%d of %d groups of experts are quantised a second time, because quant.grid=%s does not reproduce "
                "their stored codes and scales; quant.grid=fitted keeps more of them",
                self.num_changed,
                self.num_groups,
                self._grid,
            )
        elif self.num_groups:
            _log.info("%d groups of experts keep their codes and scales", self.num_groups)
