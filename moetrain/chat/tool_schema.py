"""A tool as a model sees it: name, description and JSON schema, and the text that declares it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.chat.messages import valid_text


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """A tool as a model sees it; `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


def declaration(tools: Sequence[ToolSpec]) -> str:
    """Return the compact JSON that declares `tools` in a `tool_declare` message."""
    functions = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in tools
    ]
    return compact_json(functions)


def compact_json(value: object) -> str:
    """Return `value` as the JSON text of a declaration: no spaces, characters as they are."""
    return valid_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False), field="tools")
