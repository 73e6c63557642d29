"""Messages of a conversation and calls of tools, as data. No tokens here."""

from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """Who speaks."""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


@dataclass(kw_only=True)
class ToolCall:
    """One call in an assistant's turn; `arguments` is the JSON text as written, `id` is `functions.{name}:{index}`."""

    name: str
    arguments: str
    id: str


@dataclass(kw_only=True)
class Message:
    """One message. `reasoning` and `tool_calls` belong to assistants, `tool_call_id` and `name` to tool results."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str = ""
    name: str = ""


def call_id(name: str, index: int) -> str:
    """Return the id of call number `index` of a conversation (from 0), as the released Kimi K2 template writes it."""
    return f"functions.{name}:{index}"
