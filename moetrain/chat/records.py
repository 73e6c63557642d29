"""Checks conversations of data sets in the chat-completions form, and reads them as messages.

Variants with a clear meaning are accepted: content in parts, calls as `tool_calls` or the older `function_call`, ids of
any form, results without ids, reasoning under three names, in a part of the content or in `<think>` at its beginning,
ShareGPT's `from` and `value` with calls and results as JSON. Other forms and unknown keys raise a `DataError` that
names the value and a cure.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.tool_schema import compact_json
from moetrain.errors import DataError
from moetrain.files import strict_json

_ROLES = {role.value: role for role in Role} | {
    "developer": Role.system,  # OpenAI's newer name
    "function": Role.tool,  # OpenAI's older name
    "ipython": Role.tool,  # Llama's name
}
_SHAREGPT_CALL = "function_call"
_SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{_SHAREGPT_CALL: "assistant", "observation": "tool", "function_response": "tool", "tool": "tool"},
}
_CALLS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULTS = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_ONLY_RESULTS = re.compile(r"\s*(?:<tool_response>(?:(?!</?tool_response>).)*</tool_response>\s*)+", re.DOTALL)
_ENDING_CALLS = re.compile(
    r"(?P<content>.*?)(?P<calls>(?:<tool_call>(?:(?!</?tool_call>).)*</tool_call>\s*)+)", re.DOTALL
)
"""An answer that ends in calls as Hermes's data sets write them."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
"""Key of the text in a part of the content, by the type of the part."""
_THINKING_PARTS = {"thinking": "thinking", "reasoning": "text"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THINK_BEGIN, _THINK_END = "<think>", "</think>"
_CALL_KEYS = ("tool_calls", "function_call")
_UNSUPPORTED_KEYS = ("refusal", "audio", "annotations")
"""Keys that OpenAI writes into each message; they must be empty or null."""
_MESSAGE_KEYS = (
    *("role", "content", "name", "tool_call_id", "weight", "train"),
    *(*_REASONING_KEYS, *_CALL_KEYS, *_UNSUPPORTED_KEYS),
)


class UnknownKeyError(DataError):
    """A record or message has a key that is not known."""


def read_messages(value: object) -> list[Message]:
    """Return the messages of a conversation to learn from, as `read_conversation` reads them.

    Raises DataError when a message cannot be read, when an assistant message is empty, or when there is none.
    """
    messages = read_conversation(value)
    for number, message in enumerate(messages):
        if message.role is Role.assistant and not (message.content or message.reasoning or message.tool_calls):
            raise DataError(
                f"message {number}: an assistant message is empty: give content, reasoning_content or tool_calls, "
                "or remove it"
            )
    if not any(message.role is Role.assistant for message in messages):
        raise DataError("the conversation has nothing to learn: give at least one message with the role assistant")
    return messages


def read_conversation(value: object) -> list[Message]:
    """Return the messages of a conversation, with calls renumbered to `functions.NAME:N`, N from 0.

    Raises DataError when a message cannot be read.
    """
    if not isinstance(value, list):
        found = "there are no messages" if value is None else f"{_shown(value)} is not a conversation"
        raise DataError(f"{found}: give a list of messages")
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise DataError(f"message {number} is {_shown(item)}: give an object with role and content")
    messages: list[Message] = []
    numbering = _Numbering()
    for number, item in enumerate(value):
        try:
            for single in _single_messages(item):
                messages.append(_message(single, numbering=numbering))
        except DataError as error:
            raise type(error)(f"message {number}: {error}") from None
    numbering.check()
    return messages


def read_declaration(value: object) -> str:
    """Return the compact JSON that declares the tools of a record, or "" when it has none.

    `value` is a list of declarations in the chat-completions form, or its JSON text.
    """
    value = _parsed(value)
    if not value:
        return ""
    if not isinstance(value, list):
        raise DataError(f"tools holds {_shown(value)}: give a list of declarations")
    for item in value:
        function = item.get("function") if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"a declaration in tools is {_shown(item)}: give "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            )
        check_keys(item, ("type", "function"), place="a declaration in tools")
        known = ("name", "description", "parameters", "strict")
        check_keys(function, known, place=f"the declaration of {function['name']}")
        if item.get("type", "function") != "function":
            shown = _shown(item["type"])
            raise DataError(f"the type of the declaration of {function['name']} is {shown}: give function")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            shown = _shown(function["parameters"])
            raise DataError(f"the parameters of the declaration of {function['name']} are {shown}: give a JSON schema")
    counts = Counter(item["function"]["name"] for item in value)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise DataError(f"tools declares {repeated[0]} twice: remove one of the declarations")
    return compact_json(value)


