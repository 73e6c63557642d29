"""Bounds of the JSON schemas of a request, checked before llguidance compiles them."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

_OPTIONS_KEY = "x-guidance"
"""Key of a schema that llguidance would read, and with which parts of the schema could be ignored."""
_MOST_VALUES = 20_000
"""Values in all schemas of a request, for which compiling takes seconds."""
_DEEPEST = 100
_LARGEST_INTEGER = 2**53
"""llguidance reads numbers as float64."""
_LARGEST_MULTIPLE = 100_000
"""Of multipleOf without its decimal point: llguidance makes an automaton of as many states."""


def schema_problem(schemas: Iterable[Mapping[str, Any] | None]) -> str | None:
    """Return why JSON schemas cannot be used, or None if they are within the bounds."""
    left: list[tuple[Any, int]] = [(schema, 0) for schema in schemas]
    num_values = 0
    while left:
        value, depth = left.pop()
        num_values += 1
        if num_values > _MOST_VALUES:
            return f"the JSON schemas have more than {_MOST_VALUES} values together: give smaller ones"
        if depth > _DEEPEST:
            return f"a JSON schema is nested more than {_DEEPEST} levels deep"
        if isinstance(value, Mapping):
            if _OPTIONS_KEY in value:
                return f"a JSON schema has the key {_OPTIONS_KEY}: leave it out"
            if _is_large_multiple(value.get("multipleOf")):
                return (
                    f"a JSON schema has multipleOf {value['multipleOf']}: give at most {_LARGEST_MULTIPLE}, counted "
                    "without the decimal point"
                )
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            return f"a JSON schema has the number {str(value)[:40]}: numbers above 2^53 are not held exactly, give text"
    return None


def _is_large_multiple(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    number = Decimal(str(value)).normalize()
    exponent = number.as_tuple().exponent
    return abs(number.scaleb(-exponent) if isinstance(exponent, int) and exponent < 0 else number) > _LARGEST_MULTIPLE
