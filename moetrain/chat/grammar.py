"""Grammar of a model's turn, for constrained generation: calls match the schemas of their tools, answers a JSON schema.

The text is Lark in llguidance's dialect, where `<[7]>` is the token of id 7 and other terminals match no special token.
"""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from moetrain.chat.template import ChatTemplate
from moetrain.chat.tool_schema import ToolSpec


class Calls(StrEnum):
    """Whether a turn calls tools: never, as the model decides, or at least one call and no answer."""

    none = "none"
    auto = "auto"
    required = "required"


def turn_grammar(
    tools: Sequence[ToolSpec],
    *,
    template: ChatTemplate,
    special_ids: Mapping[str, int],
    calls: Calls = Calls.auto,
    one_call: bool = False,
    schema: Mapping[str, Any] | None = None,
    thinks: bool = True,
) -> str:
    """Return the grammar of a turn up to its end token, after what `template.prefill` writes.

    tools: those that the turn may call. one_call: at most one call. schema: JSON schema of the answer; None is any
    text. thinks: the turn begins with reasoning; otherwise the prompt has already closed it.
    """
    syntax = template.syntax

    def token(name: str) -> str:
        return f"<[{special_ids[name]}]>"

    answer = "TEXT" if schema is None else f"%json {json.dumps(schema)}"
    has_calls = bool(tools) and calls is not Calls.none
    after = "answer"
    if has_calls and calls is Calls.required:
        after = "section"
    elif has_calls:
        after = "answer section?" if schema is None else "(answer | section)"
    start = after
    if thinks:
        is_begun = any(piece.text == syntax.think_begin for piece in template.prefill(thinks=True))
        begin = "" if is_begun else f"{token(syntax.think_begin)} "
        pad = f" {json.dumps(syntax.answer_pad)}" if syntax.answer_pad else ""
        start = f"{begin}TEXT {token(syntax.think_end)}{pad} {after}"
    lines = ["%llguidance {}", f"start: {start}", f"answer: {answer}", "TEXT: /(.|\\n)*/"]
    if has_calls:
        alternatives = " | ".join(f"call_{number}" for number in range(len(tools)))
        section = "call"
        if not one_call:
            between = f"{json.dumps(syntax.between_calls)} " if syntax.between_calls else ""
            section = f"call ({between}call)*" if between else "call+"
        if syntax.section_begin:
            section = f"{token(syntax.section_begin)} {section} {token(syntax.section_end)}"
        lines.append(f"section: {section}")
        lines.append(f"call: {token(syntax.call_begin)} ({alternatives}) {token(syntax.call_end)}")
        for number, tool in enumerate(tools):
            lines.append(f"call_{number}: {template.call_grammar(tool, token=token)}")
    return "\n".join(lines) + "\n"
