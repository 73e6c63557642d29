"""Task families by name. A plugin calls `register`, and a stage calls `build`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

from moetrain.errors import ConfigError, MoetrainError
from moetrain.options import checked_options
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily
from moetrain.tasks.ledger.family import LedgerFamily
from moetrain.tasks.protocol import Demonstrates, TaskFamily


@dataclass(frozen=True)
class _NoOptions:
    """Settings of a family that has none."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    factory: Callable[[TaskConfig, int], TaskFamily]
    options: type | None


_FAMILIES: dict[str, _Row] = {
    "database": _Row(factory=DatabaseFamily, options=None),
    "ledger": _Row(factory=LedgerFamily, options=None),
}


def register(name: str, factory: Callable[[TaskConfig, int], TaskFamily], *, options: type | None = None) -> None:
    """Register `factory(config, seed)` as `task.name=name`.

    options: a dataclass of the family's own settings. `task.options.<field>` sets a field, and `config.options`
    contains the checked values of all fields. Raises ConfigError if it is not a dataclass.
    """
    if options is not None and not is_dataclass(options):
        raise ConfigError(f"the task family {name} is registered with options={options!r}: give a dataclass")
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
    schema = row.options or _NoOptions
    own = checked_options(schema, config.options, prefix="task.options.", owner=f"task.name={config.name}")
    checked = replace(config, options={field.name: vars(own)[field.name] for field in fields(own)})
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
