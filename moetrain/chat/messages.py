"""Data classes of messages and tool calls, without tokens."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import DataError

_SHOWN = 40  # characters of a bad value that an error message repeats


class Role(StrEnum):
    """Role of a message's author."""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


@dataclass(kw_only=True)
class ToolCall:
    """One call in an assistant's turn. arguments: JSON text as written. id: `functions.{name}:{index}`.

    `name` is empty when the id that a model wrote has another form.
    """

    name: str
    arguments: str
    id: str

    def __post_init__(self) -> None:
        """Make the texts valid Unicode."""
        for name in ("name", "arguments", "id"):
            setattr(self, name, valid_text(getattr(self, name), field=f"{name} of a tool call"))


@dataclass(kw_only=True)
class Message:
    """One message. `reasoning` and `tool_calls` belong to assistants, `tool_call_id` to tool results."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str = ""
    name: str = ""
    """Author, shown instead of the role: the tool of a result, or a participant. Empty shows the role."""
    is_learned: bool = True
    """Whether the model learns to predict the message; used for assistant messages only."""

    def __post_init__(self) -> None:
        """Make the texts valid Unicode."""
        for name in ("content", "reasoning", "tool_call_id", "name"):
            setattr(self, name, valid_text(getattr(self, name), field=f"{name} of a message"))


def valid_text(text: object, *, field: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD, because no tokenizer can encode one.

    Files, environments and models produce lone surrogates through JSON escapes such as `\\ud83d`. Raises DataError that
    names `field` when `text` is not a string.
    """
    if not isinstance(text, str):
        raise DataError(f"{field} is {type(text).__name__} {str(text)[:_SHOWN]!r}: give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def call_id(name: str, index: int) -> str:
    """Return the id of call number `index` of a conversation (from 0), as the released Kimi K2 template writes it."""
    return f"functions.{name}:{index}"
