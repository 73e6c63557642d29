"""The dotted keys of a config schema, such as `train.steps`: their types, and suggestions for a mistyped one."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from moetrain.errors import ConfigError


def leaf_keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every value of a schema; `*` stands for the names in a dict of sections."""
    for name, hint in get_type_hints(schema).items():
        kind, key = without_none(hint), prefix + name
        if get_origin(kind) is dict:
            kind, key = get_args(kind)[1], f"{key}.*"
        if is_dataclass(kind):
            yield from leaf_keys(kind, f"{key}.")
        else:
            yield key, hint


def without_none(hint: Any) -> Any:
    """Return the type of a value that may be null, without null."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint


def types_along(schema: type, key: str) -> list[Any]:
    """Return the types along a dotted key. Raises `ConfigError` with a suggestion if the key is not in the schema."""
    kinds: list[Any] = [schema]
    for depth, part in enumerate(key.split(".")):
        parent = ".".join(key.split(".")[:depth])
        if is_dataclass(kinds[-1]):
            hints = get_type_hints(kinds[-1])
            if part not in hints:
                leaves = [leaf for leaf, _ in leaf_keys(schema)]
                same_name = [leaf for leaf in leaves if leaf.split(".")[-1] == key.split(".")[-1]]
                is_typo = difflib.get_close_matches(part, hints, cutoff=0.8)  # a typo in a key of this section
                advice = f"did you mean {same_name[0]}?" if same_name and not is_typo else suggestion(part, list(hints))
                place = f"in {parent}" if parent else "in this command"
                raise ConfigError(f"{key}: there is no {part!r} {place}; {advice}")
            kinds.append(without_none(hints[part]))
        elif get_origin(kinds[-1]) is dict:
            kinds.append(get_args(kinds[-1])[1])
        else:
            raise ConfigError(f"{key}: {parent} is one value and has no {part!r}")
    return kinds


def suggestion(word: str, options: Sequence[str]) -> str:
    """Return `did you mean X?` if an option is similar to `word`, else the list of options."""
    similar = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {similar[0]}?" if similar else f"there are {', '.join(sorted(options)) or 'none'}"


def as_typed(value: Any) -> str:
    """Return a value of a config as it is typed on a command line, for a message."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    return json.dumps(value, default=str)
