"""Database tasks by number: names, rows, links, steps and phrasing are a function of (seed, split, index)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.chat.messages import Message, Role
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import DataError
from moetrain.runtime import python_stream
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.demonstrator import PERFECT, demonstrate
from moetrain.tasks.database.environment import DatabaseEnvironment
from moetrain.tasks.database.phrases import draw_lines, question
from moetrain.tasks.database.program import Program, draw_program
from moetrain.tasks.database.schema import Table, draw_tables
from moetrain.tasks.database.steps import Step
from moetrain.tasks.protocol import Grade, InlineTask, Split, Task
from moetrain.tools.sql import SQL_TOOLS


@dataclass(frozen=True, kw_only=True)
class DatabaseTask(InlineTask):
    """One question over one database."""

    tables: dict[str, Table]
    program: Program
    lines: list[str]
    """The lettered lines of the question that are asked for: each step in words, then what to report."""
    text: str
    config: TaskConfig

    @property
    def num_calls(self) -> int:
        """Tool calls of the right solution."""
        return len(self.program.steps)

    @property
    def prompt(self) -> list[Message]:
        """The question."""
        return [Message(role=Role.user, content=self.text)]

    def environment(self, stream: int) -> DatabaseEnvironment:
        """Return an environment with a new database; `stream` seeds its tools' failures."""
        return DatabaseEnvironment(self.tables, self.program, config=self.config, stream=stream)


class DatabaseFamily:
    """All database tasks of one seed."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Store the config and the seed, which determine every task."""
        self._config = config
        self._seed = seed

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The tools get, find, aggregate, calculate and update."""
        return SQL_TOOLS

    @property
    def trained_calls(self) -> tuple[int, int]:
        """Smallest and largest number of calls of the tasks that `task` returns."""
        return self._config.database.min_calls, self._config.database.max_calls

    def task_of_length(self, split: Split, index: int, *, num_calls: int) -> DatabaseTask:
        """Return task `index` among those of `split` that require `num_calls` calls."""
        return self.task(split, index, num_calls=num_calls)

    def task(self, split: Split, index: int, *, num_calls: int | None = None) -> DatabaseTask:
        """Return task `index` of `split`, with `num_calls` calls; None cycles from min_calls to max_calls by index."""
        stream = python_stream(self._seed, f"database/{split.value}", index, num_calls or 0)
        low, high = self.trained_calls
        calls = num_calls or low + index % (high - low + 1)
        tables = draw_tables(stream, split)
        program = draw_program(stream, tables, num_calls=calls)
        num_free = max(0, self._config.database.last_line - 1 - calls)
        num_before = stream.randint(0, num_free)
        num_after = stream.randint(0, num_free - num_before)
        before, after = (_other_steps(stream, tables, num_steps=count) for count in (num_before, num_after))
        lines = draw_lines(program.steps, before=before, after=after, split=split, stream=stream)
        text = question(program.start, lines, first=num_before, split=split, stream=stream)
        asked = lines[num_before : num_before + calls + 1]
        return DatabaseTask(tables=tables, program=program, lines=asked, text=text, config=self._config)

    def demonstrate(self, task: Task, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        """Return the demonstrator's conversation and its grade. perfect: no mistakes, and it retries failed calls."""
        if not isinstance(task, DatabaseTask):
            raise DataError(f"a {type(task).__name__} is not a task of this family: give one that task() returned")
        environment = task.environment(stream)
        messages = demonstrate(
            environment,
            task.program,
            lines=task.lines,
            tables=task.tables,
            mistakes=PERFECT if perfect else self._config.database.demonstrator,
            stream=python_stream(stream, "database/demonstrator"),
        )
        grade = environment.grade(messages[-1].content)
        environment.close()
        return [*task.prompt, *messages], grade


def _other_steps(stream: random.Random, tables: dict[str, Table], *, num_steps: int) -> list[Step]:
    """Return steps that are not asked for: those of another program over the same tables."""
    return draw_program(stream, tables, num_calls=num_steps).steps if num_steps else []
