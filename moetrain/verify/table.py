"""The rows that every `moetrain verify` makes: a measured value, the bound it must keep, the error for a missed one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moetrain.errors import BoundError
from moetrain.files import write_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One promise, measured."""

    name: str
    """What was compared."""
    value: float
    """What was found; a value that is not a number misses every bound."""
    bound: float
    """The largest value that keeps the promise."""
    note: str = ""
    """Unit, or what the value is made from."""

    @property
    def is_kept(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound


def render(title: str, *, rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table("what", "found", "bound", "", "note", title=title)
    for row in rows:
        table.add_row(row.name, f"{row.value:.6g}", f"{row.bound:.6g}", "ok" if row.is_kept else "MISSED", row.note)
    return table


def write_rows(path: Path, *, rows: Sequence[Row], context: Mapping[str, Any]) -> None:
    """Write the rows and what they were measured on as JSON."""
    content = {**context, "rows": [{**asdict(row), "is_kept": row.is_kept} for row in rows]}
    write_json(path, content)


def check_rows(rows: Sequence[Row]) -> None:
    """Raise BoundError that names every row whose bound was missed."""
    missed = [
        f"{row.name}: {row.value:.6g} where at most {row.bound:.6g} is promised" for row in rows if not row.is_kept
    ]
    if missed:
        raise BoundError("; ".join(missed))
