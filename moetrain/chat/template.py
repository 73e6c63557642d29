"""What a chat template is: how it renders messages as pieces, and how a model's turn is written and read.

Each file in `chat/templates/` has one or more of them; `chat/registry.py` finds them by name or by a tokenizer's
tokens. Data, rollouts, the terminal and the server use this protocol alone, through the template of a tokenizer.

A conversation is a sequence of turns of the model and of the given messages between them. Training documents,
demonstrations, rollouts, `generate` and the exported Jinja template begin alike. Plain text begins with `[BOS]`
(`pieces.with_bos`); a conversation begins as its template says.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.pieces import ROLES, Piece
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import DataError, RolloutError


@dataclass(frozen=True, kw_only=True)
class TurnSyntax:
    """The markers of a model's turn, and the text that a template puts beside them.

    Without `section_begin` calls stand alone. Without `call_argument` the text between `call_begin` and `call_end`
    contains name and arguments of a call.
    """

    end: str
    think_begin: str
    think_end: str
    call_begin: str
    call_end: str
    call_argument: str = ""
    section_begin: str = ""
    section_end: str = ""
    streams_arguments: bool = False
    """Whether the text between `call_argument` and `call_end` is the arguments, unchanged."""
    think_pad: str = ""
    """Text after `think_begin` and before `think_end`."""
    answer_pad: str = ""
    """Text after `think_end`."""
    call_pad: str = ""
    """Text between an answer and the first call."""
    between_calls: str = ""
    """Text between two calls."""
    bare_think_end: bool = False
    """Whether a turn without reasoning begins with `think_end` alone."""
    always_thinks: bool = False
    """Whether each turn begins with `think_begin`."""
    places: dict[tuple[str, str], str] = field(init=False)
    """The place in a turn that follows a place and a marker."""

    def __post_init__(self) -> None:
        """Fill `places`."""
        places = {
            ("content", self.think_begin): "think",
            ("think", self.think_end): "content",
            ("content", self.end): "end",
            ("closed", self.end): "end",
        }
        if self.section_begin:
            places[("content", self.section_begin)] = "section"
            places[("section", self.section_end)] = "closed"
        if self.bare_think_end:
            places[("content", self.think_end)] = "content"
        between = "section" if self.section_begin else "closed"
        first = "header" if self.call_argument else "arguments"
        places |= {(between, self.call_begin): first, ("arguments", self.call_end): between}
        if self.call_argument:
            places[("header", self.call_argument)] = "arguments"
        if not self.section_begin:
            places[("content", self.call_begin)] = first
        object.__setattr__(self, "places", places)

    @property
    def markers(self) -> list[str]:
        """All markers, each once."""
        found = (self.section_begin, self.section_end, self.call_begin, self.call_argument, self.call_end)
        return [name for name in (*found, self.think_begin, self.think_end) if name]


class ChatTemplate(ABC):
    """A chat template. `name` is its value of `data.tokenizer.template`."""

    name: str
    syntax: TurnSyntax
    speakers: Mapping[str, str]
    """Marker that begins a message: who speaks (system, question, result or assistant), for reports; "" when the text
    after the marker says it."""
    header_end: str
    """Marker or text after the name of a speaker; "" when only the marker names the speaker."""
    other_markers: Sequence[str]
    """Special tokens beside those of a turn and of `[BOS]` and so on."""
    role_names: Mapping[str, str]
    """Own names of `[BOS]`, `[EOS]`, `[PAD]` and `[UNK]`, where they differ."""
    jinja: str
    """The same template for other programs: the same text, or an exception."""
    has_names: bool
    """Whether the name of a speaker is rendered. Without it, a named message other than a result is refused."""
    has_ids: bool
    """Whether the ids of calls are rendered. Without them, results stand in the order of their calls."""

    @property
    def markers(self) -> list[str]:
        """The special tokens that conversations consist of."""
        return [self.syntax.end, *self.other_markers, *self.syntax.markers]

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens, in the order in which a trained tokenizer gets them."""
        roles = [self.role_names.get(role, role) for role in ROLES]
        return list(dict.fromkeys([*roles, *self.markers]))

    @abstractmethod
    def fits(self, tokens: Collection[str], *, jinja: str) -> bool:
        """Return whether a tokenizer with these special tokens and this Jinja template ("" is none) is of this form."""

    @abstractmethod
    def opening_pieces(self, messages: Sequence[Message], declaration: str) -> list[Piece]:
        """Return the beginning of a conversation. messages: those before the first turn of the model.

        declaration: compact JSON of the tools, or "".
        """

    @abstractmethod
    def given_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return given messages that follow a turn of the model; there may be none."""

    @abstractmethod
    def generation_prompt(self, after: Role | None = None, *, name: str = "") -> list[Piece]:
        """Return the pieces that precede a model's turn. after: role of the message before. name: of the speaker."""

    @abstractmethod
    def turn_pieces(self, message: Message, after: Role | None = None) -> list[Piece]:
        """Return what the model produces in its turn, up to the end token; marked as sampled when it is learned."""

    @abstractmethod
    def prefill(self, *, thinks: bool, after: Role | None = None) -> list[Piece]:
        """Return what a server writes at the beginning of a turn, so that the model thinks, or does not."""

    @abstractmethod
    def read_call(self, header: str, body: str, *, index: int) -> ToolCall:
        """Return the call in the texts between its markers; its name is empty when it cannot be read.

        index: number of the call in the conversation.
        """

    @abstractmethod
    def complaint(self, call: ToolCall) -> str:
        """Return what the model reads as the result of a call without a name."""

    @abstractmethod
    def call_grammar(self, tool: ToolSpec, *, token: Callable[[str], str]) -> str:
        """Return the grammar of a call to `tool` between its begin and end, in Lark; `token` writes a marker."""

    def conversation_pieces(self, messages: Sequence[Message], declaration: str = "") -> list[Piece]:
        """Return a conversation as pieces, after the declaration of its tools, if any (compact JSON).

        Raises DataError when the ids of calls are not `functions.NAME:N` with N from 0, when a result has the id of no
        earlier call, and when the template cannot render a message.
        """
        _check_ids(messages)
        named = [m for m in messages if m.name and m.role is not Role.tool and not self.has_names]
        if named:
            raise DataError(
                f"the template {self.name} has no place for the name {named[0].name!r} of a message of the role "
                f"{named[0].role}: remove it"
            )
        runs = [list(run) for _, run in groupby(messages, key=lambda message: message.role is Role.assistant)]
        opening = runs.pop(0) if runs and runs[0][0].role is not Role.assistant else []
        pieces = self.opening_pieces(opening, declaration)
        after = opening[-1].role if opening else None
        calls: list[ToolCall] = []
        for run in runs:
            if run[0].role is not Role.assistant:
                given = run if self.has_ids else _in_order(run, calls, name=self.name)
                pieces += self.given_pieces(given)
                after = given[-1].role
                continue
            for number, message in enumerate(run):
                if number:
                    pieces += self.given_pieces([])
                pieces += [*self.generation_prompt(after, name=message.name), *self.turn_pieces(message, after)]
                after, calls = Role.assistant, message.tool_calls
        return pieces + (self.given_pieces([]) if after is Role.assistant else [])

    def parse_turn(
        self,
        tokens: Sequence[int],
        *,
        decode: Callable[[Sequence[int]], str],
        special_names: Mapping[int, str],
        first_index: int,
    ) -> Message:
        """Return the message of a model's turn from its tokens, with or without the final end token.

        A call that cannot be read has an empty name. A missing id becomes `call:N`, where N counts from `first_index`,
        the number of calls before this turn. Raises RolloutError when the markers do not nest.
        """
        syntax = self.syntax
        message = Message(role=Role.assistant)
        where, header, has_thought = "content", "", False
        for text, marker in _split_at_specials(tokens, decode=decode, special_names=special_names, end=syntax.end):
            if where == "think":
                message.reasoning += text
            elif where == "content":
                message.content += text
            elif where == "header":
                header += text
            elif where == "arguments" and marker == syntax.call_end:
                index = first_index + len(message.tool_calls)
                message.tool_calls.append(self.read_call(header, text, index=index))
            elif text.strip():
                raise RolloutError(f"a tool call section holds stray text {text[:40]!r}")
            has_thought |= where == "think"
            where = _next_place(where, marker, syntax=syntax)
            if marker == syntax.call_begin:
                header = ""
        if where != "end":
            raise RolloutError(f"the turn ends inside its {where}")
        return _without_pads(message, syntax=syntax, has_thought=has_thought)


