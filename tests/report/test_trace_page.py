import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import EOS, pieces_to_text
from moetrain.chat.registry import template_named, template_names
from moetrain.chat.templates.kimi_k2 import CALL_BEGIN, IM_END, THINK_BEGIN
from moetrain.errors import DataError
from moetrain.report.trace_page import blocks, pairs, read_traces, select_traces, trajectory_html
from moetrain.rollout.traces import trace as trace_of
from tests.report.nano_run import HOSTILE, conversation, trajectory


def trace(task: int, *, success: bool, failures: int = 0, calls: int = 2) -> dict[str, Any]:
    done = trajectory(task, success=success, failures=failures, calls=calls)
    return trace_of(done, decode=lambda tokens: conversation("blue"))


def test_a_conversation_is_read_turn_by_turn() -> None:
    assert [(block.kind, block.label, block.text) for block in blocks(conversation("blue"))] == [
        ("question", "", "Which colour has box 7?"),
        ("thinking", "", f"look it up {HOSTILE}"),
        ("call", "functions.get:0", '{"id": 7}'),
        ("result", "functions.get:0", "blue"),
        ("thinking", "", "done"),
        ("answer", "", "blue"),
    ]


def test_a_declaration_of_tools_is_told_from_results() -> None:
    text = '<|im_system|>tool_declare<|im_middle|>[{"name":"get"}]<|im_end|>'
    text += "<|im_system|>system<|im_middle|>Be brief<|im_end|>"
    assert [(block.kind, block.text) for block in blocks(text)] == [
        ("declaration", '[{"name":"get"}]'),
        ("system", "Be brief"),
    ]


def test_markers_that_do_not_nest_lose_no_text() -> None:
    text = f"{THINK_BEGIN}one{CALL_BEGIN}two{EOS}three{IM_END}{THINK_BEGIN}four"
    shown = " ".join(f"{block.label} {block.text}" for block in blocks(text))
    for word in ("one", "two", "three", "four", EOS):
        assert word in shown
    assert [block.text for block in blocks(f"<|im_user|>{CALL_BEGIN}x")] == ["x"]


def test_what_a_model_writes_is_text_and_nothing_else() -> None:
    page = trajectory_html(trace(3, success=True), title=HOSTILE, is_open=True)
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") == 2
    odd = {**trace(3, success=True), "text": f"{THINK_BEGIN}a\x00b\x1bc"}
    assert "a␀b␛c" in trajectory_html(odd, title="", is_open=True)


def test_right_and_wrong_ones_are_chosen_those_after_a_tool_failure_first() -> None:
    traces = [
        trace(0, success=True),
        trace(1, success=True, calls=5),
        trace(2, success=True, failures=1),
        trace(3, success=False),
        trace(4, success=False, calls=3),
    ]
    assert [item["task"] for item in select_traces(traces, count=2)] == [2, 1, 4, 3]
    assert select_traces(traces, count=0) == []


def test_the_same_task_is_paired_wrong_before_and_right_after() -> None:
    before = [trace(0, success=False), trace(1, success=True), trace(2, success=False, calls=9)]
    after = [trace(0, success=True), trace(1, success=True), trace(2, success=True)]
    assert [(a["task"], b["task"]) for a, b in pairs(before, after)] == [(0, 0)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "greedy.jsonl"
    assert read_traces(path) == []
    path.write_text(json.dumps(trace(0, success=True)) + "\n{oops\n")
    with pytest.raises(DataError, match=r"greedy\.jsonl:2 is not JSON"):
        read_traces(path)


def test_the_contexts_of_a_long_trajectory_can_be_folded_and_show_their_notes() -> None:
    note = "<|im_user|>user<|im_middle|>Your note: at <b>7</b><|im_end|>"
    text = trace(3, success=True)["text"]
    page = trajectory_html({**trace(3, success=True), "text": "\f".join([text, note + text])}, title="", is_open=True)
    assert page.count('<details class="context"') == 2
    assert "context 2 of 2, 1 call <code>Your note: at &lt;b&gt;7" in page
    assert "<b>7</b>" not in page
    assert '<details class="context"' not in trajectory_html(trace(3, success=True), title="", is_open=True)


@pytest.mark.parametrize("name", template_names())
def test_a_conversation_in_any_template_shows_its_parts(name: str) -> None:
    call = ToolCall(name="look", arguments='{"at": 1}', id="functions.look:0")
    messages = [
        Message(role=Role.system, content="be kind"),
        Message(role=Role.user, content="what is there?"),
        Message(role=Role.assistant, reasoning="I look", content="wait", tool_calls=[call]),
        Message(role=Role.tool, name="look", tool_call_id=call.id, content="a stone"),
        Message(role=Role.assistant, reasoning="a stone", content="yes"),
        Message(role=Role.user, content="sure?"),
        Message(role=Role.assistant, content="sure"),
    ]
    parts = blocks(pieces_to_text(template_named(name).conversation_pieces(messages)))
    first, second = ["thinking", "answer", "call", "result"], ["thinking", "answer", "question", "answer"]
    assert [part.kind for part in parts] == ["system", "question", *first, *second]
    assert [part.text for part in parts if part.kind != "call"] == [
        *("be kind", "what is there?", "I look", "wait", "a stone", "a stone", "yes", "sure?", "sure")
    ]
    (made,) = (part for part in parts if part.kind == "call")
    assert '{"at": 1}' in made.text and "look" in made.label + made.text
