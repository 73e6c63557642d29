"""Training rows by number: a pure function of (seed, number), so that a stopped run goes on with the very next row.

Two choices make it pure. Which source row number i of the run comes from is a closed formula of i that follows the
weights exactly (error diffusion, no sampling): after any number of rows each source is within a few rows of its share.
Which row of the source that is: passes over the source are shuffled by (seed, source, pass). The weights may change at
stated rows; each such mix has its shares exactly, and the passes over a source go on through them.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moetrain.data.batch import TokenBatch, concatenated
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


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Weights of the sources, in tokens, from a row of the run on."""

    first_row: int
    weights: Mapping[str, float]


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

    def counts(self, num_rows: int) -> dict[str, int]:
        """Return how many of the first `num_rows` rows each source gives."""
        counts = {}
        for name, numerator in zip(self._names, self._numerators, strict=True):
            counts[name] = num_rows * numerator >> _SHARE_BITS
            num_rows -= counts[name]
        return counts


class Loader:
    """Training rows of all sources, mixed by weight in tokens."""

    def __init__(
        self,
        rows: Mapping[str, PackedRows],
        *,
        mixes: Sequence[Mix],
        seed: int,
        pad_id: int,
        taken: Mapping[str, int] | None = None,
    ) -> None:
        """Mix `rows` of the sources that have a positive weight in one of the mixes.

        taken: rows of each source that the run read before the first row of the first mix, which is row 0 otherwise.
        Raises DataError when a source that is read has no rows.
        """
        self._taken = dict(taken or {})
        weighted = {name for mix in mixes for name, weight in mix.weights.items() if weight > 0}
        weighted |= {name for name, count in self._taken.items() if count > 0}
        self._rows = {name: packed for name, packed in rows.items() if name in weighted}
        for name, packed in self._rows.items():
            if packed.num_rows == 0:
                raise DataError(f"data.sources.{name} has no rows to train on: all of its documents were left out")
        if not self._rows:
            raise DataError("data.sources has no source with a positive weight")
        self._first_rows = [mix.first_row for mix in mixes]
        self._mixtures = [self._mixture(mix.weights) for mix in mixes]
        self._seed = seed
        self._pad_id = pad_id
        self._order = lru_cache(maxsize=2 * len(self._rows))(self._shuffled)

    def _mixture(self, weights: Mapping[str, float]) -> Mixture:
        # A source whose rows hold fewer tokens gets more rows, so that the weights are shares of tokens.
        return Mixture(
            {
                name: weights[name] * rows.num_rows / rows.counts.num_tokens
                for name, rows in self._rows.items()
                if weights[name] > 0
            }
        )

    @property
    def rows(self) -> Mapping[str, PackedRows]:
        """Return the training rows of each source that is trained on."""
        return self._rows

    def mix_at(self, index: int) -> int:
        """Return the number of the mix that row `index` of the run is of."""
        return bisect.bisect_right(self._first_rows, index) - 1

    def place(self, index: int) -> RowPlace:
        """Return where row `index` of the run comes from."""
        mix = self.mix_at(index)
        name, before = self._mixtures[mix].place(index - self._first_rows[mix])
        before += self._taken.get(name, 0)
        before += sum(rows[name] for rows in self.mix_rows(self._first_rows[mix])[:mix])
        epoch, place = divmod(before, self._rows[name].num_rows)
        return RowPlace(source=name, epoch=epoch, row=self._order(name, epoch)[place])

    def batch(self, step: int, rows: int) -> TokenBatch:
        """Return the batch of `step` (from 0) where all steps have `rows` rows."""
        return self.rows_between(step * rows, (step + 1) * rows)

    def rows_between(self, start: int, stop: int) -> TokenBatch:
        """Return rows `start` up to `stop` of the run as a batch."""
        places = [self.place(index) for index in range(start, stop)]
        singles = [self._rows[place.source].batch([place.row], pad_id=self._pad_id) for place in places]
        return concatenated(singles)

    def mix_rows(self, num_rows: int) -> list[dict[str, int]]:
        """Return how many of the first `num_rows` rows of the run each mix takes from each source."""
        ends = [*self._first_rows[1:], num_rows]
        return [
            dict.fromkeys(self._rows, 0) | mixture.counts(max(0, min(end, num_rows) - first))
            for mixture, first, end in zip(self._mixtures, self._first_rows, ends, strict=True)
        ]

    def epochs(self, num_rows: int) -> dict[str, float]:
        """Return the passes over each source that the first `num_rows` rows of the run make."""
        taken = self.rows_taken(num_rows)
        return {name: taken[name] / packed.num_rows for name, packed in self._rows.items()}

    def rows_taken(self, num_rows: int) -> dict[str, int]:
        """Return how many of the first `num_rows` rows of the run come from each source."""
        of_mixes = self.mix_rows(num_rows)
        return {name: self._taken.get(name, 0) + sum(rows[name] for rows in of_mixes) for name in self._rows}

    def _shuffled(self, name: str, epoch: int) -> list[int]:
        order = list(range(self._rows[name].num_rows))
        python_stream(self._seed, f"data/{name}", epoch).shuffle(order)
        return order