def with_outer_objects(value: object) -> object:
    """Return the declarations of a record, those that are given without the outer `type` and `function` within them.

    Data sets with ShareGPT's keys declare tools in this way.
    """

    def is_bare(item: object) -> bool:
        return isinstance(item, Mapping) and "name" in item and "function" not in item

    value = _parsed(value)
    if not isinstance(value, list):
        return value
    return [{"type": "function", "function": item} if is_bare(item) else item for item in value]


def _parsed(value: object) -> object:
    if not isinstance(value, str) or not value:
        return value
    try:
        return strict_json(value)
    except ValueError as error:
        raise DataError(f"tools holds text that is not JSON: {error}; give a list of declarations") from None


def check_keys(item: Mapping[str, Any], known: Collection[str], *, place: str) -> None:
    """Raise UnknownKeyError when `item` has a key that is not known."""
    for key in item:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {close[0]}? Known" if close else "known"
            raise UnknownKeyError(f"{place} has the unknown key {key!r}; {meant} are {', '.join(known)}")


class _Numbering:
    """Assigns ids to the calls of one conversation, and matches results to the calls of the last turn with calls."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._waiting: dict[str, tuple[str, ToolCall]] = {}  # (id in the record, call) by the id that was assigned
        self._by_identity: dict[str, str] = {}
        self._by_name: dict[str, dict[str, None]] = {}  # assigned ids in order
        self._was_guessed = False

    def add(self, calls: list[tuple[str, ToolCall]]) -> None:
        """Assign ids to the calls of a turn. calls: (id in the record, which may be empty; call)."""
        self.check()
        ids = [identity for identity, _ in calls if identity]
        if len(set(ids)) < len(ids):
            raise DataError(f"two calls of one turn have the same id: {', '.join(ids)}; give each call its own id")
        self._waiting, self._by_name, self._was_guessed = {}, {}, False
        for identity, call in calls:
            call.id = call_id(call.name, self._num_calls)
            self._num_calls += 1
            self._waiting[call.id] = (identity, call)
            self._by_name.setdefault(call.name, {})[call.id] = None
        self._by_identity = {identity: call.id for identity, call in calls if identity}

    def answer(self, identity: str, *, name: str) -> str:
        """Return the id of the call that a result belongs to: matched by `identity` if given, else by name in order."""
        if identity:
            found = self._by_identity.get(identity, "")
        else:
            same: Mapping[str, object] = self._by_name.get(name, {}) if name else self._waiting
            found = next(iter(same), "")
            self._was_guessed |= len(same) > 1
        if found not in self._waiting:
            given = f"tool_call_id is {identity!r}" if identity else f"a tool result has no id and the name {name!r}"
            waiting = ", ".join(identity or call.name for identity, call in self._waiting.values()) or "none"
            raise DataError(f"{given}: no call of the turn before matches; calls without a result are {waiting}")
        _, call = self._waiting.pop(found)
        if name not in ("", call.name):
            raise DataError(
                f"the result with tool_call_id {identity!r} has the name {name!r}, and its call has {call.name!r}: "
                "correct the name, or leave it out"
            )
        del self._by_name[call.name][found]
        return call.id

    def check(self) -> None:
        """Raise DataError when results were matched by order and some calls have no result."""
        if self._was_guessed and self._waiting:
            left = ", ".join(self._waiting)
            raise DataError(
                "a turn has fewer tool results without ids than calls, so that their calls are ambiguous "
                f"({left} without a result): give each result its tool_call_id"
            )


def _message(item: Mapping[str, Any], *, numbering: _Numbering) -> Message:
    check_keys(item, _MESSAGE_KEYS, place="the message")
    given = item.get("role")
    if not isinstance(given, str) or given not in _ROLES:
        raise DataError(f"the role is {given!r}: give one of {', '.join(_ROLES)}")
    role = _ROLES[given]
    for key in _UNSUPPORTED_KEYS:
        if item.get(key):
            raise DataError(f"{key} holds {_shown(item[key])}, which is not supported: give the text as content")
    name, identity = _string(item, "name"), _string(item, "tool_call_id")
    message = Message(
        role=role,
        content=_joined(item.get("content"), _TEXT_PARTS),
        reasoning=_reasoning(item),
        name=name,
        is_learned=_is_learned(item, role=role),
    )
    calls = _calls(item)
    if role is Role.assistant:
        _take_reasoning(message)
    elif calls or message.reasoning:
        raise DataError(f"a message of the role {given} has calls or reasoning: only assistant messages may have them")
    if identity and role is not Role.tool:
        raise DataError(f"a message of the role {given} has a tool_call_id: only tool results may have one")
    if calls:
        numbering.add(calls)
        message.tool_calls = [call for _, call in calls]
    if role is Role.tool:
        message.tool_call_id = numbering.answer(identity, name=name)
    return message


def _single_messages(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a message with ShareGPT's keys in the chat-completions form; one with several results as several."""
    if "from" not in item or "role" in item:
        return [item]
    message = _of_sharegpt(item)
    text = message.get("content")
    if message["role"] != "tool" or not isinstance(text, str) or _ONLY_RESULTS.fullmatch(text) is None:
        return [message]
    return [{**message, "content": result} for result in _RESULTS.findall(text)]


