"""Compares an endpoint with another one on the same requests, as Moonshot's K2 Vendor Verifier does.

Agreement is the F1 score of finishing with `tool_calls`, with the other endpoint as ground truth. Schema accuracy
is the share of responses with calls whose arguments all match the schemas of their tools. Malformed requests must be
refused. The numbers of prompt tokens are compared too: where the models are the same, a difference is a fault of the
template or the tokenizer.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.chat.messages import Message
from moetrain.chat.tool_schema import ToolSpec, declaration
from moetrain.commands.verify import EndpointFault, VerifyEndpointRun
from moetrain.errors import DataError, RolloutError, ToolError
from moetrain.serve.endpoint import Endpoint, Reply
from moetrain.tasks.protocol import Split, TaskFamily
from moetrain.tools.call import parse_arguments
from moetrain.verify.table import Row

_MALFORMED: dict[str, Any] = {
    "no messages": {"messages": None},
    "a role that does not exist": {"messages": [{"role": "robot", "content": "x"}]},
    "a negative n": {"n": -1},
    "a temperature of text": {"temperature": "hot"},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a choice of an unknown tool": {"tool_choice": {"type": "function", "function": {"name": "no_such_tool"}}},
}
"""What replaces fields of a good request."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an endpoint made of one request. finish_reason: "error" when it gave no answer.

    is_valid: whether all calls match the schemas of the request. prompt_tokens: None when it does not say.
    """

    finish_reason: str
    is_valid: bool
    prompt_tokens: int | None


def requests_of(path: Path) -> list[dict[str, Any]]:
    """Return the bodies of chat completions in a JSONL file. Raises DataError that names the line."""
    requests = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON text may contain other separators of lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"requests is {path}: it cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise DataError(f"{path}:{number} has no messages: give the body of a chat completion")
        requests.append(body)
    if not requests:
        raise DataError(f"requests is {path}, which is empty: give one request a line")
    return requests


def task_requests(family: TaskFamily, *, number: int) -> list[dict[str, Any]]:
    """Return the first turns of held-out tasks as requests, with the tools of the family."""
    tools = json.loads(declaration(list(family.tools))) if family.tools else []
    prompts = [family.task(Split.held_out, index).prompt for index in range(number)]
    return [{"messages": [_body(message) for message in prompt], "tools": tools} for prompt in prompts]


def compare(
    endpoint: Endpoint, other: Endpoint, *, requests: Sequence[Mapping[str, Any]], run: VerifyEndpointRun
) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows with their bounds, and what else was counted."""
    found = _ask(endpoint, requests, name=run.model, run=run, fault=run.fault)
    expected = _ask(other, requests, name=run.other_model, run=run, fault=EndpointFault.none)
    pairs = list(zip(found, expected, strict=True))
    hits = sum(_calls(one) and _calls(two) for one, two in pairs)
    wrong = sum(_calls(one) != _calls(two) for one, two in pairs)
    has_tools = any(body.get("tools") for body in requests)
    f1 = 2 * hits / (2 * hits + wrong) if hits or wrong else float(not has_tools)
    invalid = sum(_calls(one) and not one.is_valid for one in found)
    num_calls = sum(map(_calls, found))
    failed = sum(_failed(one) for one in found)
    num_silent = sum(map(_failed, expected))
    accepted = _accepted_malformed(endpoint, requests[0], name=run.model)
    counted = [pair for pair in pairs if None not in (pair[0].prompt_tokens, pair[1].prompt_tokens)]
    other_prompts = sum(one.prompt_tokens != two.prompt_tokens for one, two in counted)
    rows = [
        Row(
            name="1 - F1 of tool calls",
            value=1 - f1,
            bound=1 - run.min_f1,
            note=f"{hits} both, {wrong} only one, of {len(pairs)} requests"
            + ("; no call was compared" if has_tools and not hits + wrong else ""),
        ),
        Row(
            name="1 - schema accuracy",
            value=invalid / num_calls if num_calls else 0.0,
            bound=1 - run.min_schema_accuracy,
            note=f"{invalid} of {num_calls} responses with calls",
        ),
        Row(name="failed requests", value=failed, bound=0, note=f"of {len(found)}"),
        Row(name="failed requests of the other", value=num_silent, bound=0, note=f"of {len(expected)}"),
        Row(name="malformed requests accepted", value=len(accepted), bound=0, note="; ".join(accepted)),
        Row(
            name="prompts of another length",
            value=other_prompts + (len(pairs) - len(counted) if run.same_prompts else 0),
            bound=0 if run.same_prompts else len(pairs),
            note=f"of {len(pairs)}, of which {len(counted)} have prompt_tokens of both endpoints",
        ),
    ]
    reasons = {
        "endpoint": dict(Counter(one.finish_reason for one in found)),
        "other": dict(Counter(one.finish_reason for one in expected)),
    }
    return rows, {"finish_reasons": reasons, "f1": f1, "num_requests": len(requests)}


