"""Five typed tools over one SQLite database: get, find, aggregate, calculate, update.

Names of tables and columns are checked against the database before they are put into SQL, and every statement has a
deadline. Any input gives a result or a ToolError. The tools do not depend on tasks or their right answers.
"""

import ast
import json
import operator
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import ToolError
from moetrain.tools.call import parse_arguments

Value = str | int | float | None

_NAME = {"type": "string"}
_VALUE = {"type": ["string", "number"]}


def _spec(name: str, description: str, **properties: dict[str, Any]) -> ToolSpec:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return ToolSpec(name=name, description=description, parameters=schema)


SQL_TOOLS: tuple[ToolSpec, ...] = (
    _spec("get", "Read one column of the row with this id.", table=_NAME, id=_NAME, column=_NAME),
    _spec(
        "find", "Return the id of the first row whose column has this value.", table=_NAME, column=_NAME, value=_VALUE
    ),
    _spec(
        "aggregate",
        "Count rows, or take sum, max or min of a column, over the rows where another column has this value.",
        op={"enum": ["sum", "max", "min", "count"]},
        table=_NAME,
        column=_NAME,
        where=_NAME,
        value=_VALUE,
    ),
    _spec("calculate", "Evaluate + - * on numbers.", expression=_NAME),
    _spec("update", "Set one column of the row with this id.", table=_NAME, id=_NAME, column=_NAME, value=_VALUE),
)

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_MAX_NUMBER = 10**12
_PROGRESS_INSTRUCTIONS = 1000  # SQLite virtual-machine instructions between two checks of the deadline


class SqlTools:
    """The five tools on one open database connection."""

    def __init__(self, connection: sqlite3.Connection, *, deadline_s: float = 2.0) -> None:
        """Store the connection. deadline_s: time limit of each statement in seconds."""
        self._connection = connection
        self._deadline_s = deadline_s
        self._specs = {spec.name: spec for spec in SQL_TOOLS}
        self._functions: dict[str, Callable[..., Value]] = {
            "get": self._get,
            "find": self._find,
            "aggregate": self._aggregate,
            "calculate": calculate,
            "update": self._update,
        }

    def call(self, name: str, arguments: str) -> str:
        """Return the result as JSON text. Raises ToolError, whose text becomes the observation."""
        if name not in self._specs:
            raise ToolError(f"no tool {name[:40]}")
        values = parse_arguments(self._specs[name], arguments)
        return json.dumps(self._functions[name](**values), ensure_ascii=False)

    def _get(self, table: str, id: str, column: str) -> Value:
        self._check(table, column)
        return self._one(f'SELECT "{column}" FROM "{table}" WHERE id = ?', (id,), missing=f"no row {id} in {table}")

    def _find(self, table: str, column: str, value: Value) -> Value:
        self._check(table, column)
        query = f'SELECT id FROM "{table}" WHERE "{column}" = ? ORDER BY rowid LIMIT 1'
        return self._one(query, (value,), missing=f"no row with {column} {value}")

    def _aggregate(self, op: str, table: str, column: str, where: str, value: Value) -> Value:
        self._check(table, column)
        self._check(table, where)
        query = f'SELECT {op.upper()}("{column}") FROM "{table}" WHERE "{where}" = ?'
        result = self._one(query, (value,), missing=f"no row with {where} {value}")
        if result is None:
            raise ToolError(f"no row with {where} {value}")
        return result

    def _update(self, table: str, id: str, column: str, value: Value) -> Value:
        self._check(table, column)
        if column == "id":
            raise ToolError("an id cannot be changed")
        self._one(f'SELECT id FROM "{table}" WHERE id = ?', (id,), missing=f"no row {id} in {table}")
        self._execute(f'UPDATE "{table}" SET "{column}" = ? WHERE id = ?', (value, id))
        return "ok"

    def _check(self, table: str, column: str) -> None:
        columns = [row[0] for row in self._execute("SELECT name FROM pragma_table_info(?)", (table,))]
        if not columns:
            raise ToolError(f"no table {table[:40]}")
        if column not in columns:
            raise ToolError(f"no column {column[:40]} in {table}")

    def _one(self, query: str, values: tuple[Value, ...], *, missing: str) -> Value:
        rows = self._execute(query, values)
        if not rows:
            raise ToolError(missing)
        value: Value = rows[0][0]
        return value

    def _execute(self, query: str, values: tuple[Value, ...]) -> list[tuple[Any, ...]]:
        stop = time.monotonic() + self._deadline_s
        self._connection.set_progress_handler(lambda: time.monotonic() > stop, _PROGRESS_INSTRUCTIONS)
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ToolError("timeout" if "interrupted" in str(error) else str(error)) from None
        except OverflowError:
            raise ToolError("a number is too large") from None
        finally:
            self._connection.set_progress_handler(None, 0)


def calculate(expression: str) -> int | float:
    """Return the value of an arithmetic expression of numbers, + - * and brackets; nothing else is evaluated."""
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError("not an expression") from None


def _evaluate(node: ast.expr) -> int | float:
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER:
        return value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        result: int | float = _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
        if abs(result) > _MAX_NUMBER:
            raise ToolError("the result is too large")
        return result
    raise ToolError("only numbers with + - * can be calculated")
