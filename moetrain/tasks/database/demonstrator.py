"""The demonstrator: carries out a program call by call, with mistakes at the probabilities of its config.

Before each call its reasoning is the present value and the line of the question that comes next, word for word:

    "k3f"
    Step D: take its "frump" in "toath"

A repeated call begins with `retry`. The next reasoning is a function of the last one and the last result, so that a
model can go on from a note of it alone. Everything that a call needs is in the reasoning right before it. The answer is
the last line of the question.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.tasks.config import DemonstratorConfig
from moetrain.tasks.database.environment import DatabaseEnvironment
from moetrain.tasks.database.program import Program
from moetrain.tasks.database.schema import Table
from moetrain.tasks.database.steps import Step, StepKind

_MAX_ATTEMPTS = 6  # per step; after them it reports its present value
PERFECT = DemonstratorConfig(stop_early=0, skip_step=0, wrong_name=0, unknown_name=0, retry=1)


def demonstrate(
    environment: DatabaseEnvironment,
    program: Program,
    *,
    lines: Sequence[str],
    tables: dict[str, Table],
    mistakes: DemonstratorConfig,
    stream: random.Random,
) -> list[Message]:
    """Return the demonstrator's turns and the tools' results, up to its final answer."""
    messages: list[Message] = []
    value: str | int = program.start
    for step, line in zip(program.steps, lines, strict=False):
        if stream.random() < mistakes.stop_early:
            break
        if stream.random() < mistakes.skip_step:
            continue
        result = _attempts(
            environment,
            step,
            value,
            thought=_thought(value, line),
            tables=tables,
            mistakes=mistakes,
            stream=stream,
            messages=messages,
        )
        if result is None:
            break
        value = value if step.kind is StepKind.update else result
    return [*messages, Message(role=Role.assistant, reasoning=_thought(value, lines[-1]), content=json.dumps(value))]


def _thought(value: str | int, line: str) -> str:
    return f"{json.dumps(value)}\n{line}"


def _attempts(
    environment: DatabaseEnvironment,
    step: Step,
    value: str | int,
    *,
    thought: str,
    tables: dict[str, Table],
    mistakes: DemonstratorConfig,
    stream: random.Random,
    messages: list[Message],
) -> str | int | None:
    tried = _with_mistake(step, tables=tables, mistakes=mistakes, stream=stream)
    for attempt in range(_MAX_ATTEMPTS if mistakes.retry < 1 else 10**6):
        name = tried.kind.value
        identity = call_id(name, sum(len(message.tool_calls) for message in messages))
        call = ToolCall(name=name, arguments=tried.arguments(value), id=identity)
        reasoning = f"retry {thought}" if attempt else thought
        exists = not tried.column or tried.column in tables[tried.table].columns
        messages.append(Message(role=Role.assistant, reasoning=reasoning, tool_calls=[call], is_learned=exists))
        observation = environment.call(name, call.arguments)
        messages.append(Message(role=Role.tool, name=name, tool_call_id=identity, content=observation.text))
        if not observation.is_error:
            result: str | int = json.loads(observation.text)
            return result
        if stream.random() >= mistakes.retry:
            return None
        tried = step
    return None


def _with_mistake(step: Step, *, tables: dict[str, Table], mistakes: DemonstratorConfig, stream: random.Random) -> Step:
    """Return the step that the first call carries out, which may contain a mistake."""
    draw = stream.random()
    if step.kind is StepKind.calculate or draw >= mistakes.wrong_name + mistakes.unknown_name:
        return step
    columns = tables[step.table].columns
    if draw < mistakes.wrong_name:
        return replace(step, column=stream.choice([name for name in columns[1:] if name != step.column]))
    misspelt = [step.column[:cut] + step.column[cut + 1 :] for cut in range(len(step.column))]
    return replace(step, column=stream.choice([name for name in misspelt if name not in columns]))
