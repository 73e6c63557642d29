"""Reads a model's turn token by token: reasoning, content and calls as they appear, each text as soon as it is whole.

Whole turns of rollouts are parsed by `chat.template.parse_turn`, which refuses markers that do not nest. A client of a
server has read the beginning of a turn already, so a marker in the wrong place is left out here, and counted.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moetrain.chat.template import (
    CALL_ARGUMENT,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
)
from moetrain.data.tokenizer import Tokenizer

_CALL_ID = re.compile(r"functions\.(?P<name>[^:\s]+):[0-9]+")
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

_PLACES = {
    ("content", THINK_BEGIN): "think",
    ("think", THINK_END): "content",
    ("think", SECTION_BEGIN): "section",  # as the released Kimi K2 Thinking may write
    ("content", SECTION_BEGIN): "section",
    ("section", CALL_BEGIN): "header",
    ("header", CALL_ARGUMENT): "arguments",
    ("arguments", CALL_END): "section",
    ("section", SECTION_END): "closed",
}


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

    num_reasoning: tokens of the reasoning so far. num_stray: markers and texts in a wrong place, which were left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_reasoning = 0
        self.num_stray = 0
        self._names = tokenizer.special_names
        self._text = TextStream(tokenizer)
        self._place = "content"
        self._header = ""
        self._num_calls = 0
        self._has_arguments = False

    def push(self, token: int) -> Sequence[Event]:
        """Return what the token adds."""
        marker = self._names.get(token)
        if marker is None:
            self.num_reasoning += self._place == "think"
            return list(self._add(self._text.push(token)))
        return [*self._add(self._text.finish()), *self._enter(marker)]

    def finish(self) -> Sequence[Event]:
        """Return the rest of the text. A call that has not ended stays without its `CallEnd`."""
        return list(self._add(self._text.finish()))

    def _add(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if self._place == "think":
            yield Reasoning(text=text)
        elif self._place == "content":
            yield Content(text=text)
        elif self._place == "header":
            self._header += text
        elif self._place == "arguments":
            self._has_arguments = True
            yield Arguments(number=self._num_calls, text=text)
        else:
            self.num_stray += bool(text.strip())

    def _enter(self, marker: str) -> Iterator[Event]:
        place = _PLACES.get((self._place, marker))
        if place is None:
            self.num_stray += 1
            return
        if place == "header":
            self._header = ""
        elif place == "arguments":
            self._has_arguments = False
            yield CallBegin(number=self._num_calls, name=self._name())
        elif marker == CALL_END:
            if not self._has_arguments:
                yield Arguments(number=self._num_calls, text="{}")
            yield CallEnd(number=self._num_calls)
            self._num_calls += 1
        self._place = place

    def _name(self) -> str:
        """Return the name of the called tool; of an id in another form, its text as a name that clients accept."""
        header = self._header.strip()
        if match := _CALL_ID.fullmatch(header):
            return match["name"]
        self.num_stray += 1
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", header)[:_LONGEST_NAME] or _NO_NAME


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
