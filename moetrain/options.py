"""Checks the settings of a plugin against the dataclass that it registers."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from moetrain.errors import ConfigError, MoetrainError, described

_KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
"""Accepted types of values, by the type of a field."""


def checked_options(schema: type, values: Mapping[str, Any], *, prefix: str, owner: str) -> Any:
    """Return a `schema` with the given values. Raises `ConfigError` that names the key, the value and the remedy.

    schema: a dataclass. prefix: of the keys, such as "rl.options.". owner: who has these options, such as
    "rl.algorithm=k2_5".
    """
    hints = get_type_hints(schema)
    known = [field.name for field in fields(schema) if field.init]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{prefix}{name}: {owner} {_has(known)}")
        kinds = _KINDS.get(hints[name])
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ConfigError(f"{prefix}{name} is {value!r}: give a value of type {hints[name].__name__}")
    for field in fields(schema):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if field.init and not has_default and field.name not in values:
            raise ConfigError(f"{prefix}{field.name} is missing: {owner} requires it")
    try:
        return schema(**values)
    except MoetrainError:
        raise
    except Exception as error:  # a plugin's __post_init__ may raise anything
        raise ConfigError(f"{prefix.rstrip('.')}: {owner} cannot be constructed: {described(error)}") from error


def _has(known: list[str]) -> str:
    return f"has the options {', '.join(known)}" if known else "has no options"
