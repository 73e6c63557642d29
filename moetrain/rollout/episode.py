"""One trajectory in the making: turns go to the environment, observations come back as tokens to append."""

import logging
import time

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.template import (
    IM_END,
    Piece,
    conversation_pieces,
    generation_prompt,
    message_pieces,
    parse_turn,
    pieces_to_tokens,
)
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import RolloutError, ToolError
from moetrain.inference.engine import Sequence
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.tasks.protocol import Environment, Grade, Observation, Task, TaskFamily

_log = logging.getLogger(__name__)


def prompt_tokens(task: Task, family: TaskFamily, *, tokenizer: Tokenizer, declare_tools: bool) -> list[int]:
    """Return the tokens of a task's prompt, up to where the model's first turn begins."""
    tools = family.tools if declare_tools else ()
    pieces = [*conversation_pieces(task.prompt, tools), *generation_prompt()]
    return _tokens(pieces, tokenizer)


def _tokens(pieces: list[Piece], tokenizer: Tokenizer) -> list[int]:
    return pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0]


class Episode:
    """A task, its environment and the sequence that acts in it."""

    def __init__(
        self, task: Task, environment: Environment, sequence: Sequence, *, config: RolloutConfig, tokenizer: Tokenizer
    ) -> None:
        """Begin a trajectory; the sequence holds the prompt."""
        self.sequence = sequence
        self._task = task
        self._environment = environment
        self._config = config
        self._tokenizer = tokenizer
        self._turn_start = len(sequence.tokens)
        self._started = time.monotonic()
        self._num_turns = self._num_calls = self._num_errors = self._num_transient = self._num_repeats = 0
        self._last_call = ("", "")
        self._ending: Ending | None = None
        self._grade = Grade(reward=0.0, reason="unfinished")

    @property
    def is_finished(self) -> bool:
        """Whether the trajectory has ended."""
        return self._ending is not None

    def on_token(self) -> None:
        """Look at the token that was just sampled; act when it ends a turn or meets a limit."""
        tokens = self.sequence.tokens
        if tokens[-1] == self._tokenizer.special_ids[IM_END]:
            self._on_turn(tokens[self._turn_start :])
        elif len(tokens) - self._turn_start >= self._config.max_turn_tokens:
            self._end(Ending.turn_too_long)
        elif len(tokens) >= self._config.max_tokens:
            self._end(Ending.max_tokens)

    def _on_turn(self, tokens: list[int]) -> None:
        self._num_turns += 1
        try:
            turn = parse_turn(
                tokens,
                decode=self._tokenizer.decode,
                special_names=self._tokenizer.special_names,
                first_index=self._num_calls,
            )
        except RolloutError as error:
            self._end(Ending.invalid_turn, reason=str(error))
            return
        pieces: list[Piece] = []
        try:
            if not turn.tool_calls:
                self._grade = self._environment.grade(turn.content)
                self._ending = Ending.answered
                return
            for call in turn.tool_calls:
                pieces += message_pieces(self._observe(call))
        except Exception as error:  # the boundary to environments that are not ours: a failed trajectory is data
            _log.warning("an environment failed: %s: %s", type(error).__name__, error)
            self._end(Ending.environment_failed, reason=f"{type(error).__name__}: {error}"[:200])
            return
        self._go_on(_tokens([*pieces, *generation_prompt()], self._tokenizer))

    def _observe(self, call: ToolCall) -> Message:
        try:
            if not call.name:
                raise ToolError(f"{call.id!r} is no id of a call: write functions.NAME:N, the tool's name and a number")
            observation = self._environment.call(call.name, call.arguments)
        except ToolError as error:
            observation = Observation(text=f"error: {error}", is_error=True)
        self._num_calls += 1
        self._num_errors += observation.is_error
        self._num_transient += observation.is_transient
        this_call = (call.name, call.arguments)
        self._num_repeats = self._num_repeats + 1 if this_call == self._last_call else 1
        self._last_call = this_call
        return Message(role=Role.tool, name=call.name, tool_call_id=call.id, content=observation.text)

    def _go_on(self, observation: list[int]) -> None:
        if self._num_turns >= self._config.max_turns:
            self._end(Ending.max_turns)
        elif self._num_repeats >= self._config.max_repeats:
            self._end(Ending.stalled)
        elif len(self.sequence.tokens) + len(observation) >= self._config.max_tokens:
            self._end(Ending.max_tokens)
        elif self._config.max_seconds and time.monotonic() - self._started > self._config.max_seconds:
            self._end(Ending.max_seconds)
        else:
            self.sequence.append(observation)
            self._turn_start = len(self.sequence.tokens)

    def _end(self, ending: Ending, *, reason: str = "") -> None:
        self._ending = ending
        self._grade = Grade(reward=0.0, reason=reason or ending.value)

    def finish(self, *, task: int, sample: int, version: int) -> Trajectory:
        """Close the environment and return the trajectory."""
        self._environment.close()
        assert self._ending is not None
        return Trajectory(
            task=task,
            sample=sample,
            num_calls_needed=self._task.num_calls,
            segments=[
                Segment(
                    tokens=self.sequence.tokens,
                    is_sampled=self.sequence.is_sampled,
                    logprobs=self.sequence.logprobs,
                    versions=[version] * len(self.sequence.tokens),
                    temperature=self.sequence.temperature,
                )
            ],
            grade=self._grade,
            ending=self._ending,
            num_turns=self._num_turns,
            num_calls=self._num_calls,
            num_errors=self._num_errors,
            num_transient_errors=self._num_transient,
        )
