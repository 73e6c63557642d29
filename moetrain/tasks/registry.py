"""Task families by name. A plugin calls `register`, and a stage calls `build`."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral
from typing import Any

from moetrain.chat.messages import Message
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import ConfigError, MoetrainError, described
from moetrain.options import checked_options
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily
from moetrain.tasks.ledger.family import LedgerFamily
from moetrain.tasks.protocol import CountsCalls, Demonstrates, MakesLongerTasks, Split, TaskFamily, has_method

_log = logging.getLogger(__name__)
_TOOL_NAME = re.compile(r"[^:\s]+")
"""What the ids of calls can hold: `functions.NAME:N`."""


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


_OWN = frozenset(_FAMILIES)


def register(name: str, factory: Callable[[TaskConfig, int], TaskFamily], *, options: type | None = None) -> None:
    """Register `factory(config, seed)` as `task.name=name`.

    options: a dataclass of the family's own settings. `task.options.<field>` sets a field, and `config.options`
    contains the checked values of all fields. Raises ConfigError if it is not a dataclass, or if moetrain has a family
    of this name.
    """
    if name in _OWN:
        raise ConfigError(f"a plugin registers the task family {name}, which moetrain has: give another name")
    if options is not None and not is_dataclass(options):
        raise ConfigError(f"the task family {name} is registered with options={options!r}: give a dataclass")
    _FAMILIES[name] = _Row(factory=factory, options=options)


def option_schemas() -> dict[str, type]:
    """Return the option dataclasses of the families that plugins registered, by name of the family."""
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
        reason = described(error)
        raise ConfigError(f"task.name is {config.name}: the family cannot be constructed: {reason}") from error


def check_family(family: TaskFamily, *, name: str) -> None:
    """Raise ConfigError if a family, or its first training task, lacks a member or has one of another type.

    A task that cannot be made for another reason is reported by a warning, because its service may be down for a while.
    """
    owner = f"task.name={name}: {type(family).__name__}"
    if not has_method(family, "task"):
        raise ConfigError(f"{owner} has no method task: add it")
    try:
        tools: object = family.tools
    except AttributeError:
        tools = None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, ToolSpec) for tool in tools):
        raise ConfigError(f"{owner}.tools is {_kind(tools)}: give a property that returns a list of ToolSpec")
    names = [tool.name for tool in tools]
    for name_of_tool in names:
        if not isinstance(name_of_tool, str) or not _TOOL_NAME.fullmatch(name_of_tool):
            raise ConfigError(f"{owner}.tools has the name {name_of_tool!r}: give text without spaces and colons")
        if names.count(name_of_tool) > 1:
            raise ConfigError(f"{owner}.tools has the name {name_of_tool} twice: give each tool its own")
    try:
        makes_longer = isinstance(family, MakesLongerTasks)
    except (Exception, SystemExit) as error:  # a property of a plugin may raise anything
        raise ConfigError(f"{owner}.trained_calls fails: {described(error)}") from error
    if makes_longer:
        _check_range(family, owner=owner)
    try:
        task = family.task(Split.train, 0)
        prompt = task.prompt
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{owner}: its first task cannot be made: {described(error)}") from error
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        _log.warning("%s: its first task cannot be made: %s", owner, described(error))
        return
    made_by = f"{owner}.task returns {type(task).__name__}"
    if not isinstance(prompt, list | tuple) or not prompt or not all(isinstance(each, Message) for each in prompt):
        kind = "empty" if isinstance(prompt, list | tuple) and not prompt else _kind(prompt)
        raise ConfigError(f"{made_by}, whose prompt is {kind}: give a property that returns a list of Message")
    if not has_method(task, "environment"):
        raise ConfigError(f"{made_by}, which has no method environment: add it")
    if isinstance(task, CountsCalls) and (not isinstance(task.num_calls, Integral) or task.num_calls < 0):
        kind = task.num_calls if isinstance(task.num_calls, Integral) else _kind(task.num_calls)
        raise ConfigError(f"{made_by}, whose num_calls is {kind}: give a property that returns an int of 0 or more")


def _check_range(family: Any, *, owner: str) -> None:
    """Raise ConfigError unless `trained_calls` of a family with longer tasks is a pair of numbers."""
    calls: object = family.trained_calls
    is_pair = isinstance(calls, tuple | list) and len(calls) == 2 and all(isinstance(each, Integral) for each in calls)
    if not is_pair:
        raise ConfigError(
            f"{owner}.trained_calls is {_kind(calls)}: give a property that returns the smallest and the largest "
            "number of calls"
        )


def _kind(value: object) -> str:
    """Return what a value is, in an error message."""
    if callable(value):
        return "a method"
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__


def demonstrator_of(family: TaskFamily) -> Demonstrates:
    """Return the family as one with demonstrations. Raises ConfigError when it has none."""
    if not isinstance(family, Demonstrates):
        raise ConfigError(
            f"data.sources has a source of kind dialogues, but {type(family).__name__} has no demonstrate(): "
            "remove the source, or add that method"
        )
    return family