def _calls(outcome: Outcome) -> bool:
    return outcome.finish_reason == "tool_calls"


def _failed(outcome: Outcome) -> bool:
    return outcome.finish_reason == "error"


def _ask(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    *,
    name: str | None,
    run: VerifyEndpointRun,
    fault: EndpointFault,
) -> list[Outcome]:
    model = name or endpoint.model()
    settings = {"model": model, "temperature": run.temperature, "max_tokens": run.max_tokens, "stream": False}

    def ask(body: Mapping[str, Any]) -> Outcome:
        try:
            reply = endpoint.chat({**body, **settings})
        except RolloutError:
            return Outcome(finish_reason="error", is_valid=False, prompt_tokens=None)
        return outcome_of(reply, tools=body.get("tools") or [], fault=fault)

    with ThreadPoolExecutor(run.num_clients) as pool:
        return list(pool.map(ask, requests))


def outcome_of(reply: Reply, *, tools: Iterable[Mapping[str, Any]], fault: EndpointFault) -> Outcome:
    """Return what a response amounts to. A response that is not as the API says counts as an error."""
    try:
        choice = reply.content["choices"][0]
        reason = str(choice["finish_reason"])
        calls = choice["message"].get("tool_calls") or []
        texts = [(str(call["function"]["name"]), str(call["function"]["arguments"])) for call in calls]
        usage = reply.content.get("usage") or {}
        specs = {tool["function"]["name"]: _spec(tool["function"]) for tool in tools}
    except (KeyError, IndexError, TypeError, AttributeError):
        return Outcome(finish_reason="error", is_valid=False, prompt_tokens=None)
    if fault is EndpointFault.calls and reason == "tool_calls":
        reason = "stop"
    if fault is EndpointFault.arguments:
        texts = [(name, text + "}") for name, text in texts]
    is_valid = bool(texts) and all(name in specs and _matches(specs[name], text) for name, text in texts)
    return Outcome(finish_reason=reason, is_valid=is_valid, prompt_tokens=usage.get("prompt_tokens"))


def _spec(function: Mapping[str, Any]) -> ToolSpec:
    parameters = function.get("parameters") or {"type": "object"}
    return ToolSpec(name=str(function["name"]), description="", parameters=dict(parameters))


def _matches(spec: ToolSpec, text: str) -> bool:
    try:
        parse_arguments(spec, text)
    except ToolError:
        return False
    return True


def _accepted_malformed(endpoint: Endpoint, good: Mapping[str, Any], *, name: str | None) -> list[str]:
    """Return which malformed requests did not get a status from 400 to 499."""
    body = {**good, "model": name or endpoint.model(), "max_tokens": 1}
    statuses = {what: endpoint.chat({**body, **change}).status for what, change in _MALFORMED.items()}
    return [what for what, status in statuses.items() if not 400 <= status < 500]


def _body(message: Message) -> dict[str, Any]:
    return {"role": message.role.value, "content": message.content}
