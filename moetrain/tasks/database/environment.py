"""The environment of one trajectory: a new SQLite database, five tools, and a grader of the final state.

The grader ignores what the model claims to have done. It compares every row of the final database with the rows after
the right solution, and the answer with the right value.
"""

import json
import sqlite3

from moetrain.errors import ToolError
from moetrain.runtime import python_stream
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.program import Program
from moetrain.tasks.database.schema import Table, all_rows, open_database
from moetrain.tasks.database.steps import StepKind
from moetrain.tasks.protocol import Grade, Observation
from moetrain.tools.sql import SqlTools

_FAILURES = ["busy", "timeout"]


class DatabaseEnvironment:
    """The database of one trajectory."""

    def __init__(self, tables: dict[str, Table], program: Program, *, config: TaskConfig, stream: int) -> None:
        """Open a new database; `stream` seeds the failures of its tools."""
        self._tables = tables
        self._program = program
        self._config = config
        self._failures = python_stream(stream, "database/tool_failures")
        self._connection = open_database(tables)
        self._tools = _tools(self._connection, config)

    def call(self, name: str, arguments: str) -> Observation:
        """Carry out one call. A simulated failure of the tool happens before the call has any effect."""
        if self._failures.random() < self._config.tool_failure:
            text = f"error: {self._failures.choice(_FAILURES)}"
            return Observation(text=text, is_error=True, is_transient=True)
        try:
            return Observation(text=self._tools.call(name, arguments))
        except ToolError as error:
            return Observation(text=f"error: {error}", is_error=True)

    def grade(self, answer: str) -> Grade:
        """Compare the final database and the answer with those of the right solution."""
        expected_rows, expected_value = solve(self._tables, self._program, config=self._config)
        rows = all_rows(self._connection)
        if rows != expected_rows:
            untouched = rows == {name: table.rows for name, table in sorted(self._tables.items())}
            return Grade(reward=0.0, reason="unchanged" if untouched else "wrong_rows")
        if _read_answer(answer) != expected_value:
            return Grade(reward=0.0, reason="wrong_answer" if answer.strip() else "no_answer")
        return Grade(reward=1.0, reason="right")

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


def _tools(connection: sqlite3.Connection, config: TaskConfig) -> SqlTools:
    return SqlTools(connection, deadline_s=config.database.deadline_s)


def _read_answer(answer: str) -> str | int | float | None:
    try:
        value = json.loads(answer.strip())
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def solve(
    tables: dict[str, Table], program: Program, *, config: TaskConfig
) -> tuple[dict[str, list[tuple[str | int, ...]]], str | int]:
    """Carry out the right solution on a new database; return all rows after it, and the right answer."""
    connection = open_database(tables)
    tools = _tools(connection, config)
    value: str | int = program.start
    for step in program.steps:
        result = json.loads(tools.call(step.kind.value, step.arguments(value)))
        value = value if step.kind is StepKind.update else result
    rows = all_rows(connection)
    connection.close()
    return rows, value
