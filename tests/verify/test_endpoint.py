"""`moetrain verify endpoint`: what it counts between two servers whose answers are known, and what it must detect."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.cli import verify_endpoint
from moetrain.commands.verify import EndpointFault, VerifyEndpointRun
from moetrain.compose import compose
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import BoundError, ConfigError, DataError
from moetrain.serve.endpoint import Endpoint, Reply
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.registry import build
from moetrain.verify.endpoint import compare, outcome_of, requests_of, task_requests
from tests.even_task import even_tokenizer
from tests.serve.servers import Script, declared, serving

ANSWER = Message(role=Role.assistant, content="yes")
CALL = Message(role=Role.assistant, tool_calls=[ToolCall(name="look", arguments='{"at": 1}', id="functions.look:0")])
REQUESTS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"number {n}"}], "tools": [declared("look", at={"type": "integer"})]}
    for n in range(8)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return even_tokenizer()


def _calling(*numbers: int) -> Any:
    return lambda prompt: CALL if any(f"number {n}<" in prompt for n in numbers) else ANSWER


def test_agreement_schemas_and_refusals_are_counted_and_faults_are_detected(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with (
        serving(tokenizer, lambda: Script(_calling(0, 1, 2), tokenizer)) as one,
        serving(tokenizer, lambda: Script(_calling(1, 2, 3, 4), tokenizer)) as two,
    ):
        run = VerifyEndpointRun(url=f"{one.url}/v1", other=f"{two.url}/v1", num_clients=3, same_prompts=True)
        endpoints = Endpoint(run.url), Endpoint(run.other)
        rows, counted = compare(*endpoints, requests=REQUESTS, run=run)
        found = {row.name: row for row in rows}
        assert found["1 - F1 of tool calls"].value == pytest.approx(1 - 2 * 2 / (2 * 2 + 3))
        assert not found["1 - F1 of tool calls"].is_kept
        assert [row.value for row in rows[1:]] == [0, 0, 0, 0, 0] and all(row.is_kept for row in rows[1:])
        assert counted["finish_reasons"]["endpoint"] == {"tool_calls": 3, "stop": 5}
        path = tmp_path / "requests.jsonl"
        path.write_text("\n".join(map(json.dumps, REQUESTS)) + "\n\n")
        words = [f"url={one.url}/v1", f"other={one.url}/v1", f"requests={path}", f"run.folder={tmp_path / 'runs'}"]
        assert verify_endpoint.main(compose("verify endpoint", words)) == 0
        written = json.loads((tmp_path / "runs/default/verify_endpoint/verify.json").read_text())
        assert written["f1"] == 1.0 and written["num_requests"] == 8
        for fault, row in ((EndpointFault.calls, "1 - F1"), (EndpointFault.arguments, "1 - schema accuracy")):
            with pytest.raises(BoundError, match=row):
                verify_endpoint.main(compose("verify endpoint", [*words, f"fault={fault}"]))
        broken = replace(run, other=run.url)
        rows, _ = compare(endpoints[0], endpoints[0], requests=[{"messages": [{"role": "robot"}]}], run=broken)
        assert {row.name for row in rows if not row.is_kept} == {
            "failed requests",
            "failed requests of the other",
            "prompts of another length",
        }


def test_a_comparison_that_saw_no_call_or_no_answer_of_the_other_endpoint_is_not_passed(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, lambda: Script(_calling(), tokenizer)) as one:
        run = VerifyEndpointRun(url=f"{one.url}/v1", other=f"{one.url}/v1", other_model="nope")
        rows, _ = compare(Endpoint(run.url), Endpoint(run.other), requests=REQUESTS, run=run)
        assert {row.name for row in rows if not row.is_kept} == {"1 - F1 of tool calls", "failed requests of the other"}
        plain = [{"messages": [{"role": "user", "content": "a\u2028b"}]}]
        rows, _ = compare(Endpoint(run.url), Endpoint(run.url), requests=plain, run=replace(run, other_model=None))
        assert all(row.is_kept for row in rows)


def test_a_response_that_is_no_chat_completion_is_an_error() -> None:
    call = {"function": {"name": "look", "arguments": "{}"}}
    for content in ({}, {"choices": []}, {"choices": [{"finish_reason": "stop", "message": None}]}, {"choices": [3]}):
        outcome = outcome_of(Reply(status=200, content=content), tools=[], fault=EndpointFault.none)
        assert outcome.finish_reason == "error"
    choice = {"finish_reason": "tool_calls", "message": {"tool_calls": [call]}}
    found = outcome_of(
        Reply(status=200, content={"choices": [choice]}), tools=REQUESTS[0]["tools"], fault=EndpointFault.none
    )
    assert found.finish_reason == "tool_calls" and not found.is_valid  # `at` is missing


def test_requests_are_made_from_held_out_tasks_or_read_from_a_file(tmp_path: Path) -> None:
    made = task_requests(build(TaskConfig(), 0), number=2)
    assert len(made) == 2 and made[0]["messages"][0]["role"] == "user" and made[0]["tools"][0]["function"]["name"]
    path = tmp_path / "r.jsonl"
    for content, said in (("", "is empty"), ("{\n", ":1 is not JSON"), ("[]\n", ":1 has no messages")):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            requests_of(path)
    path.write_text('{"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}\r\n')
    assert requests_of(path)[0]["messages"][0]["content"] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give url="),
        (["url=localhost", "other=http://x/v1"], "'localhost' is no address of an endpoint"),
        (["url=http://127.0.0.1:abc/v1", "other=http://x/v1"], "127.0.0.1:abc/v1' is no address of an endpoint"),
        (["url=http://127.0.0.1:99999/v1", "other=http://x/v1"], "127.0.0.1:99999/v1' is no address of an endpoint"),
        (["url='http://[::1/v1'", "other=http://x/v1"], "is no address of an endpoint"),
        (["url=http://127.0.0.1:9/v1", "other=http://127.0.0.1:9/v1"], "start the endpoint, or give another address"),
    ],
)
def test_an_endpoint_that_cannot_be_reached_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        verify_endpoint.main(compose("verify endpoint", [*words, f"run.folder={tmp_path}", "num_requests=1"]))
