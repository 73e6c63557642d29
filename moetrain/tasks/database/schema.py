"""A small database as data: tables with text ids, links to other tables, and whole numbers."""

import random
import sqlite3
from dataclasses import dataclass

from moetrain.tasks.names import draw_ids, draw_initials
from moetrain.tasks.protocol import Split

_ROWS = 6
_LINKS = 2
_NUMBERS = 2
_TABLES = 3
_LARGEST = 60


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: `links` maps a column to the table it points to; `rows` are (id, link ids..., numbers...)."""

    name: str
    links: dict[str, str]
    numbers: list[str]
    rows: list[tuple[str | int, ...]]

    @property
    def columns(self) -> list[str]:
        """Column names in order, id first."""
        return ["id", *self.links, *self.numbers]

    @property
    def ids(self) -> list[str]:
        """Row ids in order."""
        return [str(row[0]) for row in self.rows]


def draw_tables(stream: random.Random, split: Split) -> dict[str, Table]:
    """Return a new database of `split`, its names (of different first letters), rows and links drawn from `stream`."""
    names = draw_initials(stream, split=split, count=_TABLES * (1 + _LINKS + _NUMBERS))
    tables = names[:_TABLES]
    columns = iter(names[_TABLES:])
    ids = draw_ids(stream, count=_TABLES * _ROWS)
    ids_of = {table: ids[i * _ROWS : (i + 1) * _ROWS] for i, table in enumerate(tables)}
    drawn: dict[str, Table] = {}
    for table in tables:
        links = {next(columns): stream.choice(tables) for _ in range(_LINKS)}
        numbers = [next(columns) for _ in range(_NUMBERS)]
        rows: list[tuple[str | int, ...]] = [
            (
                row_id,
                *(stream.choice(ids_of[target]) for target in links.values()),
                *(stream.randint(2, _LARGEST) for _ in numbers),
            )
            for row_id in ids_of[table]
        ]
        drawn[table] = Table(name=table, links=links, numbers=numbers, rows=rows)
    return drawn


def open_database(tables: dict[str, Table]) -> sqlite3.Connection:
    """Return a connection to a new SQLite database in memory that contains `tables`."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA journal_mode=OFF")
    for table in tables.values():
        types = ["TEXT PRIMARY KEY", *["TEXT"] * len(table.links), *["INTEGER"] * len(table.numbers)]
        definition = ", ".join(f'"{name}" {kind}' for name, kind in zip(table.columns, types, strict=True))
        connection.execute(f'CREATE TABLE "{table.name}" ({definition})')
        marks = ", ".join("?" * len(table.columns))
        connection.executemany(f'INSERT INTO "{table.name}" VALUES ({marks})', table.rows)
    return connection


def all_rows(connection: sqlite3.Connection) -> dict[str, list[tuple[str | int, ...]]]:
    """Return all rows of all tables, in order, for comparison by the grader."""
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return {name: connection.execute(f'SELECT * FROM "{name}" ORDER BY rowid').fetchall() for name in names}
