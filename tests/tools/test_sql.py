import json
import sqlite3

import pytest

from moetrain.errors import ToolError
from moetrain.tools.sql import SqlTools, calculate


def _tools(**options: float) -> SqlTools:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute('CREATE TABLE "order" (id TEXT PRIMARY KEY, owner TEXT, price INTEGER)')
    connection.executemany('INSERT INTO "order" VALUES (?, ?, ?)', [("a1b", "x", 3), ("c2d", "x", 4), ("e3f", "y", 9)])
    return SqlTools(connection, **options)  # type: ignore[arg-type]


def _call(name: str, **arguments: object) -> str:
    return _tools().call(name, json.dumps(arguments))


def test_the_tools_read_search_and_aggregate() -> None:
    assert _call("get", table="order", id="a1b", column="owner") == '"x"'
    assert _call("find", table="order", column="owner", value="x") == '"a1b"'
    values = {
        op: _call("aggregate", op=op, table="order", column="price", where="owner", value="x")
        for op in ("sum", "max", "min", "count")
    }
    assert values == {"sum": "7", "max": "4", "min": "3", "count": "2"}


def test_an_update_changes_one_row_only() -> None:
    tools = _tools()
    assert tools.call("update", '{"table":"order","id":"c2d","column":"price","value":50}') == '"ok"'
    prices = [
        tools.call("get", json.dumps({"table": "order", "id": i, "column": "price"})) for i in ("a1b", "c2d", "e3f")
    ]
    assert prices == ["3", "50", "9"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("drop", "{}", "no tool drop"),
        ("get", "{", "arguments are not JSON"),
        ("get", '{"table":"order"}', "required property"),
        ("get", '{"table":"order","id":"a1b","id":"a1b","column":"owner"}', "the key 'id' is there twice"),
        ("get", '{"table":"nope","id":"a1b","column":"owner"}', "no table nope"),
        ("get", '{"table":"order","id":"a1b","column":"nope"}', "no column nope in order"),
        ("get", '{"table":"order","id":"zzz","column":"owner"}', "no row zzz in order"),
        ("get", '{"table":"order\\" --","id":"a1b","column":"owner"}', "no table"),
        ("find", '{"table":"order","column":"owner","value":"zzz"}', "no row with owner zzz"),
        ("update", '{"table":"order","id":"a1b","column":"id","value":"new"}', "an id cannot be changed"),
        ("calculate", '{"expression":"__import__(1)"}', "only numbers"),
    ],
)
def test_a_bad_call_is_one_error_that_says_what_is_wrong(name: str, arguments: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        _tools().call(name, arguments)


def test_calculations_are_exact_and_bounded() -> None:
    assert calculate("34 + 7 * -2") == 20
    with pytest.raises(ToolError, match="too large"):
        calculate("999999999999 * 999999999999")
    with pytest.raises(ToolError, match="only numbers with"):
        calculate("True + 1")


def test_a_statement_that_takes_too_long_is_stopped() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE big (id TEXT, n INTEGER)")
    connection.executemany("INSERT INTO big VALUES (?, ?)", ((str(i), i) for i in range(100_000)))
    arguments = '{"op":"sum","table":"big","column":"n","where":"n","value":1}'
    with pytest.raises(ToolError, match="timeout"):
        SqlTools(connection, deadline_s=-1.0).call("aggregate", arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"value": 10**30},
        {"value": -(10**30)},
        {"table": "\ud83d"},
        {"column": "\ud83d"},
        {"id": "\x00"},
        {"table": 'x" --'},
    ],
)
def test_whatever_a_model_writes_as_arguments_is_an_error_that_it_can_read(change: dict[str, object]) -> None:
    arguments = {"table": "order", "id": "a1b", "column": "price", "value": 1}
    assert _call("update", **arguments) == '"ok"'
    with pytest.raises(ToolError):
        _call("update", **(arguments | change))


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, "9" * 5000, '{"expression": "' + "-" * 5000 + '1"}', ""])
def test_arguments_that_are_too_large_to_read_are_an_error_too(text: str) -> None:
    with pytest.raises(ToolError):
        _tools().call("calculate", text)
