"""Grammar of a model's turn, for constrained generation: calls match the schemas of their tools, answers a JSON schema.

The text is Lark in llguidance's dialect, where `<[7]>` is the token of id 7 and other terminals match no special token.
"""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from moetrain.chat.template import (
    CALL_ARGUMENT,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
)
from moetrain.chat.tool_schema import ToolSpec


class Calls(StrEnum):
    """Whether a turn calls tools: never, as the model decides, or at least one call and no answer."""

    none = "none"
    auto = "auto"
    required = "required"


def turn_grammar(
    tools: Sequence[ToolSpec],
    *,
    special_ids: Mapping[str, int],
    calls: Calls = Calls.auto,
    one_call: bool = False,
    schema: Mapping[str, Any] | None = None,
    thinks: bool = True,
) -> str:
    """Return the grammar of a turn up to its end token.

    tools: those that the turn may call. one_call: at most one call. schema: JSON schema of the answer; None is any
    text. thinks: the turn begins with `<think>`; otherwise the prompt has already closed the reasoning.
    """

    def token(name: str) -> str:
        return f"<[{special_ids[name]}]>"

    answer = "TEXT" if schema is None else f"%json {json.dumps(schema)}"
    has_calls = bool(tools) and calls is not Calls.none
    after = "answer"
    if has_calls and calls is Calls.required:
        after = "section"
    elif has_calls:
        after = "answer section?" if schema is None else "(answer | section)"
    start = f"{token(THINK_BEGIN)} TEXT {token(THINK_END)} {after}" if thinks else after
    lines = ["%llguidance {}", f"start: {start}", f"answer: {answer}", "TEXT: /(.|\\n)*/"]
    if has_calls:
        alternatives = " | ".join(f"call_{number}" for number in range(len(tools)))
        repeated = "" if one_call else "+"
        lines.append(f"section: {token(SECTION_BEGIN)} call{repeated} {token(SECTION_END)}")
        lines.append(f"call: {token(CALL_BEGIN)} ({alternatives}) {token(CALL_END)}")
        for number, tool in enumerate(tools):
            header = f"{json.dumps(f'functions.{tool.name}:')} /[0-9]{{1,4}}/ {token(CALL_ARGUMENT)}"
            lines.append(f"call_{number}: {header} %json {json.dumps(tool.parameters)}")
    return "\n".join(lines) + "\n"
