"""What a model reads of a long conversation: a policy that begins a new segment when the present one is full.

Demonstrations, rollouts, evaluation and chat all use `Context`, so that a model meets the contexts that it was trained
on. Turns that a later segment takes over keep the tokens that were sampled. Only a note is tokenized again, as text of
the user.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import Piece
from moetrain.chat.template import ChatTemplate
from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, check_ranges
from moetrain.runtime import python_stream

HIDDEN_RESULT = "This result is no longer shown."
NOTE_REQUEST = "Write a note. Only the task and the note stay."
NOTE_PREFIX = "Your note: "


class ContextKind(StrEnum):
    """What the next segment contains.

    full: there is one segment, with everything. hide_results: everything, but only the last tool results; the others
    become a placeholder. discard: the task and the last turns. notes: the task and a note that the model writes when it
    is asked.
    """

    full = "full"
    hide_results = "hide_results"
    discard = "discard"
    notes = "notes"


@dataclass(kw_only=True)
class ContextPolicy:
    """When a segment of a conversation ends, and what the next one contains."""

    kind: ContextKind = ContextKind.full
    """full: one segment. hide_results: old tool results are hidden. discard: only the last turns stay. notes: only a
    note stays that the model writes."""
    min_calls: int = 1
    """Smallest number of tool calls after which a segment ends. Each segment draws its number."""
    max_calls: int = 8
    """Largest number of tool calls after which a segment ends."""
    keep: int = 2
    """hide_results: number of tool results that stay; those of the last turn always do. discard: number of turns that
    stay, with their results."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="task.context.", ranges={COUNT: ("min_calls", "max_calls", "keep")})
        if self.min_calls > self.max_calls:
            raise ConfigError(
                f"task.context.min_calls is {self.min_calls}: give at most task.context.max_calls ({self.max_calls})"
            )

    @property
    def texts(self) -> list[str]:
        """The words that the policy itself puts into conversations, for training a tokenizer."""
        return {
            ContextKind.notes: [f"{NOTE_REQUEST}\n{NOTE_PREFIX}"],
            ContextKind.hide_results: [HIDDEN_RESULT],
        }.get(self.kind, [])


def described(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a policy that have an effect; `policy` is a `ContextPolicy` as a mapping."""
    kind = ContextKind(policy.get("kind", ContextKind.full))
    names: tuple[str, ...] = () if kind is ContextKind.full else ("min_calls", "max_calls")
    if kind in (ContextKind.hide_results, ContextKind.discard):
        names += ("keep",)
    return {"kind": kind.value, **{name: policy.get(name) for name in names}}


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn of the model as tokens, the numbers of its calls, and the given messages that follow it."""

    tokens: list[int]
    first_call: int
    num_calls: int
    given: list[Message]


class Context:
    """The present segment of one conversation.

    `opening` are the tokens that it begins with, up to where the model's turn begins. Call `add` after each turn. When
    `is_full` is then True, call `begin_next`; under `notes` let the model read `note_request` first.
    """

    def __init__(
        self,
        policy: ContextPolicy,
        prompt: Sequence[Message],
        *,
        template: ChatTemplate,
        declaration: str = "",
        stream: int,
        tokenize: Callable[[Sequence[Piece]], list[int]],
    ) -> None:
        """Begin the first segment.

        prompt: the task. declaration: compact JSON of the tools, or "". stream: seeds the number of calls of each
        segment.
        """
        self._policy = policy
        self._stream = stream
        self._tokenize = tokenize
        self._template = template
        self._prompt = list(prompt)
        self._declaration = declaration
        self._turns: list[_Turn] = []
        self._note: str | None = None
        self.num_segments = 0
        self.opening: list[int] = []
        self._open()

    def _open(self) -> None:
        self.num_segments += 1
        draw = python_stream(self._stream, "context", self.num_segments)
        self._num_calls_left = draw.randint(self._policy.min_calls, self._policy.max_calls)
        self.opening = self._opening()

    def _opening(self) -> list[int]:
        prompt = list(self._prompt)
        if self._note is not None:
            prompt.append(Message(role=Role.user, content=NOTE_PREFIX + self._note))
        tokens = self._tokenize(
            [
                *self._template.conversation_pieces(prompt, self._declaration),
                *self._template.generation_prompt(prompt[-1].role if prompt else None),
            ]
        )
        for turn in self._turns:
            tokens = [*tokens, *turn.tokens, *self._following(turn.given)]
        return tokens

    def _following(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the messages that follow a turn, up to where the next turn begins."""
        after = messages[-1].role if messages else Role.assistant
        return self._tokenize([*self._template.given_pieces(messages), *self._template.generation_prompt(after)])

    @property
    def next_call(self) -> int:
        """Number of the next call. Calls are numbered from 0, and again from 0 after a note."""
        return self._turns[-1].first_call + self._turns[-1].num_calls if self._turns else 0

    @property
    def asks_for_note(self) -> bool:
        """Whether the model writes a note before the next segment."""
        return self._policy.kind is ContextKind.notes

    def add(self, tokens: list[int], given: Sequence[Message], *, num_calls: int) -> list[int]:
        """Add a turn and the given messages that follow it; return the tokens that continue the segment after it."""
        turn = _Turn(tokens=tokens, first_call=self.next_call, num_calls=num_calls, given=list(given))
        self._turns.append(turn)
        self._num_calls_left -= num_calls
        return self._following(given)

    @property
    def can_end(self) -> bool:
        """Whether the policy ends segments at all."""
        return self._policy.kind is not ContextKind.full

    @property
    def is_full(self) -> bool:
        """Whether the segment has the calls after which it ends."""
        return self.can_end and self._num_calls_left <= 0

    @property
    def note_request(self) -> list[int]:
        """The last given messages and the request for a note, up to where the note begins."""
        request = Message(role=Role.user, content=NOTE_REQUEST)
        return self._following([*self._turns[-1].given, request])

    def begin_next(self, note: str = "", *, max_tokens: int | None = None) -> None:
        """Begin the next segment. note: what the model wrote, under `notes`.

        max_tokens: under `discard`, more turns are left out until the segment begins with at most so many tokens.
        """
        keep = self._policy.keep
        match self._policy.kind:
            case ContextKind.notes:
                self._turns, self._note = [], note
            case ContextKind.discard:
                self._turns = self._turns[-keep:]
            case ContextKind.hide_results:
                self._hide_results(keep)
        self._open()
        while (
            self._policy.kind is ContextKind.discard
            and len(self._turns) > 1
            and len(self.opening) > (max_tokens or len(self.opening))
        ):
            del self._turns[0]
            self.opening = self._opening()

    def _hide_results(self, keep: int) -> None:
        """Hide all results but the last `keep`, and never those of the last turn, which the model has not read."""
        *earlier, last = self._turns
        keep -= sum(message.role is Role.tool for message in last.given)
        turns = [last]
        for turn in reversed(earlier):
            given = []
            for message in reversed(turn.given):
                is_result = message.role is Role.tool
                given.append(replace(message, content=HIDDEN_RESULT) if is_result and keep <= 0 else message)
                keep -= is_result
            turns.append(replace(turn, given=given[::-1]))
        self._turns = turns[::-1]
