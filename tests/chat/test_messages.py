import pytest

from moetrain.chat.messages import Message, Role, ToolCall, valid_text
from moetrain.chat.tool_schema import ToolSpec, declaration
from moetrain.errors import DataError

HALF, OTHER_HALF = "\ud83d", "\ude00"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("plain \U0001f600", "plain \U0001f600"),
        (f"a{HALF}b", "a\ufffdb"),
        (f"{OTHER_HALF}{HALF}", "\ufffd\ufffd"),
        (f"{HALF}{OTHER_HALF}", "\U0001f600"),
        (f"\ufeff{HALF}", "\ufeff\ufffd"),
        ("", ""),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text: str, valid: str) -> None:
    assert valid_text(text, field="x") == valid
    message = Message(role=Role.tool, content=text, reasoning=text, tool_call_id=text, name=text)
    assert (message.content, message.reasoning, message.tool_call_id, message.name) == (valid,) * 4
    call = ToolCall(name=text, arguments=text, id=text)
    assert (call.name, call.arguments, call.id) == (valid,) * 3


def test_a_declaration_with_a_lone_surrogate_can_be_encoded() -> None:
    text = declaration([ToolSpec(name="f", description=f"x{HALF}", parameters={})])
    assert "x\ufffd" in text and text.encode()


def test_a_field_that_is_no_string_is_refused() -> None:
    with pytest.raises(DataError, match="content of a message is int '5': give a string"):
        Message(role=Role.tool, content=5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="arguments of a tool call is dict"):
        ToolCall(name="f", arguments={}, id="")  # type: ignore[arg-type]
