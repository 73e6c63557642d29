"""A generation that says what a script tells it, and tasks whose environments are as slow or broken as a test asks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.chat.tool_schema import ToolSpec
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.inference.protocol import Model
from moetrain.inference.protocol import Sequence as TokenSequence
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.types import Trajectory
from moetrain.tasks.protocol import Environment, Grade, Observation, Split, Task

CALL = Message(
    role=Role.assistant,
    reasoning="look",
    tool_calls=[ToolCall(name="look", arguments='{"at":1}', id="functions.look:0")],
)
ANSWER = Message(role=Role.assistant, reasoning="done", content="yes")


class ScriptedGeneration:
    """Says `script(turn)` as turn `turn` of every sequence, one turn per step."""

    def __init__(self, script: Callable[[int], Message], tokenizer: Tokenizer) -> None:
        self._script = script
        self._tokenizer = tokenizer
        self._turns: dict[TokenSequence, int] = {}
        self.steps: list[int] = []
        """How many sequences each step continued."""

    @property
    def is_busy(self) -> bool:
        return any(not sequence.is_idle for sequence in self._turns)

    def add(self, sequence: TokenSequence) -> None:
        sequence.give([], version=0)
        self._turns[sequence] = 0

    def extend(self, sequence: TokenSequence, tokens: list[int], *, limit: int) -> None:
        sequence.give(tokens, version=0)
        sequence.limit, sequence.is_idle = limit, False

    def step(self) -> list[TokenSequence]:
        running = [sequence for sequence in self._turns if not sequence.is_idle]
        self.steps.append(len(running))
        for sequence in running:
            after = Role.tool if self._turns[sequence] else Role.user
            pieces = self._tokenizer.template.turn_pieces(self._script(self._turns[sequence]), after)
            self._turns[sequence] += 1
            for token in pieces_to_tokens(
                pieces, encode=self._tokenizer.encode, special_ids=self._tokenizer.special_ids
            )[0]:
                if not sequence.is_idle:
                    sequence.take(token, logprob=-1.0, version=0)
        return running

    def cancel(self, sequence: TokenSequence) -> None:
        del self._turns[sequence]

    def load(self, model: Model, *, version: int) -> None:
        raise NotImplementedError("a script has no weights")


class World:
    """An environment that sees one thing and takes any answer."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.is_closed = False

    def call(self, name: str, arguments: str) -> Observation:
        return Observation(text="a stone")

    def grade(self, answer: str) -> Grade:
        return Grade(reward=1.0, reason="right")

    def close(self) -> None:
        self.is_closed = True


class SlowWorld(World):
    """A tool that takes its time, as a plain function."""

    def call(self, name: str, arguments: str) -> Observation:
        time.sleep(0.2)
        return super().call(name, arguments)


@dataclass(frozen=True, kw_only=True)
class WorldTask:
    make: Callable[[int], Environment]
    text: str = "what is there?"
    made: list[Environment] = field(default_factory=list)

    @property
    def prompt(self) -> list[Message]:
        return [Message(role=Role.user, content=self.text)]

    def environment(self, stream: int) -> Environment:
        environment = self.make(stream)
        self.made.append(environment)
        return environment


class WorldFamily:
    """Tasks and a grader, and nothing else."""

    def __init__(self, make: Callable[[int], Environment]) -> None:
        self.make = make

    @property
    def tools(self) -> Sequence[ToolSpec]:
        return ()

    def task(self, split: Split, index: int) -> WorldTask:
        return WorldTask(make=self.make)


def words_tokenizer() -> Tokenizer:
    texts = ["step retry table column value functions get find 0123456789 letters and words " * 3] * 4
    return train_tokenizer(texts, vocab_size=len(KIMI_K2.special_tokens) + 256 + 10)


def script_of(*turns: Message) -> Callable[[int], Message]:
    """Return a script of these turns, the last one over and over."""
    return lambda turn: turns[min(turn, len(turns) - 1)]


def play(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    *,
    script: Callable[[int], Message] | None = None,
    generation: ScriptedGeneration | None = None,
    **limits: float,
) -> list[Trajectory]:
    """Return one trajectory per task."""
    config = RolloutConfig(**{"max_tokens": 4000, "max_turn_tokens": 500, **limits})  # type: ignore[arg-type]
    requests = [
        RolloutRequest(task_index=index, task=task, sample=0, stream=index + 1) for index, task in enumerate(tasks)
    ]
    return collect(
        requests,
        generation=generation or ScriptedGeneration(script or script_of(CALL, ANSWER), tokenizer),
        family=WorldFamily(World),
        tokenizer=tokenizer,
        config=config,
    )
