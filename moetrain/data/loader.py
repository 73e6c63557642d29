"""Batches of training rows: a pure function of (seed, step), so that a stopped run goes on with the very next row.

Two choices make it pure. Which source row number i of the run comes from is a closed formula of i that follows the
weights exactly (error diffusion, no sampling): after any number of rows each source is within a few rows of its share.
Which row of the source that is: passes over the source are shuffled by (seed, source, pass).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from moetrain.data.batch import TokenBatch
from moetrain.data.packing import PackedRows
from moetrain.errors import DataError
from moetrain.runtime import python_stream

_SHARE_BITS = 48  # shares are whole numbers over 2^48: exact for more rows than any run has


@dataclass(frozen=True, kw_only=True)
class RowPlace:
    """Where a row of the run comes from."""

    source: str
    epoch: int
    """Passes over the source that are complete."""
    row: int
    """Row of the source."""


class Mixture:
    """Which source each row of a run comes from, by share."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._names = list(shares)
        left = sum(shares.values())
        self._numerators: list[int] = []
        for name in self._names:
            self._numerators.append(round(shares[name] / left * 2**_SHARE_BITS) if left > 0 else 0)
            left -= shares[name]
        self._numerators[-1] = 2**_SHARE_BITS  # the last source takes what the others leave

    def place(self, index: int) -> tuple[str, int]:
        """Return the source of row `index` of the run and how many rows of that source came before.

        Each source in turn takes its share of the rows that the sources before it left: row i of those is taken when
        floor((i + 1) * share) is one more than floor(i * share).
        """
        for name, numerator in zip(self._names, self._numerators, strict=True):
            taken = index * numerator >> _SHARE_BITS
            if (index + 1) * numerator >> _SHARE_BITS > taken:
                return name, taken
            index -= taken
        raise AssertionError("the last source takes every row that reaches it")


class Loader:
    """Training rows of all sources, mixed by weight in tokens."""

    def __init__(self, rows: Mapping[str, PackedRows], *, weights: Mapping[str, float], seed: int, pad_id: int) -> None:
        """Mix `rows` of sources with a positive weight. Raises DataError when such a source has no rows."""
        self._rows = {name: packed for name, packed in rows.items() if weights[name] > 0}
        for name, packed in self._rows.items():
            if packed.num_rows == 0:
                raise DataError(f"data.sources.{name} has no rows to train on: all of its documents were left out")
        if not self._rows:
            raise DataError("data.sources has no source with a positive weight")
        # A source whose rows hold fewer tokens gets more rows, so that the weights are shares of tokens.
        shares = {name: weights[name] * rows.num_rows / rows.counts.num_tokens for name, rows in self._rows.items()}
        self._mixture = Mixture(shares)
        self._seed = seed
        self._pad_id = pad_id
        self._order = lru_cache(maxsize=2 * len(self._rows))(self._shuffled)

    @property
    def rows(self) -> Mapping[str, PackedRows]:
        """Return the training rows of each source that is trained on."""
        return self._rows

    def place(self, index: int) -> RowPlace:
        """Return where row `index` of the run comes from."""
        name, before = self._mixture.place(index)
        epoch, place = divmod(before, self._rows[name].num_rows)
        return RowPlace(source=name, epoch=epoch, row=self._order(name, epoch)[place])

    def batch(self, step: int, rows: int) -> TokenBatch:
        """Return the batch of `step` (from 0), `rows` rows: rows step * rows up to (step + 1) * rows of the run."""
        places = [self.place(index) for index in range(step * rows, (step + 1) * rows)]
        singles = [self._rows[place.source].batch([place.row], pad_id=self._pad_id) for place in places]
        columns = ("tokens_BT", "segments_BT", "positions_BT", "loss_mask_BT", "weights_BT")
        return TokenBatch(**{name: torch.cat([vars(single)[name] for single in singles]) for name in columns})

    def epochs(self, num_rows: int) -> dict[str, float]:
        """Return the passes over each source that the first `num_rows` rows of the run make."""
        passes = dict.fromkeys(self._rows, 0.0)
        found: set[str] = set()
        for index in range(num_rows - 1, -1, -1):
            name, before = self._mixture.place(index)
            if name not in found:
                found.add(name)
                passes[name] = (before + 1) / self._rows[name].num_rows
            if len(found) == len(self._rows):
                break
        return passes

    def _shuffled(self, name: str, epoch: int) -> list[int]:
        order = list(range(self._rows[name].num_rows))
        python_stream(self._seed, f"data/{name}", epoch).shuffle(order)
        return order
