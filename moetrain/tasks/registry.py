"""Task families by name. A plugin calls `register`, and a stage calls `build`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from moetrain.errors import ConfigError, MoetrainError
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily
from moetrain.tasks.protocol import Demonstrates, TaskFamily

_KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
"""Accepted types of values, by the type of an option."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    factory: Callable[[TaskConfig, int], TaskFamily]
    options: type | None


_FAMILIES: dict[str, _Row] = {"database": _Row(factory=DatabaseFamily, options=None)}


def register(name: str, factory: Callable[[TaskConfig, int], TaskFamily], *, options: type | None = None) -> None:
    """Register `factory(config, seed)` as `task.name=name`.

    options: a dataclass of the family's own settings. `task.options.<field>` sets a field, and `config.options`
    contains the checked values of all fields.
    """
    _FAMILIES[name] = _Row(factory=factory, options=options)


def option_schemas() -> dict[str, type]:
    """Return the dataclasses of the families' own settings, by family; without those of this package."""
    return {name: row.options for name, row in _FAMILIES.items() if row.options is not None}


def build(config: TaskConfig, seed: int) -> TaskFamily:
    """Return the task family that `config` names. Raises ConfigError that names the key."""
    if config.name not in _FAMILIES:
        raise ConfigError(
            f"task.name is {config.name}: give one of {', '.join(sorted(_FAMILIES))}, or register it in a plugin"
        )
    row = _FAMILIES[config.name]
    checked = replace(config, options=_options(config, row.options))
    try:
        return row.factory(checked, seed)
    except MoetrainError:
        raise
    except Exception as error:  # a plugin's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"task.name is {config.name}: the family cannot be made: {reason}") from error


def demonstrator_of(family: TaskFamily) -> Demonstrates:
    """Return the family as one with demonstrations. Raises ConfigError when it has none."""
    if not isinstance(family, Demonstrates):
        raise ConfigError(
            f"data.sources has a source of kind dialogues, but {type(family).__name__} has no demonstrate(): "
            "remove the source, or add that method"
        )
    return family


def _options(config: TaskConfig, schema: type | None) -> dict[str, Any]:
    """Return the checked values of all options of a family."""
    hints: Mapping[str, Any] = get_type_hints(schema) if schema is not None else {}
    for name, value in config.options.items():
        if name not in hints:
            has = f"has the options {', '.join(hints)}" if hints else "has no options"
            raise ConfigError(f"task.options.{name}: task.name={config.name} {has}")
        kinds = _KINDS.get(hints[name])
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ConfigError(f"task.options.{name} is {value!r}: give a value of type {hints[name].__name__}")
    if schema is None:
        return {}
    try:
        own = schema(**config.options)
    except TypeError as error:
        raise ConfigError(f"task.options: task.name={config.name}: {error}") from error
    return {field.name: vars(own)[field.name] for field in fields(own)}