def _of_sharegpt(item: Mapping[str, Any]) -> dict[str, Any]:
    role = item["from"]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise DataError(
            f"from is {role!r}: give one of {', '.join(_SHAREGPT_ROLES)}, or write the message in the chat-completions "
            "form (role, content, tool_calls)"
        )
    check_keys(item, ("from", "value", "weight", "train"), place="the message")
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    if role == _SHAREGPT_CALL:
        return {"role": "assistant", "tool_calls": _calls_in_text(item.get("value")), **rest}
    content = item.get("value")
    ending = _ENDING_CALLS.fullmatch(content) if role in ("gpt", "assistant") and isinstance(content, str) else None
    if ending is None:
        return {"role": _SHAREGPT_ROLES[role], "content": content, **rest}
    calls = [call for text in _CALLS.findall(ending["calls"]) for call in _calls_in_text(text)]
    return {"role": "assistant", "content": ending["content"].rstrip(), "tool_calls": calls, **rest}


def _calls_in_text(value: object) -> list[dict[str, Any]]:
    """Return the calls in JSON text: one object with name and arguments, or a list of them."""
    try:
        found = strict_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError(f"a function_call or <tool_call> holds {_shown(value)}: give JSON with name and arguments")
    return [{"function": call} for call in calls]


def _take_reasoning(message: Message) -> None:
    """Move reasoning between `<think>` and `</think>` at the beginning of the content to `reasoning`."""
    if not message.content.lstrip().startswith(_THINK_BEGIN):
        return
    if message.reasoning:
        raise DataError(f"content begins with {_THINK_BEGIN} and {_REASONING_KEYS[0]} is given: give one of the two")
    reasoning, end, content = message.content.lstrip().removeprefix(_THINK_BEGIN).partition(_THINK_END)
    if not end:
        raise DataError(f"content begins with {_THINK_BEGIN} without {_THINK_END}: give {_REASONING_KEYS[0]} instead")
    message.reasoning, message.content = reasoning.strip("\n"), content.lstrip("\n")


