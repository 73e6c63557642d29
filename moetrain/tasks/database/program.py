"""Draws the steps of a question over a database."""

import random
from dataclasses import dataclass

from moetrain.tasks.database.schema import Table
from moetrain.tasks.database.steps import Step, StepKind

_FIND_SHARE = 0.3  # share of hops between rows that follow a link backwards
_ID_ANSWER_SHARE = 0.25  # share of questions whose answer is a row id and not a number
_UPDATE_SHARE = 0.4
_AGGREGATE_SHARE = 0.5
_LARGEST_OPERAND = 9
_AGGREGATES = ["sum", "max", "min", "count"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A question as data: the row id where it starts, and its steps."""

    start: str
    steps: list[Step]


def draw_program(stream: random.Random, tables: dict[str, Table], *, num_calls: int) -> Program:
    """Return a program of exactly `num_calls` steps: hops from row to row, then to a number, arithmetic, an update."""
    num_updates = int(num_calls >= 2 and stream.random() < _UPDATE_SHARE)
    num_left = num_calls - num_updates
    ends_in_number = stream.random() >= _ID_ANSWER_SHARE
    num_calculations = stream.randint(0, min(3, num_left - 1)) if ends_in_number else 0
    num_hops = num_left - num_calculations - int(ends_in_number)
    table = stream.choice(sorted(tables))
    start = row = stream.choice(tables[table].ids)
    steps: list[Step] = []
    for _ in range(num_hops):
        step, table, row = _draw_hop(stream, tables, table=table, row=row)
        steps.append(step)
    if ends_in_number:
        steps.append(_draw_number_step(stream, tables, table=table, row=row))
    for _ in range(num_calculations):
        operand = stream.randint(2, _LARGEST_OPERAND)
        steps.append(Step(kind=StepKind.calculate, op=stream.choice("+-*"), number=operand))
    if num_updates:
        steps.append(_draw_update(stream, tables, sets_number=ends_in_number))
    return Program(start=start, steps=steps)


def _columns_with_link_to(tables: dict[str, Table], row: str) -> list[tuple[str, str]]:
    return [
        (name, column)
        for name, table in sorted(tables.items())
        for position, column in enumerate(table.links, 1)
        if any(values[position] == row for values in table.rows)
    ]


def _draw_hop(stream: random.Random, tables: dict[str, Table], *, table: str, row: str) -> tuple[Step, str, str]:
    link_columns = _columns_with_link_to(tables, row)
    if link_columns and stream.random() < _FIND_SHARE:
        name, column = stream.choice(link_columns)
        position = tables[name].columns.index(column)
        next_row = next(str(values[0]) for values in tables[name].rows if values[position] == row)
        return Step(kind=StepKind.find_row, table=name, column=column), name, next_row
    column = stream.choice(list(tables[table].links))
    values = next(values for values in tables[table].rows if values[0] == row)
    target = str(values[tables[table].columns.index(column)])
    return Step(kind=StepKind.get, table=table, column=column), tables[table].links[column], target


def _draw_number_step(stream: random.Random, tables: dict[str, Table], *, table: str, row: str) -> Step:
    link_columns = _columns_with_link_to(tables, row)
    if link_columns and stream.random() < _AGGREGATE_SHARE:
        name, where = stream.choice(link_columns)
        return Step(
            kind=StepKind.aggregate,
            op=stream.choice(_AGGREGATES),
            table=name,
            column=stream.choice(tables[name].numbers),
            where=where,
        )
    return Step(kind=StepKind.get, table=table, column=stream.choice(tables[table].numbers))


def _draw_update(stream: random.Random, tables: dict[str, Table], *, sets_number: bool) -> Step:
    table = tables[stream.choice(sorted(tables))]
    column = stream.choice(table.numbers if sets_number else list(table.links))
    return Step(kind=StepKind.update, table=table.name, column=column, row=stream.choice(table.ids))
