"""Complete trajectories as HTML, turn by turn: question, thinking, call, result, answer, verdict.

A model can write any text, including HTML, so all of it is escaped. The text is split at the template's special tokens
and shown unchanged. A turn whose markers do not nest is shown with these markers.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moetrain.chat.context import NOTE_PREFIX
from moetrain.chat.pieces import ROLES
from moetrain.chat.registry import AUTO, recognised, template_named, template_names
from moetrain.errors import DataError
from moetrain.report.shapes import TRACE_SHAPE, validated

_DECLARATION = "tool_declare"
_SPEAKERS = {"user": "question"}
CONTEXT_BREAK = "\f"
"""Character between the contexts of a trajectory in a trace's text."""
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
"""Visible symbols for control characters, which an untrained model can write."""


@dataclass(kw_only=True)
class Block:
    """A part of a turn.

    kind: system, declaration (of tools), question, thinking, call, result, answer, or marker (a marker that is out of
    place, or the text after it). label: for example the id of a call.
    """

    kind: str
    label: str
    text: str


def read_traces(path: Path) -> list[dict[str, Any]]:
    """Return the trajectories in a JSONL file; empty when it does not exist. Raises DataError that names a bad line."""
    if not path.is_file():
        return []
    traces = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            trace = json.loads(line)
        except ValueError:
            raise DataError(f"{path}:{number} is not JSON: run its stage again") from None
        traces.append(validated(trace, TRACE_SHAPE, place=f"{path}:{number}"))
    return traces


@functools.cache
def _markers() -> re.Pattern[str]:
    tokens = {token for name in template_names() for token in template_named(name).special_tokens}
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def blocks(text: str) -> list[Block]:
    """Return the parts of a conversation, in order. text: the conversation with the names of special tokens."""
    parsed: list[Block] = []
    speaker = kind = label = ""
    pieces = _markers().split(text)
    template = recognised(set(pieces[1::2])) or template_named(AUTO)
    syntax, tokens = template.syntax, set(template.special_tokens)
    visible = set(ROLES) | set(template.role_names.values()) - {syntax.end}
    for piece, next_piece in zip(pieces, [*pieces[1:], ""], strict=True):
        if piece in template.speakers:
            speaker, label = template.speakers[piece], ""
            is_named = not speaker or template.header_end in tokens
            kind = "role" if is_named else _kind_of(speaker)
        elif piece == template.header_end:
            kind = _kind_of(speaker)
        elif piece == syntax.think_begin:
            kind = "thinking"
        elif piece == syntax.call_begin:
            kind = "header" if syntax.call_argument else "call"
        elif piece == syntax.call_argument:
            kind = "call"
        elif piece in tokens and piece not in visible:
            kind = _kind_of(speaker)
        elif piece in tokens or piece in ROLES:
            parsed.append(Block(kind="marker", label="", text=piece))
        elif kind in ("role", "header") and next_piece in (template.header_end, syntax.call_argument):
            label = piece.strip()
        elif kind == "role" and template.header_end in piece:
            label, _, piece = piece.partition(template.header_end)
            speaker = _SPEAKERS.get(label, label)
            kind = _kind_of(speaker)
            parsed += [_block(kind, label, piece)] if piece.strip() else []
        elif piece.strip() or kind == "call":
            parsed.append(_block(kind or "answer", label, piece))
    return parsed


def _kind_of(speaker: str) -> str:
    return "answer" if speaker == "assistant" else speaker


def _block(kind: str, label: str, text: str) -> Block:
    if kind in ("role", "header"):
        kind = "marker"
    if kind == "result" and label in (_DECLARATION, "system"):
        kind = "declaration" if label == _DECLARATION else "system"
    if kind in ("question", "thinking", "answer"):
        label = ""
    if kind == "result":
        head, _, rest = text.partition("\n")
        if head.startswith("## Return of "):
            label, text = head.removeprefix("## Return of "), rest
    return Block(kind=kind, label=label, text=text.strip())