def _is_learned(item: Mapping[str, Any], *, role: Role) -> bool:
    """Return whether the message is learned, from `weight` (0 or 1) and `train`; a null is ignored."""
    given = {}
    for key in ("weight", "train"):
        value = item.get(key)
        if value is not None and (not isinstance(value, bool | int | float) or value not in (0, 1)):
            raise DataError(f"{key} is {value!r}: give 0 or 1, false or true; values between are not supported")
        if value is not None:
            given[key] = bool(value)
    if len(set(given.values())) > 1:
        raise DataError(f"weight is {item['weight']!r} and train is {item['train']!r}: give one of the two")
    if role is not Role.assistant and any(given.values()):
        key = next(iter(given))
        raise DataError(f"{key} is {item[key]!r} on a message of the role {role}: only assistant messages are learned")
    return all(given.values())


def _reasoning(item: Mapping[str, Any]) -> str:
    texts = [*(_string(item, key) for key in _REASONING_KEYS), _joined(item.get("content"), _THINKING_PARTS)]
    found = {text for text in texts if text}
    if len(found) > 1:
        raise DataError(f"{', '.join(_REASONING_KEYS)} hold different texts: give one of them")
    return found.pop() if found else ""


def _joined(value: object, kinds: Mapping[str, str]) -> str:
    """Return the joined texts of the parts of some kinds; `value` is the content: a string, null, or a list of parts.

    kinds: the key of the text by the type of the part. Raises DataError for a part of an unknown type.
    """
    parts = value if isinstance(value, list) else [] if value is None else [{"type": "text", "text": value}]
    known = _TEXT_PARTS | _THINKING_PARTS
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        key = known.get(kind) if isinstance(kind, str) else None
        if key is None or not isinstance(part.get(key), str):
            raise DataError(f"content holds {_shown(value)}: give text, or a list of parts of type text")
        check_keys(part, ("type", key, "signature"), place="a part of content")
        if kind in kinds:
            texts.append(str(part[key]))
    return "".join(texts)


def _calls(item: Mapping[str, Any]) -> list[tuple[str, ToolCall]]:
    """Return (id in the record, call) of each call in a message."""
    calls, old = item.get("tool_calls"), item.get("function_call")
    calls = [] if calls is None else calls
    if not isinstance(calls, list):
        raise DataError(f"tool_calls holds {_shown(calls)}: give a list of calls")
    if calls and old:
        raise DataError("a message has tool_calls and function_call: give one of the two")
    if old:
        calls = [{"function": old}]
    return [_call(call) for call in calls]


def _call(call: Any) -> tuple[str, ToolCall]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise DataError(f"a tool call is {str(call)[:60]!r}: give function.name and function.arguments")
    check_keys(call, ("id", "type", "function"), place="a tool call")
    check_keys(function, ("name", "arguments"), place="function of a tool call")
    if call.get("type") not in (None, "function"):
        raise DataError(f"type of a tool call is {call['type']!r}: give function")
    name = function["name"]
    if not isinstance(name, str) or not name or ":" in name or name != "".join(name.split()):
        raise DataError(f"function.name is {_shown(name)}: give a name without a colon or space, for use in ids")
    return _string(call, "id"), ToolCall(name=name, arguments=_arguments(function.get("arguments"), name=name), id="")


def _arguments(value: object, *, name: str) -> str:
    """Return the arguments of a call as JSON text: text unchanged, an object as JSON, null and empty text as {}."""
    if value is None or value == "":
        return "{}"
    if isinstance(value, Mapping):
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise DataError(f"function.arguments of {name} hold NaN or an infinity, which JSON does not have") from None
    try:
        if isinstance(value, str) and isinstance(strict_json(value), dict):
            return value
        problem = ""
    except ValueError as error:
        problem = f" ({error})"
    raise DataError(f"function.arguments of {name} holds {_shown(value)}{problem}: give an object, or its JSON text")


def _string(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key} holds {_shown(value)}: give text")
    return value or ""


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
