"""Rates with their uncertainty: Wilson intervals, and the interval of a paired difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of successes and its 95 % interval."""

    successes: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.successes / self.count if self.count else math.nan


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two rates on the same tasks and its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def wilson(outcomes: Sequence[bool]) -> Rate:
    """Return the rate of `outcomes` with Wilson's score interval (JASA 22, 1927)."""
    count, successes = len(outcomes), sum(outcomes)
    if not count:
        return Rate(successes=0, count=0, low=0.0, high=1.0)
    share, z2 = successes / count, _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return Rate(successes=successes, count=count, low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    """Return the mean of after - before over the same tasks, with the normal interval of the mean of paired values."""
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} outcomes cannot be paired: give the same tasks on both sides")
    values = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    half = _Z * math.sqrt(variance / count)
    return Difference(value=mean, low=mean - half, high=mean + half, count=count)
