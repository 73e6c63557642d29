"""Training rows by number. Row i is a pure function of (seed, i), so that a stopped run resumes at the next row.

Two rules determine row i. Its source is a closed formula of i that follows the weights exactly (error diffusion, no
sampling): after any number of rows, each source is within a few rows of its share. The row within the source comes from
a permutation per pass, seeded by (seed, source, pass): of a list for rows in memory, and computed from the number of
the row for prepared data (`data.order`). The weights may change at given rows. Each mix then has exactly its own
shares, and a pass over a source continues across mixes.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from moetrain.data.batch import TokenBatch, concatenated
from moetrain.data.fit import PackingCounts
from moetrain.errors import DataError

_SHARE_BITS = 48  # shares are integers over 2^48, which is exact for more rows than any run has


class Rows(Protocol):
    """The rows of one source: in memory (`PackedRows`), or prepared (`PreparedRows`)."""

    counts: PackingCounts

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def order(self, name: str, *, seed: int, epoch: int) -> Callable[[int], int]:
        """Return the function from a place in pass `epoch` over the source `name` to the row there."""

    def sample(self, count: int, *, seed: int) -> list[int]:
        """Return the numbers of at most `count` rows, spread over all rows, sorted."""

    def batch(self, rows: Sequence[int], *, pad_id: int) -> TokenBatch:
        """Return the rows with these numbers as a batch."""


@dataclass(frozen=True, kw_only=True)
class RowPlace:
    """Where a row of the run comes from."""

    source: str
    epoch: int
    """Number of complete passes over the source before this row."""
    row: int
    """Number of the row within the source."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Weights of the sources, as shares of tokens, from row `first_row` of the run on."""

    first_row: int
    weights: Mapping[str, float]


class Mixture:
    """Assigns each row of a mix to a source, in proportion to the shares."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._names = list(shares)
        left = sum(shares.values())
        self._numerators: list[int] = []
        for name in self._names:
            self._numerators.append(round(shares[name] / left * 2**_SHARE_BITS) if left > 0 else 0)
            left -= shares[name]
        self._numerators[-1] = 2**_SHARE_BITS  # the last source takes what the others leave

    def place(self, index: int) -> tuple[str, int]:
        """Return the source of row `index` of the mix, and the number of earlier rows from that source.

        Each source in order takes its share of the rows that the earlier sources did not take. It takes row i of those
        when floor((i + 1) * share) is one more than floor(i * share).
        """
        for name, numerator in zip(self._names, self._numerators, strict=True):
            taken = index * numerator >> _SHARE_BITS
            if (index + 1) * numerator >> _SHARE_BITS > taken:
                return name, taken
            index -= taken
        raise AssertionError("the last source takes every row that reaches it")

    def counts(self, num_rows: int) -> dict[str, int]:
        """Return the number of rows from each source among the first `num_rows` rows."""
        counts = {}
        for name, numerator in zip(self._names, self._numerators, strict=True):
            counts[name] = num_rows * numerator >> _SHARE_BITS
            num_rows -= counts[name]
        return counts


class Loader:
    """Training rows of all sources, mixed such that the weights are shares of tokens."""

    def __init__(
        self,
        rows: Mapping[str, Rows],
        *,
        mixes: Sequence[Mix],
        seed: int,
        pad_id: int,
        taken: Mapping[str, int] | None = None,
    ) -> None:
        """Mix the rows of the sources that have a positive weight in one of the mixes.

        taken: number of rows of each source that the run read before the first mix. Without it, the first mix begins at
        row 0. Raises DataError when a source with a positive weight has no rows.
        """
        self._taken = dict(taken or {})
        weighted = {name for mix in mixes for name, weight in mix.weights.items() if weight > 0}
        weighted |= {name for name, count in self._taken.items() if count > 0}
        self._rows = {name: packed for name, packed in rows.items() if name in weighted}
        for name, packed in self._rows.items():
            if packed.num_rows == 0:
                raise DataError(f"data.sources.{name} has no rows to train on: all of its documents were dropped")
        if not self._rows:
            raise DataError("data.sources has no source with a positive weight: give one")
        self._first_rows = [mix.first_row for mix in mixes]
        self._mixtures = [self._mixture(mix.weights) for mix in mixes]
        self._seed = seed
        self._pad_id = pad_id
        self._order = lru_cache(maxsize=2 * len(self._rows))(self._ordered)

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
    def rows(self) -> Mapping[str, Rows]:
        """Training rows of each source that is trained on."""
        return self._rows

    def mix_at(self, index: int) -> int:
        """Return the number of the mix that contains row `index` of the run."""
        return bisect.bisect_right(self._first_rows, index) - 1

    def place(self, index: int) -> RowPlace:
        """Return where row `index` of the run comes from."""
        mix = self.mix_at(index)
        name, before = self._mixtures[mix].place(index - self._first_rows[mix])
        before += self._taken.get(name, 0)
        before += sum(rows[name] for rows in self.mix_rows(self._first_rows[mix])[:mix])
        epoch, place = divmod(before, self._rows[name].num_rows)
        return RowPlace(source=name, epoch=epoch, row=self._order(name, epoch)(place))

    def batch(self, step: int, rows: int) -> TokenBatch:
        """Return the batch of step `step` (from 0) of a run in which every step has `rows` rows."""
        return self.rows_between(step * rows, (step + 1) * rows)

    def rows_between(self, start: int, stop: int) -> TokenBatch:
        """Return rows [start, stop) of the run as a batch."""
        places = [self.place(index) for index in range(start, stop)]
        singles = [self._rows[place.source].batch([place.row], pad_id=self._pad_id) for place in places]
        return concatenated(singles)

    def mix_rows(self, num_rows: int) -> list[dict[str, int]]:
        """Return for each mix the number of rows from each source, among the first `num_rows` rows of the run."""
        ends = [*self._first_rows[1:], num_rows]
        return [
            dict.fromkeys(self._rows, 0) | mixture.counts(max(0, min(end, num_rows) - first))
            for mixture, first, end in zip(self._mixtures, self._first_rows, ends, strict=True)
        ]

    def epochs(self, num_rows: int) -> dict[str, float]:
        """Return the number of passes over each source in the first `num_rows` rows of the run."""
        taken = self.rows_taken(num_rows)
        return {name: taken[name] / packed.num_rows for name, packed in self._rows.items()}

    def rows_taken(self, num_rows: int) -> dict[str, int]:
        """Return the number of rows from each source in the first `num_rows` rows of the run."""
        of_mixes = self.mix_rows(num_rows)
        return {name: self._taken.get(name, 0) + sum(rows[name] for rows in of_mixes) for name in self._rows}

    def _ordered(self, name: str, epoch: int) -> Callable[[int], int]:
        return self._rows[name].order(name, seed=self._seed, epoch=epoch)
