"""Incremental answers: take tokens, return the deltas of a stream and finally the whole message or text.

The whole answer is the sum of its deltas, so a stream and a plain response of the same tokens say the same.
"""

import codecs
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from moetrain.chat.messages import call_id
from moetrain.data.tokenizer import Tokenizer
from moetrain.serve.job import Token
from moetrain.serve.turn import (
    Arguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Reasoning,
    StopStrings,
    TextStream,
    TurnReader,
)

_Json = dict[str, Any]


class Answer(Protocol):
    """One choice of a response. tokens: all of it so far."""

    tokens: list[Token]

    @property
    def num_stray(self) -> int:
        """Markers that were left out."""
        ...

    @property
    def num_reasoning(self) -> int:
        """Tokens of the reasoning."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether a stop string was found, after which no more tokens are needed."""
        ...

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: stop, length or tool_calls. Valid after `finish`."""
        ...

    def push(self, tokens: Iterable[Token]) -> list[_Json]:
        """Return what the tokens add, as parts of a choice in a chunk of a stream."""
        ...

    def finish(self) -> list[_Json]:
        """Return what is left."""
        ...

    def whole(self) -> _Json:
        """Return the whole answer, as parts of a choice in a response. Call it after `finish`."""
        ...

    def logprobs(self, tokens: Sequence[Token]) -> _Json:
        """Return the logprobs of some of its tokens, in the form of the endpoint."""
        ...


class ChatAnswer:
    """A turn of a chat: reasoning, content and tool calls.

    first_call: number of calls in the conversation before. prefilled: tokens of the turn that the prompt ends with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        end_ids: Collection[int],
        stops: Sequence[str],
        first_call: int,
        prefilled: Sequence[int] = (),
    ) -> None:
        self.tokens: list[Token] = []
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._reader = TurnReader(tokenizer, prefilled=prefilled)
        self._stops = StopStrings(stops)
        self._first_call = first_call
        self._has_ended = False
        self._reasoning = self._content = ""
        self._calls: list[_Json] = []
        self._num_whole_calls = 0

    @property
    def is_done(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.is_found

    @property
    def num_stray(self) -> int:
        """Markers that were left out."""
        return self._reader.num_stray

    @property
    def num_reasoning(self) -> int:
        """Tokens of the reasoning."""
        return self._reader.num_reasoning

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        if len(self._calls) > self._num_whole_calls:
            return "length"  # inside of a call, which a stream has begun to send
        if self._stops.is_found:
            return "stop"
        if not self._has_ended:
            return "length"
        return "tool_calls" if self._num_whole_calls else "stop"

    def push(self, tokens: Iterable[Token]) -> list[_Json]:
        """Return deltas of the message."""
        deltas: list[_Json] = []
        for token in tokens:
            if self.is_done or self._has_ended:
                break
            self.tokens.append(token)
            if token.id in self._end_ids:
                self._has_ended = True
            else:
                deltas += self._deltas(self._reader.push(token.id))
        return [{"delta": delta} for delta in _merged(deltas)]

    def finish(self) -> list[_Json]:
        """Return the deltas of what was held back."""
        deltas = self._deltas(self._reader.finish()) if not self.is_done else []
        return [{"delta": delta} for delta in _merged([*deltas, *self._say(self._stops.finish())])]

    def whole(self) -> _Json:
        """Return the message. A call that was cut off is left out."""
        calls = self._calls[: self._num_whole_calls]
        message: _Json = {"role": "assistant", "content": self._content or (None if calls else "")}
        if self._reasoning:
            message |= {"reasoning_content": self._reasoning, "reasoning": self._reasoning}
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def logprobs(self, tokens: Sequence[Token]) -> _Json:
        """Return the logprobs of tokens, those of markers and of the reasoning too."""
        return {"content": [_chat_logprob(token, self._tokenizer) for token in tokens], "refusal": None}

    def _deltas(self, events: Iterable[Event]) -> list[_Json]:
        return [delta for event in events for delta in self._of_event(event)]

    def _of_event(self, event: Event) -> list[_Json]:
        if self.is_done:
            return []
        if isinstance(event, Reasoning):
            self._reasoning += event.text
            return [{"reasoning_content": event.text, "reasoning": event.text}]
        if isinstance(event, Content):
            return self._say(self._stops.push(event.text))
        if isinstance(event, CallBegin):
            identity = call_id(event.name, self._first_call + event.number)
            function = {"name": event.name, "arguments": ""}
            self._calls.append({"id": identity, "type": "function", "function": dict(function)})
            begun = {"index": event.number, "id": identity, "type": "function", "function": function}
            return [*self._say(self._stops.finish()), {"tool_calls": [begun]}]
        if isinstance(event, Arguments):
            self._calls[event.number]["function"]["arguments"] += event.text
            return [{"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]}]
        assert isinstance(event, CallEnd)
        self._num_whole_calls = event.number + 1
        return []

    def _say(self, text: str) -> list[_Json]:
        self._content += text
        return [{"content": text}] if text else []


class TextAnswer:
    """A continuation of a text."""

    num_stray = 0
    num_reasoning = 0

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Collection[int], stops: Sequence[str]) -> None:
        self.tokens: list[Token] = []
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._has_ended = False
        self._text = ""
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_done(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.is_found

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        return "stop" if self._stops.is_found or self._has_ended else "length"

    def push(self, tokens: Iterable[Token]) -> list[_Json]:
        """Return the text that the tokens add."""
        text = ""
        for token in tokens:
            if self.is_done or self._has_ended:
                break
            self.tokens.append(token)
            if token.id in self._end_ids:
                self._has_ended = True
            else:
                text += self._stops.push(self._stream.push(token.id))
        return self._say(text)

    def finish(self) -> list[_Json]:
        """Return the text that was held back."""
        return self._say(self._stops.push(self._stream.finish()) + self._stops.finish())

    def whole(self) -> _Json:
        """Return the text."""
        return {"text": self._text}

    def logprobs(self, tokens: Sequence[Token]) -> _Json:
        """Return the logprobs of tokens. Offsets count the whole characters before, also where a stop cut.

        A token of a part of a character is `bytes:\\xe2`. Of alternatives with the same text, the likeliest is kept.
        """
        offsets, best = [], []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.bytes_of(token.id)))
            of_text: dict[str, float] = {}
            for id_, logprob in token.alternatives:  # the likeliest first
                of_text.setdefault(_key(id_, self._tokenizer), logprob)
            best.append(of_text)
        return {
            "tokens": [_key(token.id, self._tokenizer) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _say(self, text: str) -> list[_Json]:
        self._text += text
        return [{"text": text}] if text else []


def _merged(deltas: Sequence[_Json]) -> list[_Json]:
    """Return the deltas, with neighbours that add to the same text joined."""
    merged: list[_Json] = []
    for delta in deltas:
        place = _place(delta)
        if merged and place is not None and _place(merged[-1]) == place:
            merged[-1] = _joined(merged[-1], delta)
        else:
            merged.append(delta)
    return merged


def _place(delta: Mapping[str, Any]) -> object:
    """Return which text a delta adds to; None for the beginning of a call."""
    if "tool_calls" not in delta:
        return tuple(delta)
    (call,) = delta["tool_calls"]
    return None if "id" in call else call["index"]


def _joined(first: _Json, second: _Json) -> _Json:
    if "tool_calls" not in first:
        return {name: first[name] + second[name] for name in first}
    (one,), (two,) = first["tool_calls"], second["tool_calls"]
    arguments = one["function"]["arguments"] + two["function"]["arguments"]
    return {"tool_calls": [{"index": one["index"], "function": {"arguments": arguments}}]}


def _key(token: int, tokenizer: Tokenizer) -> str:
    """Return the text of a token; `bytes:` and its bytes if they are not whole characters."""
    raw = tokenizer.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _chat_logprob(token: Token, tokenizer: Tokenizer) -> _Json:
    def entry(id_: int, logprob: float) -> _Json:
        raw = tokenizer.bytes_of(id_)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}

    found = entry(token.id, token.logprob)
    if token.free_logprob is not None:
        found["free_logprob"] = token.free_logprob
    return found | {"top_logprobs": [entry(id_, logprob) for id_, logprob in token.alternatives]}
