"""A conversation at a terminal: a person writes, the model answers. There are no tools, and the model is told so.

The conversation is one sequence to which tokens are appended. A turn that did not end by itself is taken back.
"""

from collections.abc import Callable, Iterator, Sequence

from moetrain.chat.messages import Message, Role
from moetrain.chat.pieces import Piece, pieces_to_tokens
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, RolloutError
from moetrain.inference.protocol import Generation
from moetrain.inference.protocol import Sequence as TokenSequence
from moetrain.inference.sampling import Sampling
from moetrain.runtime import seed_of
from moetrain.terminal.player import Interrupts, TurnEnd, play_turn
from moetrain.terminal.screen import Screen

_MAX_ROUNDS = 4  # turns with calls that follow one message
_NO_TOOLS = "error: this chat has no tools; answer without them"


class Conversation:
    """The conversation so far. is_full: it has reached the largest number of tokens."""

    def __init__(
        self,
        generation: Generation,
        *,
        tokenizer: Tokenizer,
        screen: Screen,
        temperature: float,
        max_tokens: int,
        max_turn_tokens: int,
        seed: int,
        system: str = "",
    ) -> None:
        """Begin with a system message, if it is not empty. Raises ConfigError if it is too long for the model."""
        self.is_full = False
        self._generation = generation
        self._tokenizer = tokenizer
        self._screen = screen
        self._sampling = Sampling(temperature=temperature)
        self._max_tokens = max_tokens
        self._max_turn_tokens = max_turn_tokens
        self._seed = seed
        first = [Message(role=Role.system, content=system)] if system else []
        self._template = tokenizer.template
        self._first = first
        self._tokens: list[int] = []
        self._num_messages = self._num_calls = self._start = 0
        self._interrupts = Interrupts()
        empty = Message(role=Role.user, content="")
        if system and (length := len(self._opening([*first, empty]))) >= max_tokens:
            raise ConfigError(f"system has {length} tokens: the model takes {max_tokens - 1}, with the conversation")

    def answer(self, text: str) -> TurnEnd:
        """Show the model's answer to a message of the person. An answer that was interrupted leaves no trace.

        A message that is too long even for a new conversation is left out.
        """
        before, num_calls = list(self._tokens), self._num_calls
        first = [*self._first, Message(role=Role.user, content=text)]
        if (length := len(self._opening(first))) >= self._max_tokens:
            self._screen.say(
                "note", f"the message is too long: {length} tokens with its markers, of {self._max_tokens - 1}"
            )
            return TurnEnd.limit
        self._num_messages += 1
        end = self._rounds([Message(role=Role.user, content=text)])
        if end is not TurnEnd.whole:
            self._tokens, self._num_calls = before, num_calls
            reason = "interrupted" if end is TurnEnd.interrupted else "cut off at its limit"
            self._screen.say("note", f"the answer was {reason}: it and your message are taken back")
        return end

    def _rounds(self, given: Sequence[Message]) -> TurnEnd:
        for number in range(_MAX_ROUNDS):
            new = self._following(given)
            if len(self._tokens) + len(new) >= self._max_tokens:
                self.is_full = True
                return TurnEnd.limit
            self._tokens += new
            end = self._turn(number)
            if end is not TurnEnd.whole:
                return end
            given = list(self._results(self._tokens))
            if not given:
                return end
        return TurnEnd.limit

    def _following(self, given: Sequence[Message]) -> list[int]:
        """Return the tokens of given messages, up to where the model's turn begins."""
        if not self._tokens:
            return self._opening([*self._first, *given])
        return self._encoded([*self._template.given_pieces(given), *self._template.generation_prompt(given[-1].role)])

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a new conversation, up to where the model's turn begins."""
        pieces = self._template.opening_pieces(messages, "")
        return self._encoded([*pieces, *self._template.generation_prompt(messages[-1].role)])

    def _encoded(self, pieces: Sequence[Piece]) -> list[int]:
        return pieces_to_tokens(pieces, encode=self._tokenizer.encode, special_ids=self._tokenizer.special_ids)[0]

    def _turn(self, number: int) -> TurnEnd:
        """Generate a turn, and append it."""
        sequence = TokenSequence(
            tokens=list(self._tokens),
            stream=seed_of(self._seed, "chat", self._num_messages, number),
            limit=min(len(self._tokens) + self._max_turn_tokens, self._max_tokens),
            stop_ids=frozenset(self._tokenizer.end_ids),
            sampling=self._sampling,
        )
        self._start = len(sequence.tokens)
        self._generation.add(sequence)
        try:
            end = play_turn(
                self._generation,
                sequence,
                tokenizer=self._tokenizer,
                screen=self._screen,
                interrupts=self._interrupts,
            )
        finally:
            self._generation.cancel(sequence)
        self._tokens = sequence.tokens
        return end

    def _results(self, tokens: list[int]) -> Iterator[Message]:
        """Yield the results of the calls in the last turn, each of which says that there are no tools."""
        try:
            turn = self._template.parse_turn(
                tokens[self._start :],
                decode=self._tokenizer.decode,
                special_names=self._tokenizer.special_names,
                first_index=self._num_calls,
            )
        except RolloutError as error:
            self._screen.say("note", f"the turn is malformed: {error}")
            return
        for call in turn.tool_calls:
            self._screen.say("result", _NO_TOOLS)
            yield Message(role=Role.tool, name=call.name, tool_call_id=call.id, content=_NO_TOOLS)
        self._num_calls += len(turn.tool_calls)


def converse(conversation: Conversation, read: Callable[[], str | None], *, screen: Screen) -> None:
    """Answer each message until there are no more, the conversation is full, or Ctrl-C comes twice in a row.

    read: returns the next message, or None at the end; it may raise KeyboardInterrupt while it waits for a person.
    """
    was_interrupted = False
    while not conversation.is_full:
        try:
            text = read()
        except KeyboardInterrupt:
            if was_interrupted:
                return
            was_interrupted = True
            screen.say("note", "Ctrl-C again, or Ctrl-D, ends the chat")
            continue
        if text is None:
            return
        if not text.strip():
            continue
        if not screen.is_terminal:
            screen.say("user", text)
        try:
            was_interrupted = conversation.answer(text) is TurnEnd.interrupted
        except KeyboardInterrupt:
            screen.end_part()
            return
    screen.say("note", "the conversation has reached the largest number of tokens of the model")
