"""`--help`: every field of a command with its type, its default and the docstring below the field.

Fields of plugins are listed too: of those that installed packages register, and of those given as `plugins=`.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from moetrain.commands.schemas import SCHEMAS
from moetrain.compose import compose, data_folder
from moetrain.run.plugins import load_plugins
from moetrain.tasks import registry as tasks

_WIDTH = 110
_OVERVIEW_WIDTH = 120


def overview() -> str:
    """Return the text of `moetrain --help`."""
    lines = ["moetrain COMMAND [key=value ...]      moetrain COMMAND --help lists every key", ""]
    summaries = {name: _summary(schema) for name, schema in SCHEMAS.items()}
    summaries["check"] = "Check every config and recipe, or the command line that follows, without running it."
    width = max(map(len, summaries)) + 2
    for name, summary in summaries.items():
        lines += textwrap.wrap(
            summary,
            width=_OVERVIEW_WIDTH,
            initial_indent=f"  {name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
    recipes = sorted(path.parent.name for path in data_folder("recipes").glob("*/recipe.yaml"))
    lines += ["", f"recipes: {', '.join(recipes)}"]
    return "\n".join(lines)


def command_page(command: str, *, words: Sequence[str] = ()) -> str:
    """Return the text of `moetrain COMMAND --help`. words: the other words of the command line."""
    if command == "check":
        return (
            "moetrain check                      compose and check every config and recipe\n"
            "moetrain check COMMAND [key=value]  check one command line\n"
        )
    schema = SCHEMAS[command]
    lines = [f"moetrain {command} [key=value ...]", "", inspect.cleandoc(schema.__doc__ or ""), ""]
    groups = {path.name: path for path in sorted(data_folder("configs").iterdir()) if path.is_dir()}
    for name, hint in get_type_hints(schema).items():
        if name in groups and (is_dataclass(hint) or hint is str):  # else it is a name outside of moetrain
            choices = sorted(path.stem for path in groups[name].glob("*.yaml"))
            lines.append(f"  {name}={{{','.join(choices)}}}")
    lines.append("")
    load_plugins(compose(command, [word for word in words if word.startswith("plugins=")]).plugins)
    for key, kind, default, doc in [*_fields(schema, compose_defaults(command), ""), *_plugin_fields(schema)]:
        lines.append(f"  {key} ({kind}) = {default}")
        lines += textwrap.wrap(doc, width=_WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def compose_defaults(command: str) -> Any:
    """Return the config of a command without overrides, whose values the help shows as defaults."""
    return compose(command, [])


def _plugin_fields(schema: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield the fields of task families and RL algorithms that are not part of the command's config."""
    sections = get_type_hints(schema)
    if "task" in sections:
        for name, options in tasks.option_schemas().items():
            yield from _fields(options, _defaults(options), f"task.{name}.")
    if "rl" in sections:
        from moetrain.rl.registry import registered  # loads torch

        for name, algorithm in registered().items():
            for key, kind, default, doc in _fields(algorithm, _defaults(algorithm), "rl.options."):
                yield f"{key}, of rl.algorithm={name}", kind, default, doc


def _defaults(schema: Any) -> types.SimpleNamespace:
    """Return the default of each field of a dataclass, and `required` for a field without one."""
    return types.SimpleNamespace(**{field.name: _default(field) for field in fields(schema)})


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return "required" if field.default is MISSING else field.default


def _summary(schema: type) -> str:
    return inspect.cleandoc(schema.__doc__ or "").split("\n")[0]


def _fields(schema: Any, values: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, docstring) of every value; in a dict of sections, `*` stands for the section name."""
    docs = field_docs(schema)
    for name, hint in get_type_hints(schema).items():
        key = prefix + name
        value = getattr(values, name) if values is not None else None
        if get_origin(hint) is dict:
            entry = get_args(hint)[1]
            if not (isinstance(entry, type) and is_dataclass(entry)):
                yield f"{key}.*", _type_name(entry), _shown(value or "none"), docs[name]
                continue
            yield key, "sections by name", ", ".join(value or {}) or "none", docs[name]
            yield from _fields(entry, entry(), f"{key}.*.")
        elif is_dataclass(hint):
            yield from _fields(hint, value, f"{key}.")
        else:
            yield key, _type_name(hint), _shown(value), docs[name]


def field_docs(schema: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases, by field name. Reads the source code."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in schema.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, next_statement in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                statement_value = next_statement.value if isinstance(next_statement, ast.Expr) else None
                text = (
                    statement_value.value
                    if isinstance(statement_value, ast.Constant) and isinstance(statement_value.value, str)
                    else ""
                )
                docs[statement.target.id] = " ".join(text.split())
    return docs


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(member.value for member in hint)
    if isinstance(hint, types.GenericAlias):
        return f"{hint.__origin__.__name__} of {_type_name(get_args(hint)[-1])}"
    if is_dataclass(hint):
        return f"{{{', '.join(f'{name}: {_type_name(kind)}' for name, kind in get_type_hints(hint).items())}}}"
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if kind is types.NoneType else _type_name(kind) for kind in get_args(hint))
    return str(hint.__name__)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return str([vars(item) for item in value])
    if isinstance(value, list) and value and isinstance(value[0], Enum):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value) if value == "" else str(value)
