"""One trajectory in progress: passes turns to the environment, and turns observations into tokens to append."""

import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from moetrain.chat.context import NOTE_REQUEST, Context, ContextPolicy
from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import Piece, pieces_to_tokens
from moetrain.chat.tool_schema import declaration
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import RolloutError, described
from moetrain.inference.protocol import Generation, Sequence
from moetrain.inference.sampling import Sampling
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.making import calls_needed
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.rollout.world import EnvironmentClient, EnvironmentFailure
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Grade, InlineTask, Observation, Task, TaskFamily

_log = logging.getLogger(__name__)
_LONGEST_REASON = 200  # characters
_CHARACTERS_PER_TOKEN = 64  # more than any tokenizer has on average


class Episode:
    """A task, its environment and the sequence that acts in it.

    Call `begin` first, and `respond` after each turn of the sequence. After each call, either `is_finished` is True, or
    the caller continues the sequence: `continue_in` passes it to the generation. A new segment has a new `sequence`.
    `given` are the messages that the model reads next.
    """

    def __init__(
        self,
        task: Task,
        *,
        name: str,
        stream: int,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        policy: ContextPolicy | None = None,
    ) -> None:
        """Prepare a trajectory.

        name: for log messages. stream: seeds its sampling, its environment and the lengths of its segments. policy:
        what the model reads of a long trajectory; None is all of it.
        """
        self.observation: list[int] = []
        self.given: list[Message] = []
        self.has_begun = False
        self.is_inline = isinstance(task, InlineTask)
        self._task = task
        self._name = name
        self._config = config
        self._tokenizer = tokenizer
        self._policy = policy or ContextPolicy()
        self._stream = stream
        self._world = EnvironmentClient(task, seed_of(stream, "environment"), config=config)
        self.sequence = self._sequence([], stream=stream)
        self._context: Context | None = None
        self._segments: list[Segment] = []
        self._retired: Sequence | None = None
        self._writes_note = False
        self._turn_start = 0
        self._started = time.monotonic()
        self._num_turns = self._num_calls = self._num_errors = self._num_transient = self._num_repeats = (
            self._num_cut
        ) = 0
        self._last_call = ("", "")
        self._ending: Ending | None = None
        self._progress: float | None = None
        self._has_erred = False
        self._num_calls_needed: int | None = None
        self._grade = Grade(reward=0.0, reason="unfinished")
        self.was_disturbed = False

    def _sequence(self, tokens: list[int], *, stream: int) -> Sequence:
        stop_ids = frozenset({self._tokenizer.special_ids[self._tokenizer.template.syntax.end]})
        sampling = Sampling(temperature=self._config.temperature)
        return Sequence(tokens=tokens, stream=stream, limit=0, stop_ids=stop_ids, sampling=sampling)

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
    def num_segments(self) -> int:
        """Number of segments that have begun."""
        return self._context.num_segments if self._context is not None else 0

    @property
    def limit(self) -> int:
        """Number of tokens of the sequence at which the present turn is cut off."""
        config = self._config
        limit = min(self._turn_start + config.max_turn_tokens, config.max_tokens)
        if config.max_sampled_tokens:
            before = self._num_sampled(self._turn_start)
            limit = min(limit, self._turn_start + max(config.max_sampled_tokens - before, 1))
        if config.max_think_tokens and not self._has_thought():
            return min(limit, self._turn_start + config.max_think_tokens + 2)  # with <think> and </think>
        return limit

    def _has_thought(self) -> bool:
        """Return whether the reasoning of the present turn has ended, or the turn began without reasoning."""
        syntax, ids = self._tokenizer.template.syntax, self._tokenizer.special_ids
        turn = self.sequence.tokens[self._turn_start :]
        is_without = not syntax.always_thinks and bool(turn) and turn[0] != ids[syntax.think_begin]
        return is_without or ids[syntax.think_end] in turn

    def continue_in(self, generation: Generation) -> None:
        """Let the generation continue the sequence. The sequence of an ended segment is removed from it."""
        if self._retired is not None:
            generation.cancel(self._retired)
            self._retired = None
        if self.has_begun:
            generation.extend(self.sequence, self.observation, limit=self.limit)
        else:
            self.has_begun = True
            generation.add(self.sequence)

    def leave(self, generation: Generation) -> None:
        """Remove the sequences of a finished trajectory from the generation."""
        if self._retired is not None:
            generation.cancel(self._retired)
        if self.has_begun:
            generation.cancel(self.sequence)

    async def begin(self, family: TaskFamily, *, declare_tools: bool) -> None:
        """Make the environment, and append the prompt to the sequence."""
        try:
            self._num_calls_needed = await self._world.run(lambda: calls_needed(self._task), "num_calls")
            self._context = await self._world.run(
                lambda: self._new_context(family, declare_tools=declare_tools), "making the prompt"
            )
            prompt = self._context.opening
            if len(prompt) >= self._config.max_tokens:
                reason = f"the prompt has {len(prompt)} tokens, rollout.max_tokens is {self._config.max_tokens}"
                _log.warning("%s: %s", self._name, reason)
                self._end(Ending.prompt_too_long, reason=reason)
            else:
                await self._world.open()
                self._read(prompt)
        except EnvironmentFailure as error:
            self._fail(error)
        if self.is_finished:
            await self.close()

    def _new_context(self, family: TaskFamily, *, declare_tools: bool) -> Context:
        try:
            prompt = self._task.prompt
            if not prompt:
                raise EnvironmentFailure("the prompt of the task is empty: return at least one message")
            return Context(
                self._policy,
                prompt,
                template=self._tokenizer.template,
                declaration=declaration(family.tools) if declare_tools else "",
                stream=self._stream,
                tokenize=self._tokenize,
            )
        except EnvironmentFailure:
            raise
        except (Exception, SystemExit) as error:  # a plugin's code may raise anything
            raise EnvironmentFailure(f"making the prompt: {described(error)}") from error

    def _tokenize(self, pieces: Iterable[Piece]) -> list[int]:
        return pieces_to_tokens([*pieces], encode=self._tokenizer.encode, special_ids=self._tokenizer.special_ids)[0]

    def _read(self, tokens: list[int]) -> None:
        """Let the new sequence begin with `tokens`."""
        self.sequence.tokens += tokens
        self._turn_start = len(tokens)
        self.sequence.limit = self.limit

    async def respond(self) -> None:
        """Process the turn that has ended: carry out its calls, grade its answer, or end the trajectory at a limit."""
        tokens = self.sequence.tokens
        if tokens[-1] in self.sequence.stop_ids:
            try:
                await self._on_stop(tokens[self._turn_start :])
            except EnvironmentFailure as error:
                self._fail(error)
        elif len(tokens) - self._turn_start >= self._config.max_turn_tokens:
            self._end(Ending.turn_too_long)
        elif self._has_sampled_enough():
            self._end(Ending.max_sampled_tokens)
        elif len(tokens) < self.limit:  # the reasoning has ended, within its own limit
            self.observation, self.given = [], []
        elif self._config.max_think_tokens and not self._has_thought():
            self._end(Ending.thought_too_long)
        else:
            self._end(Ending.max_tokens)
        if self.is_finished:
            await self.close()

    async def _on_stop(self, tokens: list[int]) -> None:
        assert self._context is not None
        try:
            turn = self._tokenizer.template.parse_turn(
                tokens,
                decode=self._tokenizer.decode,
                special_names=self._tokenizer.special_names,
                first_index=self._context.next_call,
            )
            if self._writes_note and turn.tool_calls:
                raise RolloutError("a note calls a tool")
        except RolloutError as error:
            self._end(Ending.invalid_turn, reason=str(error))
            return
        if self._writes_note:
            self._begin_segment(turn.content)
        else:
            await self._on_turn(turn, tokens)

    async def _on_turn(self, turn: Message, tokens: list[int]) -> None:
        assert self._context is not None
        self._num_turns += 1
        if not turn.tool_calls:
            self._grade = await self._world.grade(turn.content)
            self._ending = Ending.answered
            return
        results = [self._capped(await self._observe(call)) for call in turn.tool_calls]
        self.given = results
        after = self._context.add(tokens, results, num_calls=len(turn.tool_calls))
        self._continue(after)

    async def _observe(self, call: ToolCall) -> Message:
        if call.name:
            observation = await self._world.call(call.name, call.arguments)
        else:
            observation = Observation(text=self._tokenizer.template.complaint(call), is_error=True)
        self._num_calls += 1
        self._num_errors += observation.is_error
        self._num_transient += observation.is_transient
        this_call = (call.name, call.arguments)
        if this_call != self._last_call:
            self._num_repeats = 0
        self._num_repeats += not observation.is_transient  # a call that may succeed when it is repeated
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

    def _continue(self, after: list[int]) -> None:
        """Continue after a turn's tool results, in this segment or the next. after: tokens of the results."""
        config, context = self._config, self._context
        assert context is not None
        length = len(self.sequence.tokens)
        if self._num_turns >= config.max_turns:
            self._end(Ending.max_turns)
        elif self._has_sampled_enough():
            self._end(Ending.max_sampled_tokens)
        elif self._num_repeats >= config.max_repeats:
            self._end(Ending.stalled)
        elif config.max_seconds and time.monotonic() - self._started > config.max_seconds:
            self._end(Ending.max_seconds)
        elif context.is_full or (context.can_end and length + len(after) > self._longest_context):
            if context.asks_for_note:
                self.given = [*self.given, Message(role=Role.user, content=NOTE_REQUEST)]
                self._extend(context.note_request)
                self._writes_note = True
            else:
                self._begin_segment("")
        else:
            self._extend(after)

    @property
    def _longest_context(self) -> int:
        """Tokens after which a turn, its results and a note might not fit."""
        config = self._config
        return max(config.max_tokens - 2 * config.max_turn_tokens - config.max_output_tokens, 1)

    def _num_sampled(self, end: int | None = None) -> int:
        """Return the number of sampled tokens, in this segment up to position `end`."""
        return sum(segment.num_sampled for segment in self._segments) + sum(self.sequence.is_sampled[:end])

    def _has_sampled_enough(self) -> bool:
        most = self._config.max_sampled_tokens
        return most > 0 and self._num_sampled() >= most

    def _extend(self, observation: list[int]) -> None:
        """Append given tokens to the sequence, if they leave room for a turn."""
        length = len(self.sequence.tokens) + len(observation)
        if length >= self._config.max_tokens:
            self._end(Ending.max_tokens)
        self.observation, self._turn_start = observation, length

    def _begin_segment(self, note: str) -> None:
        assert self._context is not None
        self._writes_note = False
        self._context.begin_next(note, max_tokens=self._longest_context)
        opening = self._context.opening
        if len(opening) >= self._config.max_tokens:
            self._end(Ending.max_tokens)
            return
        self._segments.append(_segment_of(self.sequence))
        self._retired, self.has_begun, self.given = self.sequence, False, []
        stream = seed_of(self._stream, "segment", self._context.num_segments)
        self.sequence = self._sequence([], stream=stream)
        self._read(opening)

    async def close(self) -> None:
        """Close the environment. `begin` and `respond` also close it when the trajectory has ended."""
        try:
            if self.is_finished and self._ending is not Ending.environment_failed:
                self._progress = await self._world.progress()
                self._has_erred = await self._world.has_erred()
        except EnvironmentFailure as error:  # the grade stands
            _log.warning("%s: progress is unknown: %s", self._name, error)
        try:
            await self._world.close()
        except EnvironmentFailure as error:
            self._fail(error)

    def abandon(self, reason: str, is_cause: bool) -> Callable[[], Coroutine[Any, Any, None]]:
        """End the trajectory from another thread than its environment's, and return what closes the environment.

        is_cause: whether its environment is the cause. If not, `was_disturbed` says that it can begin again.
        """
        if not self.is_finished and is_cause:
            self._fail(EnvironmentFailure(reason))
        elif not self.is_finished:
            self.was_disturbed = True
            self._end(Ending.environment_failed, reason="the environment of another task blocked this one")
        return self.close

    def _fail(self, error: EnvironmentFailure) -> None:
        _log.warning("%s: the environment failed: %s", self._name, error)
        self._end(Ending.environment_failed, reason=str(error)[:_LONGEST_REASON])

    def _end(self, ending: Ending, *, reason: str = "") -> None:
        self._ending = ending
        self._grade = Grade(reward=0.0, reason=reason or ending.value)

    def trajectory(self, *, task: int, sample: int, num_replaced: int) -> Trajectory:
        """Return the finished trajectory. num_replaced: number of earlier attempts that it replaces."""
        return Trajectory(
            task=task,
            sample=sample,
            num_calls_needed=self._num_calls_needed,
            segments=[*self._segments, *([_segment_of(self.sequence)] if self.has_begun else [])],
            grade=self._grade,
            ending=self.ending,
            num_turns=self._num_turns,
            num_calls=self._num_calls,
            num_errors=self._num_errors,
            num_transient_errors=self._num_transient,
            num_cut_outputs=self._num_cut,
            progress=self._progress,
            has_erred=self._has_erred,
            num_replaced=num_replaced,
        )


def _segment_of(sequence: Sequence) -> Segment:
    return Segment(
        tokens=sequence.tokens,
        is_sampled=sequence.is_sampled,
        logprobs=sequence.logprobs,
        versions=sequence.versions,
        temperature=sequence.sampling.temperature,
    )