def _without_pads(message: Message, *, syntax: TurnSyntax, has_thought: bool) -> Message:
    message.reasoning = message.reasoning.removeprefix(syntax.think_pad).removesuffix(syntax.think_pad)
    if has_thought:
        message.content = message.content.removeprefix(syntax.answer_pad)
    if message.tool_calls:
        message.content = message.content.removesuffix(syntax.call_pad)
    return message


def _next_place(where: str, marker: str, *, syntax: TurnSyntax) -> str:
    if not marker:
        return "end" if where in ("content", "closed") else where
    try:
        return syntax.places[where, marker]
    except KeyError:
        raise RolloutError(f"{marker} cannot follow inside {where}") from None


def _split_at_specials(
    tokens: Sequence[int], *, decode: Callable[[Sequence[int]], str], special_names: Mapping[int, str], end: str
) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    run: list[int] = []
    for token in tokens:
        if token in special_names:
            parts.append((decode(run), special_names[token]))
            run = []
        else:
            run.append(token)
    if run or not parts or parts[-1][1] != end:
        parts.append((decode(run), ""))
    return parts


def _check_ids(messages: Sequence[Message]) -> None:
    known: list[str] = []
    for message in messages:
        for call in message.tool_calls:
            if call.id != call_id(call.name, len(known)):
                raise DataError(f"the id of a call is {call.id!r}: give {call_id(call.name, len(known))!r}")
            known.append(call.id)
        if message.role is Role.tool and message.tool_call_id not in known:
            raise DataError(f"tool_call_id is {message.tool_call_id!r}: give the id of an earlier call")


