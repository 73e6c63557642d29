"""Bodies of requests, checked: /v1/chat/completions and /v1/completions. Unknown fields are refused."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrain.chat.grammar import Calls
from moetrain.chat.messages import Message, Role, valid_text
from moetrain.chat.records import read_conversation, read_declaration
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import ConfigError, DataError
from moetrain.inference.sampling import Sampling
from moetrain.serve.errors import ApiError
from moetrain.serve.fields import Fields

IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "verbosity"),
)
"""Fields that are accepted without effect; the response names those that were given in `x-ignored-fields`."""
_MAX_STOPS, _MAX_BIASES, _MAX_TOP_LOGPROBS = 16, 1024, 20
_MAX_INTEGER = 2**63 - 1
_DATA_KEYS = ("weight", "train")
"""Keys of messages that say what to learn."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What both endpoints share. max_tokens: of the answer; None is as many as fit. seed: None is a random one.

    top_logprobs: None reports no logprobs. ignored: names of fields without effect.
    """

    model: str | None
    number: int
    seed: int | None
    max_tokens: int | None
    sampling: Sampling
    top_logprobs: int | None
    stops: tuple[str, ...]
    is_stream: bool
    includes_usage: bool
    returns_token_ids: bool
    ignored: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to answer. declaration: compact JSON of the tools. schema: JSON schema of the answer.

    thinks: whether the model writes its reasoning. tools: those that may be called.
    """

    choices: Choices
    messages: Sequence[Message]
    declaration: str
    tools: Sequence[ToolSpec]
    calls: Calls
    one_call: bool
    schema: Mapping[str, Any] | None
    thinks: bool


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """Texts or tokens to continue."""

    choices: Choices
    prompts: Sequence[str | list[int]] = field(default_factory=list)


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Return a checked request to /v1/chat/completions. Raises ApiError."""
    fields = Fields(body)
    messages = _messages(fields)
    tools, declaration = _tools(fields)
    calls, named = _tool_choice(fields, tools)
    one_call = not fields.flag("parallel_tool_calls", default=True) or named is not None
    schema = _schema(fields)
    thinks = _thinks(fields)
    wants = fields.flag("logprobs")
    most = fields.integer("top_logprobs", low=0, high=_MAX_TOP_LOGPROBS)
    if most and not wants:
        raise fields.refusal("top_logprobs", most, cure="it requires logprobs=true")
    limits = [fields.integer(name, low=1, high=_MAX_INTEGER) for name in ("max_completion_tokens", "max_tokens")]
    given = {limit for limit in limits if limit is not None}
    if len(given) > 1:
        raise fields.refusal("max_tokens", limits[1], cure=f"max_completion_tokens is {limits[0]}; give one of the two")
    fields.neutral("modalities", ["text"])
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
        fields.neutral(name)
    choices = _choices(fields, top_logprobs=(most or 0) if wants else None, max_tokens=given.pop() if given else None)
    return ChatRequest(
        choices=choices,
        messages=messages,
        declaration=declaration,
        tools=[tool for tool in tools if named in (None, tool.name)],
        calls=calls,
        one_call=one_call,
        schema=schema,
        thinks=thinks,
    )


def read_text(body: Mapping[str, Any]) -> TextRequest:
    """Return a checked request to /v1/completions. Raises ApiError."""
    fields = Fields(body)
    prompts = _prompts(fields)
    most = fields.integer("logprobs", low=0, high=_MAX_TOP_LOGPROBS)
    limit = fields.integer("max_tokens", low=1, high=_MAX_INTEGER)
    fields.neutral("echo", False)
    fields.neutral("suffix", "")
    fields.neutral("best_of", 1, body.get("n"))
    choices = _choices(fields, top_logprobs=most, max_tokens=16 if limit is None else limit)  # 16 is OpenAI's default
    return TextRequest(choices=choices, prompts=prompts)


def _choices(fields: Fields, *, top_logprobs: int | None, max_tokens: int | None) -> Choices:
    """Return the fields that both endpoints share, and refuse unknown ones."""
    is_stream = fields.flag("stream")
    options = fields.section("stream_options")
    includes_usage = False
    if options is not None:
        if not is_stream:
            raise ApiError("stream_options requires stream=true", param="stream_options", code="invalid_value")
        includes_usage = options.flag("include_usage")
        options.neutral("include_obfuscation", False)
        options.check()
    fields.neutral("frequency_penalty", 0)
    fields.neutral("presence_penalty", 0)
    fields.neutral("repetition_penalty", 1)
    choices = Choices(
        model=fields.text("model"),
        number=fields.integer("n", low=1, high=_MAX_INTEGER) or 1,
        seed=fields.integer("seed", low=-_MAX_INTEGER, high=_MAX_INTEGER),
        max_tokens=max_tokens,
        sampling=_sampling(fields, top_logprobs=top_logprobs or 0),
        top_logprobs=top_logprobs,
        stops=_stops(fields),
        is_stream=is_stream,
        includes_usage=includes_usage,
        returns_token_ids=fields.flag("return_token_ids"),
        ignored=fields.ignored(IGNORED),
    )
    fields.check()
    return choices


def _sampling(fields: Fields, *, top_logprobs: int) -> Sampling:
    temperature = fields.number("temperature", low=0, high=2, default=1.0)
    bias = fields.take("logit_bias")
    if bias is not None and (not isinstance(bias, dict) or len(bias) > _MAX_BIASES):
        raise fields.refusal("logit_bias", bias, cure=f"give an object with at most {_MAX_BIASES} token ids")
    of_tokens = Fields(bias or {}, prefix="logit_bias.")
    biases = []
    for token in bias or {}:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(
                f"logit_bias has the key {token[:20]!r}: give token ids", param="logit_bias", code="invalid_value"
            )
        biases.append((int(token), of_tokens.number(token, low=-100, high=100, default=0.0)))
    if len({token for token, _ in biases}) < len(biases):
        raise ApiError("logit_bias has a token id twice", param="logit_bias", code="invalid_value")
    try:
        return Sampling(
            temperature=temperature,
            top_p=fields.number("top_p", low=0, high=1, default=1.0),
            top_k=max(fields.integer("top_k", low=-1, high=_MAX_INTEGER) or 0, 0),
            min_p=fields.number("min_p", low=0, high=1, default=0.0),
            logit_bias=tuple(biases),
            top_logprobs=top_logprobs,
        )
    except ConfigError as error:
        raise ApiError(str(error), param=str(error).split(" ")[0], code="invalid_value") from None


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.refusal("stop", value, cure="give a string, or a list of strings, none of them empty")
    if len(stops) > _MAX_STOPS:
        raise fields.refusal("stop", value, cure=f"give at most {_MAX_STOPS} strings")
    return tuple(stops)


def _messages(fields: Fields) -> list[Message]:
    """Return the messages. A tool result without a name gets that of its call, as in the rollouts of training."""
    value = fields.take("messages")
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    for number, item in enumerate(items):
        if "role" not in item:  # a form of data sets
            raise ApiError(f"message {number} has no role", param="messages", code="invalid_value")
    try:
        messages = read_conversation([_without_indices(item) for item in value] if isinstance(value, list) else value)
    except DataError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from None
    except RecursionError:
        raise ApiError("messages are nested too deeply", param="messages", code="invalid_value") from None
    if not messages:
        raise ApiError("messages is empty: give at least one message", param="messages", code="invalid_value")
    for number, item in enumerate(items):
        _check_message(item, number=number)
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    for message in messages:
        if message.role is Role.tool and not message.name:
            message.name = names[message.tool_call_id]
    return messages


def _check_message(item: Mapping[str, Any], *, number: int) -> None:
    """Refuse what a message of a data set may be, and one of a request may not."""
    problem = ""
    if item["role"] != Role.assistant and item.get("content") is None:
        problem = "has no content"
    elif of_data := [key for key in _DATA_KEYS if key in item]:
        problem = f"has the unknown key {of_data[0]}"
    if problem:
        raise ApiError(f"message {number} {problem}", param="messages", code="invalid_value")


def _without_indices(item: Any) -> Any:
    """Return a message whose calls have no `index`, which clients keep from the deltas of a stream."""
    calls = item.get("tool_calls") if isinstance(item, dict) else None
    if not isinstance(calls, list):
        return item
    kept = [{k: v for k, v in call.items() if k != "index"} if isinstance(call, dict) else call for call in calls]
    return {**item, "tool_calls": kept}


def _tools(fields: Fields) -> tuple[list[ToolSpec], str]:
    value = fields.take("tools")
    if value is not None and not isinstance(value, list):
        raise fields.refusal("tools", value, cure="give a list of declarations")
    try:
        declaration = read_declaration(value)
    except DataError as error:
        raise ApiError(str(error), param="tools", code="invalid_value") from None
    tools = []
    for item in value or []:
        function = item["function"]
        parameters = {} if function.get("parameters") is None else function["parameters"]
        own = Fields(function, prefix=f"tools: {function['name'][:80]}.")
        own.text("description")
        own.flag("strict")
        if not _TOOL_NAME.fullmatch(function["name"]):
            cure = "give 1 to 64 letters, digits, _, . or -"
            raise ApiError(
                f"a tool has the name {function['name'][:80]!r}: {cure}", param="tools", code="invalid_value"
            )
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            message = f"parameters of {function['name']} are not a JSON schema of type object"
            raise ApiError(message, param="tools", code="invalid_value")
        schema = {"type": "object", **parameters}
        tools.append(ToolSpec(name=function["name"], description=function.get("description") or "", parameters=schema))
    return tools, declaration


def _tool_choice(fields: Fields, tools: Sequence[ToolSpec]) -> tuple[Calls, str | None]:
    """Return whether tools are called, and the name of the only one that may be."""
    value = fields.take("tool_choice")
    if value is None:
        return (Calls.auto if tools else Calls.none), None
    if isinstance(value, str) and value in list(Calls):
        if value == Calls.required and not tools:
            raise fields.refusal("tool_choice", value, cure="it requires tools")
        return Calls(value), None
    name = None
    if isinstance(value, dict) and value.get("type") == "function":
        choice = Fields(value, prefix="tool_choice.")
        choice.take("type")
        if (function := choice.section("function")) is not None:
            name = function.take("name")
            function.check()
        choice.check()
    if name not in [tool.name for tool in tools]:
        known = ", ".join(tool.name for tool in tools) or "none"
        cure = f'give none, auto, required or {{"type": "function", "function": {{"name": ...}}}} (tools: {known})'
        raise fields.refusal("tool_choice", value, cure=cure)
    return Calls.required, name


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    form = fields.section("response_format")
    if form is None:
        return None
    kind = form.text("type")
    schema: Mapping[str, Any] | None = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        inner = form.section("json_schema")
        found = inner.take("schema") if inner else None
        if inner is None or not isinstance(found, dict):
            message = f"response_format.json_schema.schema is {json.dumps(found)[:40]}: give an object"
            raise ApiError(message, param="response_format", code="invalid_value")
        inner.text("name")
        inner.text("description")
        inner.flag("strict")
        inner.check()
        schema = found
    elif kind != "text":
        raise form.refusal("type", kind, cure="give text, json_object or json_schema")
    form.check()
    return schema


def _thinks(fields: Fields) -> bool:
    """Return whether the model reasons, from `chat_template_kwargs.thinking` and `thinking.type`."""
    found = []
    template = fields.section("chat_template_kwargs")
    if template is not None:
        found.append(template.flag("thinking", default=True))
        template.check()
    thinking = fields.section("thinking")
    if thinking is not None:
        kind = thinking.text("type")
        if kind not in ("enabled", "disabled"):
            raise thinking.refusal("type", kind, cure="give enabled or disabled")
        found.append(kind == "enabled")
        thinking.check()
    if len(set(found)) > 1:
        raise fields.refusal("thinking", kind, cure="chat_template_kwargs.thinking says the opposite; give one of them")
    return all(found)


def _prompts(fields: Fields) -> list[str | list[int]]:
    value = fields.take("prompt")

    def is_tokens(item: object) -> bool:
        return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)

    prompts = value if isinstance(value, list) and value and not is_tokens(value) else [value]
    if not all(isinstance(prompt, str) or is_tokens(prompt) for prompt in prompts):
        raise fields.refusal("prompt", value, cure="give a text, a list of token ids, or a list of either")
    return [valid_text(prompt, field="prompt") if isinstance(prompt, str) else prompt for prompt in prompts]
