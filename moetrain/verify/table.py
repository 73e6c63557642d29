"""Result rows of every `moetrain verify` command: a measured value, its upper bound, and the error for a missed one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moetrain.errors import BoundError
from moetrain.files import write_result


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured value with its bound."""

    name: str
    """Name of the measured quantity."""
    value: float
    """Measured value; NaN misses every bound."""
    bound: float
    """Largest allowed value."""
    note: str = ""
    """Unit of the value, or the numbers that it was computed from."""

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
    """Write the rows as JSON, together with `context`, which describes what was measured."""
    content = {**context, "rows": [{**asdict(row), "is_kept": row.is_kept} for row in rows]}
    write_result(path, content)


def check_rows(rows: Sequence[Row]) -> None:
    """Raise `BoundError`, which names every row that misses its bound."""
    missed = [f"{row.name}: {row.value:.6g} is above the bound {row.bound:.6g}" for row in rows if not row.is_kept]
    if missed:
        raise BoundError("; ".join(missed))