def _in_order(given: Sequence[Message], calls: Sequence[ToolCall], *, name: str) -> list[Message]:
    """Return given messages with the results first and in the order of their calls, none of which may be missing."""
    results = {message.tool_call_id: message for message in given if message.role is Role.tool}
    ordered = [results[call.id] for call in calls if call.id in results]
    if results and len(ordered) < max(len(calls), len(results)):
        raise DataError(
            f"the template {name} has no ids of calls, so a turn needs one result for each of its calls "
            f"({len(calls)}), and has {len(ordered)}: give all results of a turn directly after it"
        )
    return [*ordered, *(message for message in given if message.role is not Role.tool)]


def split_system(messages: Sequence[Message], *, template: str) -> tuple[str, list[Message]]:
    """Return the text of the system messages, with blank lines between them, and the other messages.

    Raises DataError for a system message after another one, for a template that has a place for them at the beginning.
    """
    rest = [message for message in messages if message.role is not Role.system]
    system = messages[: len(messages) - len(rest)]
    check_no_system(messages[len(system) :], template=template)
    return "\n\n".join(message.content for message in system if message.content), rest


def check_no_system(messages: Sequence[Message], *, template: str) -> None:
    """Raise DataError for a system message, which `template` renders at the beginning of a conversation only."""
    for message in messages:
        if message.role is Role.system:
            raise DataError(
                f"the template {template} has a place for system messages at the beginning only: move the message "
                f"{message.content[:40]!r} there"
            )


_CALL_ID = re.compile(r"functions\.(?P<name>[^:\s]+):[0-9]+")


def name_in(identity: str) -> str:
    """Return the tool's name in an id of the form `functions.NAME:N`, or "" when it has another form."""
    match = _CALL_ID.fullmatch(identity)
    return match["name"] if match else ""
