"""Declaration of a tool to the model: name, description and JSON schema, and their text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.chat.messages import valid_text
from moetrain.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """A tool as declared to the model. parameters: a JSON schema of type object."""

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
    """Return `value` as the JSON text of a declaration: without spaces, non-ASCII characters not escaped.

    Raises DataError for NaN and infinities, which JSON does not have.
    """
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DataError("tools hold NaN or an infinity, which JSON does not have") from None
    return valid_text(text, field="tools")
