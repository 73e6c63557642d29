"""Rates with their uncertainty: Wilson's interval of a rate, Tango's of a paired difference, McNemar's exact test.

All three are valid on few tasks. An interval by normal approximation is too narrow there, and has width zero when
nothing changed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_BISECTIONS = 50  # enough for the precision of a float


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
    """A difference of two rates on the same tasks, its 95 % interval, and the p-value under no difference."""

    value: float
    low: float
    high: float
    count: int
    gained: int
    """Tasks that failed before and succeed after."""
    lost: int
    """Tasks that succeeded before and fail after."""
    p_value: float
    """Two-sided exact McNemar test."""


def rate_row(rate: Rate) -> dict[str, float | int]:
    """Return a rate and its interval as a JSON object."""
    return {**asdict(rate), "value": rate.value}


def wilson(outcomes: Sequence[bool]) -> Rate:
    """Return the rate of `outcomes` with Wilson's score interval (JASA 22, 1927)."""
    return wilson_of(sum(outcomes), count=len(outcomes))


def wilson_of(successes: int, *, count: int) -> Rate:
    """Return the rate of `successes` among `count` with Wilson's score interval."""
    if not count:
        return Rate(successes=0, count=0, low=0.0, high=1.0)
    share, z2 = successes / count, _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return Rate(successes=successes, count=count, low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    """Return the mean of after - before over the same tasks, with Tango's score interval."""
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} outcomes cannot be paired: give the same tasks on both sides")
    count = len(before)
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return Difference(
        value=(gained - lost) / count,
        low=-_upper_bound(lost, gained, count=count),
        high=_upper_bound(gained, lost, count=count),
        count=count,
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value, if gain and loss are equally likely (McNemar, Psychometrika 12, 1947)."""
    changed = gained + lost
    tail = sum(math.comb(changed, number) for number in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << changed)))  # exact also where a float overflows


def _upper_bound(gained: int, lost: int, *, count: int) -> float:
    """Return the largest difference that the score test does not reject (Tango, Statistics in Medicine 17, 1998)."""
    low, high = (gained - lost) / count, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _score(gained, lost, count=count, difference=middle) > -_Z:
            low = middle
        else:
            high = middle
    return high


def _score(gained: int, lost: int, *, count: int, difference: float) -> float:
    """Return Tango's statistic, standard normal when the true difference is `difference`."""
    # The maximum likelihood share of lost tasks under this difference solves a x^2 + b x + c = 0.
    a = 2 * count
    b = (2 * count - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * share + difference * (1 - difference))
    excess = gained - lost - count * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)
