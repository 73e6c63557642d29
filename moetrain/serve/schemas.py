"""Bounds of the JSON schemas of a request, checked before llguidance compiles them."""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

_OPTIONS_KEY = "x-guidance"
"""Key of llguidance's own options, with which a schema could switch parts of itself off."""
_MOST_VALUES = 10_000
"""Values in all schemas of a request: compiling more takes seconds."""
_ANNOTATIONS = ("default", "examples", "example", "title", "description", "$comment", "deprecated")
"""Keys whose values constrain nothing."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
"""Keys whose numbers may be rounded: an upper bound of an int64 is common, and a model does not write its last digits.
"""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keys of objects whose keys are names and not words of JSON Schema."""
_DEEPEST = 100
_LARGEST_INTEGER = 2**53
"""llguidance reads numbers as float64."""
_MOST_STATES = 100_000
"""Sum of all multipleOf, without decimal points: llguidance makes automata of as many states."""


def schema_problem(schemas: Iterable[Mapping[str, Any]]) -> str | None:
    """Return why JSON schemas cannot be used, or None if they are within the bounds."""
    left: list[tuple[Any, int, bool]] = [(schema, 0, False) for schema in schemas]
    num_values = num_states = 0
    while left:
        value, depth, has_names = left.pop()
        num_values += 1
        if num_values > _MOST_VALUES:
            return f"the JSON schemas have more than {_MOST_VALUES} values together: give smaller ones"
        if depth > _DEEPEST:
            return f"a JSON schema is nested more than {_DEEPEST} levels deep"
        if isinstance(value, Mapping) and has_names:
            left += [(inner, depth + 1, False) for inner in value.values()]
        elif isinstance(value, Mapping):
            if _OPTIONS_KEY in value:
                return f"a JSON schema has the key {_OPTIONS_KEY}: leave it out"
            if problem := _bounds_problem(value):
                return problem
            num_states += _states(value.get("multipleOf"))
            if num_states > _MOST_STATES:
                return (
                    f"the JSON schemas have multipleOf of more than {_MOST_STATES} together, counted without decimal "
                    "points: give smaller numbers"
                )
            skipped = (*_ANNOTATIONS, *_BOUNDS)
            left += [(inner, depth + 1, key in _OF_NAMES) for key, inner in value.items() if key not in skipped]
        elif isinstance(value, list):
            left += [(inner, depth + 1, False) for inner in value]
        elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            return f"a JSON schema has the number {str(value)[:40]}: numbers above 2^53 are not held exactly, give text"
    return None


def _bounds_problem(schema: Mapping[str, Any]) -> str | None:
    """Return why the bounds of numbers in a schema would not hold, or None.

    Beyond 2^53 they are rounded. llguidance takes an exclusive whole number for an inclusive one if the other bound is
    less than 1 away.
    """
    low = _bound(schema, "minimum", "exclusiveMinimum", strictest=max)
    high = _bound(schema, "maximum", "exclusiveMaximum", strictest=min)
    if (low is not None and low > _LARGEST_INTEGER) or (high is not None and high < -_LARGEST_INTEGER):
        return "a JSON schema allows only numbers beyond 2^53, which float64 does not represent exactly: use a string"
    if low is None or high is None or not low < high < low + 1:  # no difference, because a whole number may be huge
        return None
    for key, bound in (("exclusiveMinimum", low), ("exclusiveMaximum", high)):
        if schema.get(key) == bound and bound == int(bound):
            return f"a JSON schema has {key} {bound:g} and its other bound less than 1 away, which is not enforced"
    return None


def _bound(schema: Mapping[str, Any], *keys: str, strictest: Callable[..., float]) -> float | None:
    given = [schema[key] for key in keys if type(schema.get(key)) in (int, float)]
    return strictest(given) if given else None


def _states(value: Any) -> int:
    """Return the states of the automaton of a multipleOf; 0 where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 0
    number = Decimal(str(value)).normalize()
    exponent = number.as_tuple().exponent
    return int(abs(number.scaleb(-exponent) if isinstance(exponent, int) and exponent < 0 else number))
