"""One trajectory in progress: passes turns to the environment, and turns observations into tokens to append."""

import logging
import time
from dataclasses import replace

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
from moetrain.errors import RolloutError
from moetrain.inference.protocol import Sequence
from moetrain.inference.sampling import Sampling
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.rollout.world import EnvironmentClient, EnvironmentFailure
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import CountsCalls, Grade, InlineTask, Observation, Task, TaskFamily

_log = logging.getLogger(__name__)
_LONGEST_REASON = 200  # characters
_CHARACTERS_PER_TOKEN = 64  # more than any tokenizer has on average


def prompt_tokens(task: Task, family: TaskFamily, *, tokenizer: Tokenizer, declare_tools: bool) -> list[int]:
    """Return the tokens of a task's prompt, which end where the model's first turn begins."""
    tools = family.tools if declare_tools else ()
    pieces = [*conversation_pieces(task.prompt, tools), *generation_prompt()]
    return _tokens(pieces, tokenizer)


def _tokens(pieces: list[Piece], tokenizer: Tokenizer) -> list[int]:
    return pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0]


class Episode:
    """A task, its environment and the sequence that acts in it.

    Call `begin` first, and `respond` after each turn of the sequence. After each call, either `is_finished` is True, or
    the caller continues the sequence: it appends `observation` and generates until there are `limit` tokens. The caller
    sets `has_begun` when it adds the sequence to the generation.
    """

    def __init__(self, task: Task, *, name: str, stream: int, config: RolloutConfig, tokenizer: Tokenizer) -> None:
        """Prepare a trajectory. name: for log messages. stream: seeds its sampling and its environment."""
        self.observation: list[int] = []
        self.has_begun = False
        self.is_inline = isinstance(task, InlineTask)
        self._task = task
        self._name = name
        self._config = config
        self._tokenizer = tokenizer
        self._world = EnvironmentClient(task, seed_of(stream, "environment"), config=config)
        stop_ids = frozenset({tokenizer.special_ids[IM_END]})
        sampling = Sampling(temperature=config.temperature)
        self.sequence = Sequence(tokens=[], stream=stream, limit=0, stop_ids=stop_ids, sampling=sampling)
        self._turn_start = 0
        self._started = time.monotonic()
        self._num_turns = self._num_calls = self._num_errors = self._num_transient = self._num_repeats = (
            self._num_cut
        ) = 0
        self._last_call = ("", "")
        self._ending: Ending | None = None
        self._grade = Grade(reward=0.0, reason="unfinished")

    @property
    def is_finished(self) -> bool:
        """Whether the trajectory has ended."""
        return self._ending is not None

    @property
    def ending(self) -> Ending:
        """How the trajectory ended."""
        assert self._ending is not None
        return self._ending

    @property
    def limit(self) -> int:
        """Number of tokens of the sequence at which the present turn is cut off."""
        return min(self._turn_start + self._config.max_turn_tokens, self._config.max_tokens)

    async def begin(self, family: TaskFamily, *, declare_tools: bool) -> None:
        """Make the environment, and append the prompt to the sequence."""
        try:
            prompt = self._prompt(family, declare_tools=declare_tools)
            if len(prompt) >= self._config.max_tokens:
                reason = f"the prompt has {len(prompt)} tokens, rollout.max_tokens is {self._config.max_tokens}"
                _log.warning("%s: %s", self._name, reason)
                self._end(Ending.prompt_too_long, reason=reason)
            else:
                await self._world.open()
                self.sequence.tokens += prompt
                self._turn_start, self.sequence.limit = len(prompt), len(prompt)
                self.sequence.limit = self.limit
        except EnvironmentFailure as error:
            self._fail(error)
        if self.is_finished:
            await self.close()

    def _prompt(self, family: TaskFamily, *, declare_tools: bool) -> list[int]:
        try:
            return prompt_tokens(self._task, family, tokenizer=self._tokenizer, declare_tools=declare_tools)
        except EnvironmentFailure:
            raise
        except Exception as error:  # a plugin's code may raise anything
            raise EnvironmentFailure(f"making the prompt: {type(error).__name__}: {error}") from error

    async def respond(self) -> None:
        """Process the turn that has ended: carry out its calls, grade its answer, or end the trajectory at a limit."""
        tokens = self.sequence.tokens
        if tokens[-1] in self.sequence.stop_ids:
            try:
                await self._on_turn(tokens[self._turn_start :])
            except EnvironmentFailure as error:
                self._fail(error)
        elif len(tokens) - self._turn_start >= self._config.max_turn_tokens:
            self._end(Ending.turn_too_long)
        else:
            self._end(Ending.max_tokens)
        if self.is_finished:
            await self.close()

    async def _on_turn(self, tokens: list[int]) -> None:
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
        if not turn.tool_calls:
            self._grade = await self._world.grade(turn.content)
            self._ending = Ending.answered
            return
        pieces: list[Piece] = []
        for call in turn.tool_calls:
            pieces += message_pieces(self._capped(await self._observe(call)))
        self._continue(_tokens([*pieces, *generation_prompt()], self._tokenizer))

    async def _observe(self, call: ToolCall) -> Message:
        if call.name:
            observation = await self._world.call(call.name, call.arguments)
        else:
            wanted = "write functions.NAME:N, the tool's name and a number"
            observation = Observation(text=f"error: {call.id!r} is no id of a call: {wanted}", is_error=True)
        self._num_calls += 1
        self._num_errors += observation.is_error
        self._num_transient += observation.is_transient
        this_call = (call.name, call.arguments)
        self._num_repeats = self._num_repeats + 1 if this_call == self._last_call else 1
        self._last_call = this_call
        return Message(role=Role.tool, name=call.name, tool_call_id=call.id, content=observation.text)

    def _capped(self, message: Message) -> Message:
        """Return a tool's message. If it has more than `max_output_tokens`, a note replaces its middle."""
        text, cap = message.content, self._config.max_output_tokens
        if len(text.encode()) <= cap:  # a token has at least one byte
            return message
        longest = cap * _CHARACTERS_PER_TOKEN  # bounds the work for a result of any size
        ends = [text] if len(text) <= 2 * longest else [text[:longest], text[-longest:]]
        tokens = [token for end in ends for token in self._tokenizer.encode(end)]
        if len(ends) == 1 and len(tokens) <= cap:
            return message
        head = self._tokenizer.decode(tokens[: cap - cap // 2])
        tail = self._tokenizer.decode(tokens[len(tokens) - cap // 2 :])
        left_out = len(text) - len(head) - len(tail)
        self._num_cut += 1
        return replace(message, content=f"{head} ... {left_out} characters left out ... {tail}")

    def _continue(self, observation: list[int]) -> None:
        if self._num_turns >= self._config.max_turns:
            self._end(Ending.max_turns)
        elif self._num_repeats >= self._config.max_repeats:
            self._end(Ending.stalled)
        elif len(self.sequence.tokens) + len(observation) >= self._config.max_tokens:
            self._end(Ending.max_tokens)
        elif self._config.max_seconds and time.monotonic() - self._started > self._config.max_seconds:
            self._end(Ending.max_seconds)
        else:
            self.observation = observation
            self._turn_start = len(self.sequence.tokens) + len(observation)

    async def close(self) -> None:
        """Close the environment. `begin` and `respond` also close it when the trajectory has ended."""
        try:
            await self._world.close()
        except EnvironmentFailure as error:
            self._fail(error)

    def _fail(self, error: EnvironmentFailure) -> None:
        _log.warning("%s: the environment failed: %s", self._name, error)
        self._end(Ending.environment_failed, reason=str(error)[:_LONGEST_REASON])

    def _end(self, ending: Ending, *, reason: str = "") -> None:
        self._ending = ending
        self._grade = Grade(reward=0.0, reason=reason or ending.value)

    def trajectory(self, *, task: int, sample: int, num_replaced: int) -> Trajectory:
        """Return the finished trajectory. num_replaced: number of earlier attempts that it replaces."""
        sequence = self.sequence
        segment = Segment(
            tokens=sequence.tokens,
            is_sampled=sequence.is_sampled,
            logprobs=sequence.logprobs,
            versions=sequence.versions,
            temperature=sequence.sampling.temperature,
        )
        return Trajectory(
            task=task,
            sample=sample,
            num_calls_needed=self._task.num_calls if isinstance(self._task, CountsCalls) else None,
            segments=[segment] if self.has_begun else [],
            grade=self._grade,
            ending=self.ending,
            num_turns=self._num_turns,
            num_calls=self._num_calls,
            num_errors=self._num_errors,
            num_transient_errors=self._num_transient,
            num_cut_outputs=self._num_cut,
            num_replaced=num_replaced,
        )
