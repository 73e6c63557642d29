"""Range checks for numbers in a config: a table per section, and error messages that name field, value and remedy.

NaN, infinity and whole numbers beyond 64 bits are always rejected.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.errors import ConfigError

_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class Range:
    """A set of allowed numbers, and the remedy that the error message gives."""

    fits: Callable[[float], bool]
    cure: str


COUNT = Range(fits=lambda value: value >= 1, cure="give at least 1")
NOT_NEGATIVE = Range(fits=lambda value: value >= 0, cure="give 0 or more")
POSITIVE = Range(fits=lambda value: value > 0, cure="give a number above 0")
SHARE = Range(fits=lambda value: 0 <= value <= 1, cure="give a share from 0 to 1")
BELOW_ONE = Range(fits=lambda value: 0 <= value < 1, cure="give a number from 0 to below 1")
SEED = Range(fits=lambda value: value >= 0, cure="give a whole number from 0 to 2^63 - 1")
MIN_TEMPERATURE = 1e-6
"""Smallest temperature besides 0: logits divided by less can exceed float32."""
TEMPERATURE = Range(
    fits=lambda value: value == 0 or value >= MIN_TEMPERATURE, cure=f"give 0 (greedy), or at least {MIN_TEMPERATURE:g}"
)


def check_ranges(section: Any, *, prefix: str, ranges: Mapping[Range, Sequence[str]]) -> None:
    """Raise `ConfigError` for the first field of a config whose number is out of range.

    prefix: prefix of the field names, such as "train.". A field may contain a number, a list of numbers, or None, which
    is allowed.
    """
    for allowed, fields in ranges.items():
        for field in fields:
            value = getattr(section, field)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(_is_representable(number) for number in numbers):
                raise ConfigError(f"{prefix}{field} is {value}: {allowed.cure}, at most 2^63 - 1 and finite")
            if not all(allowed.fits(number) for number in numbers):
                raise ConfigError(f"{prefix}{field} is {value}: {allowed.cure}")


def check_unused(section: Any, *, prefix: str, fields: Sequence[str], reason: str) -> None:
    """Raise `ConfigError` for the first of `fields` that differs from its default, although nothing reads it.

    reason: what makes it unread, such as "optim.name is adamw".
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name in fields and value != field.default:
            raise ConfigError(
                f"{prefix}{field.name} is {value} and has no effect, because {reason}: remove one of them"
            )


def _is_representable(number: float) -> bool:
    return math.isfinite(number) and not (isinstance(number, int) and abs(number) >= _LIMIT)