def select_traces(traces: Sequence[dict[str, Any]], *, count: int) -> list[dict[str, Any]]:
    """Return up to `count` right trajectories, then up to `count` wrong ones.

    Those with a tool failure come first, then those that require more calls.
    """
    order = sorted(
        traces, key=lambda trace: (-min(trace["num_transient_errors"], 1), -(trace["num_calls_needed"] or 0))
    )
    right = [trace for trace in order if trace["grade"]["success"]]
    wrong = [trace for trace in order if not trace["grade"]["success"]]
    return right[:count] + wrong[:count]


def trajectory_html(trace: dict[str, Any], *, title: str, is_open: bool) -> str:
    """Return one trajectory as a collapsible element."""
    grade = trace["grade"]
    verdict = "right" if grade["success"] else "wrong"
    errors = trace["num_transient_errors"]
    failures_text = f", {errors} tool failure{'s' if errors > 1 else ''} met" if errors else ""
    needed_text = "" if trace["num_calls_needed"] is None else f"{trace['num_calls_needed']} calls needed, "
    summary = (
        f'<span class="verdict {verdict}">{verdict}</span> {escape(title)}: task {trace["task"]}, '
        f"{needed_text}{trace['num_calls']} calls made{failures_text}"
    )
    contexts = trace["text"].split(CONTEXT_BREAK)
    parts = [_context_html(text, number=number, count=len(contexts)) for number, text in enumerate(contexts, 1)]
    sampled = sum(sum(map(bool, segment["is_sampled"])) for segment in trace["segments"])
    num_tokens = sum(len(segment["tokens"]) for segment in trace["segments"])
    grade_text = (
        f"graded {escape(str(grade['reason']))}; ended: {escape(str(trace['ending']).replace('_', ' '))}; "
        f"{trace['num_turns']} turns, {sampled} tokens sampled of {num_tokens}"
    )
    verdict_html = f'<div class="block grade {verdict}"><b>{verdict}</b><p>{grade_text}</p></div>'
    open_text = " open" if is_open else ""
    return (
        f'<details class="trajectory"{open_text}><summary>{summary}</summary>{"".join(parts)}{verdict_html}</details>\n'
    )


def _context_html(text: str, *, number: int, count: int) -> str:
    """Return the turns of one context; with several, each can be folded and shows the note that it begins with."""
    parsed = blocks(text)
    content = "".join(map(_block_html, parsed))
    if count == 1:
        return content
    note = next((block.text for block in parsed if block.text.startswith(NOTE_PREFIX)), "")
    open_text = " open" if number in (1, count) else ""
    calls = sum(block.kind == "call" for block in parsed)
    summary = f"context {number} of {count}, {calls} call{'s' * (calls != 1)} <code>{escape(note)}</code>"
    return f'<details class="context"{open_text}><summary>{summary}</summary>{content}</details>'


def _block_html(block: Block) -> str:
    if block.kind == "marker":
        return f'<div class="block marker"><code>{escape(block.text)}</code></div>'
    label = f" <code>{escape(block.label)}</code>" if block.label else ""
    text = escape((_indented(block.text) if block.kind == "declaration" else block.text).translate(_VISIBLE))
    if block.kind == "declaration":
        return f'<details class="block declaration"><summary>tools declared</summary><pre>{text}</pre></details>'
    return f'<div class="block {block.kind}"><b>{block.kind}</b>{label}<pre>{text}</pre></div>'


def _indented(text: str) -> str:
    """Return JSON with indentation, and other text unchanged."""
    try:
        return json.dumps(json.loads(text), indent=1)
    except ValueError:
        return text


def pairs(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the trajectories of the same task in two evaluations, for tasks that were wrong before and right after."""
    earlier = {(trace["task"], trace["num_calls_needed"]): trace for trace in before}
    for trace in select_traces(after, count=len(after)):
        other = earlier.get((trace["task"], trace["num_calls_needed"]))
        if other is not None and trace["grade"]["success"] and not other["grade"]["success"]:
            yield other, trace
