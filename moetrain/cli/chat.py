"""`moetrain chat`."""

import sys
from functools import partial
from typing import TYPE_CHECKING

from moetrain.commands.stage import check_length
from moetrain.commands.weights import ChatRun
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.data.tokenizer import Tokenizer
    from moetrain.inference.protocol import Generation
    from moetrain.terminal.screen import Screen

_MAX_TURNS = 32  # of an agent
_TURNS_PER_CALL = 2  # of a task of a given length


def main(run: ChatRun) -> int:
    """Chat on standard input and output, or let the model act in a task; return the exit code."""
    weights = run.require_weights()
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.inference.engine import GenerationEngine
    from moetrain.inference.speculation import Speculation
    from moetrain.kernels.choice import find_for_generation
    from moetrain.kernels.config import Kernels
    from moetrain.run.trained_context import check_context
    from moetrain.run.weights import generation_model, read_weights, tokenizer_of
    from moetrain.terminal.screen import Screen

    origin = read_weights(weights)
    tokenizer = tokenizer_of(origin)
    tokenizer.check_chat()
    if run.task_index is not None:
        check_context(run.task.context, origin)
    max_tokens = origin.model.max_position_embeddings
    check_length(origin.model, name="max_turn_tokens", length=run.max_turn_tokens)
    library = find_for_generation(Kernels.auto)
    model = generation_model(origin, library=library, speculation=Speculation.auto)
    engine = GenerationEngine(model, num_slots=1, max_tokens=max_tokens, speculation=Speculation.auto)
    for stream in (sys.stdin, sys.stdout):
        if stream is not None:  # as it is when it was closed at the start
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    play = _chat if run.task_index is None else _act
    play(run, engine, tokenizer=tokenizer, screen=Screen(), max_tokens=max_tokens)
    return 0


def _chat(run: ChatRun, generation: "Generation", *, tokenizer: "Tokenizer", screen: "Screen", max_tokens: int) -> None:
    from moetrain.terminal.conversation import Conversation, converse

    conversation = Conversation(
        generation,
        tokenizer=tokenizer,
        screen=screen,
        temperature=run.temperature,
        max_tokens=max_tokens,
        max_turn_tokens=run.max_turn_tokens,
        seed=run.run.seed,
        system=run.system,
    )
    converse(conversation, _read, screen=screen)


def _act(run: ChatRun, generation: "Generation", *, tokenizer: "Tokenizer", screen: "Screen", max_tokens: int) -> None:
    from moetrain.rollout.config import RolloutConfig
    from moetrain.rollout.making import FailedTask, make_task
    from moetrain.runtime import seed_of
    from moetrain.tasks import registry
    from moetrain.tasks.protocol import MakesLongerTasks, Split
    from moetrain.terminal.agent import act

    assert run.task_index is not None
    if run.max_turn_tokens >= max_tokens:
        raise ConfigError(
            f"max_turn_tokens is {run.max_turn_tokens}: give less than {max_tokens}, the model's positions"
        )
    family = registry.build(run.task, run.run.seed)
    if run.num_calls is None:
        make = partial(family.task, Split.held_out, run.task_index)
    elif isinstance(family, MakesLongerTasks):
        make = partial(family.task_of_length, Split.held_out, run.task_index, num_calls=run.num_calls)
    else:
        raise ConfigError(
            f"num_calls is {run.num_calls}: task.name={run.task.name} makes no tasks of a given length; leave "
            "num_calls out"
        )
    config = RolloutConfig(
        num_slots=1,
        max_tokens=max_tokens,
        max_turns=max(_MAX_TURNS, _TURNS_PER_CALL * (run.num_calls or 0)),
        max_turn_tokens=run.max_turn_tokens,
        temperature=run.temperature,
    )
    task = make_task(make, limit_s=config.environment_deadline_s)
    if isinstance(task, FailedTask):
        asked = f"task_index is {run.task_index}" + ("" if run.num_calls is None else f", num_calls is {run.num_calls}")
        raise ConfigError(f"{asked}: task.name={run.task.name} fails: {task.reason}")
    act(
        task,
        family,
        generation=generation,
        tokenizer=tokenizer,
        config=config,
        stream=seed_of(run.run.seed, "chat", run.task_index),
        declare_tools=run.task.declare_tools,
        policy=run.task.context,
        screen=screen,
    )


def _read() -> str | None:
    """Return the next line of standard input, or None at its end. On a terminal it shows a prompt and can be edited."""
    if sys.stdin is None:  # it was closed at the start
        return None
    if sys.stdin.isatty():
        import readline  # noqa: F401  makes `input` editable

        try:
            return input("you> ")
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if isinstance(end, EOFError):
                return None
            raise
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
