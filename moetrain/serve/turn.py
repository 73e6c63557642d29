"""Reads a model's turn token by token: reasoning, content and calls as they appear, each text as soon as it is whole.

Whole turns of rollouts are parsed by `ChatTemplate.parse_turn`, which refuses markers that do not nest. A client of a
server has read the beginning of a turn already, so a marker in the wrong place is left out here, and counted.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moetrain.chat.messages import ToolCall
from moetrain.data.tokenizer import Tokenizer

_LONGEST_NAME = 64
_NO_NAME = "unknown"


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """Further text of the reasoning."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """Further text of the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CallBegin:
    """The beginning of a call, of which the name is known. number: from 0 within the turn."""

    number: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Further text of the arguments of a call."""

    number: int
    text: str


@dataclass(frozen=True, kw_only=True)
class CallEnd:
    """The end of a call, whose arguments are now whole."""

    number: int


Event = Reasoning | Content | CallBegin | Arguments | CallEnd


class TextStream:
    """Decodes the tokens of a text one by one. An incomplete UTF-8 sequence waits for its rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes."""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """Return what is left, with U+FFFD for an incomplete sequence."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class TurnReader:
    """The place in a turn. Pass each token except the end token to `push`, then call `finish`.

    prefilled: tokens of the turn that the prompt ends with.

    num_reasoning: tokens of the reasoning so far. num_stray: markers and texts in a wrong place, which were left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, prefilled: Sequence[int] = ()) -> None:
        self._template = tokenizer.template
        self._syntax = syntax = self._template.syntax
        self._places = {key: place for key, place in syntax.places.items() if place != "end"}
        if syntax.section_begin:
            # As the released Kimi K2 Thinking may write.
            self._places["think", syntax.section_begin] = "section"
        self._leading = self._held = self._body = ""
        self._names = tokenizer.special_names
        self._text = TextStream(tokenizer)
        self._place = "content"
        self._header = ""
        self._num_calls = 0
        self._has_arguments = False
        self.num_reasoning = self.num_stray = 0
        for token in prefilled:
            self.push(token)
        self.num_reasoning = self.num_stray = 0

    def push(self, token: int) -> Sequence[Event]:
        """Return what the token adds."""
        marker = self._names.get(token)
        if marker is None:
            self.num_reasoning += self._place == "think"
            return list(self._add(self._text.push(token)))
        return [*self._add(self._text.finish()), *self._enter(marker)]

    def finish(self) -> Sequence[Event]:
        """Return the rest of the text. A call that has not ended stays without its `CallEnd`."""
        return [*self._add(self._text.finish()), *self._release()]

    def _add(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if self._place in ("think", "content"):
            yield from self._say(self._trimmed(text))
        elif self._place == "header":
            self._header += text
        elif self._place == "arguments" and not self._syntax.streams_arguments:
            self._body += text
        elif self._place == "arguments":
            self._has_arguments = True
            yield Arguments(number=self._num_calls, text=text)
        else:
            self.num_stray += bool(text.strip())

    def _say(self, text: str) -> Iterator[Event]:
        if text:
            yield Reasoning(text=text) if self._place == "think" else Content(text=text)

    def _trimmed(self, text: str) -> str:
        """Return the text without what the template puts around it; what may be such an end is held back."""
        while text and self._leading:
            if text[0] != self._leading[0]:
                self._leading = ""
                break
            text, self._leading = text[1:], self._leading[1:]
        text, self._held = self._held + text, ""
        pad = self._syntax.think_pad if self._place == "think" else self._syntax.call_pad
        if pad and text.endswith(pad):
            text, self._held = text.removesuffix(pad), pad
        return text

    def _release(self) -> Iterator[Event]:
        held, self._held = self._held, ""
        yield from self._say(held)

    def _enter(self, marker: str) -> Iterator[Event]:
        syntax, place = self._syntax, self._places.get((self._place, marker))
        if place is None:
            yield from self._release()
            self.num_stray += 1
            return
        if marker in (syntax.think_end, syntax.section_begin, syntax.call_begin):
            self._held = ""  # text that the template puts there
        yield from self._release()
        if marker in (syntax.think_begin, syntax.think_end):
            self._leading = syntax.think_pad if place == "think" else syntax.answer_pad
        if marker == syntax.call_begin:
            self._header = self._body = ""
        if place == "arguments" and syntax.streams_arguments:
            self._has_arguments = False
            yield CallBegin(
                number=self._num_calls, name=self._named(self._template.read_call(self._header, "", index=0))
            )
        elif marker == syntax.call_end:
            yield from self._end_call()
        self._place = place

    def _end_call(self) -> Iterator[Event]:
        if not self._syntax.streams_arguments:
            call = self._template.read_call(self._header, self._body, index=0)
            yield CallBegin(number=self._num_calls, name=self._named(call))
            yield Arguments(number=self._num_calls, text=call.arguments or "{}")
        elif not self._has_arguments:
            yield Arguments(number=self._num_calls, text="{}")
        yield CallEnd(number=self._num_calls)
        self._num_calls += 1

    def _named(self, call: ToolCall) -> str:
        """Return the name of the called tool; of a call without one, its text as a name that clients accept."""
        if call.name:
            return call.name
        self.num_stray += 1
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", self._header.strip())[:_LONGEST_NAME] or _NO_NAME


class StopStrings:
    """Finds the first of some strings to end in a text that arrives in parts. It holds back what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Return the text that lies before any stop string."""
        if self.is_found or not self._stops:
            return "" if self.is_found else text
        text = self._held + text
        # The string that is complete first ends the text, so that the result does not depend on how the text is split.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if ends:
            self.is_found = True
            self._held = ""
            return text[: min(ends)[1]]
        longest = max(map(len, self._stops)) - 1
        kept = next(
            (size for size in range(min(longest, len(text)), 0, -1) if self._begins_one(text[-size:])),
            0,
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back."""
        text, self._held = self._held, ""
        return text

    def _begins_one(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
