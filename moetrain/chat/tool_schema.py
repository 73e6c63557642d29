"""What a tool is called with: name, description and JSON schema, and the text that declares it to a model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
    return json.dumps(functions, separators=(",", ":"), ensure_ascii=False)
