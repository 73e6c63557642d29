"""Reads the fields of a request's body, each with its type and range. A null is the same as no field."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from moetrain.serve.errors import ApiError

_SHOWN = 80  # characters of a bad value that an error message repeats


class Fields:
    """The fields of one JSON object. `check` refuses those that nobody asked for."""

    def __init__(self, body: Mapping[str, Any], *, prefix: str = "") -> None:
        self._body = body
        self._prefix = prefix
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """Return the value of a field, or None."""
        self._known.add(name)
        return self._body.get(name)

    def text(self, name: str) -> str | None:
        """Return a string, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.refusal(name, value, cure="give a string")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, value, cure="give true or false")
        return default if value is None else value

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(name, value, cure=f"give a whole number from {low} to {high}")
        return value

    def number(self, name: str, *, low: float, high: float, default: float) -> float:
        """Return a number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refusal(name, value, cure=f"give a number from {low:g} to {high:g}")
        return float(value)

    def section(self, name: str) -> "Fields | None":
        """Return the fields of an object, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(name, value, cure="give an object")
        return Fields(value, prefix=f"{self._prefix}{name}.")

    def neutral(self, name: str, *values: object) -> None:
        """Accept a field that is not supported where its value changes nothing; refuse other values."""
        value = self.take(name)
        is_same = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
        if value is not None and not is_same:
            raise self.refusal(
                name, value, cure="this field is not supported; leave it out", code="unsupported_parameter"
            )

    def ignored(self, names: Collection[str]) -> list[str]:
        """Return which of `names` are given; they have no effect."""
        self._known.update(names)
        return [name for name in names if self._body.get(name) is not None]

    def check(self) -> None:
        """Refuse fields that were not asked for."""
        for name in self._body:
            if name not in self._known:
                close = difflib.get_close_matches(name, sorted(self._known), n=1)
                meant = f"did you mean {close[0]}?" if close else "leave it out"
                raise ApiError(
                    f"unknown field {self._prefix}{name[:_SHOWN]}: {meant}",
                    param=self._prefix + name[:_SHOWN],
                    code="unknown_parameter",
                )

    def refusal(self, name: str, value: object, *, cure: str, code: str = "invalid_value") -> ApiError:
        """Return the error for a value that cannot be used."""
        shown = repr(value) if not isinstance(value, dict | list) else type(value).__name__
        return ApiError(f"{self._prefix}{name} is {shown[:_SHOWN]}: {cure}", param=self._prefix + name, code=code)
