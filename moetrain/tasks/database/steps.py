"""Steps of a question as data. A step computes the next value from the current one with one tool call."""

import json
from dataclasses import dataclass
from enum import StrEnum


class StepKind(StrEnum):
    """What a step does. The value is the name of the tool that it calls."""

    get = "get"
    find_row = "find"
    aggregate = "aggregate"
    calculate = "calculate"
    update = "update"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. Fields that its kind does not use are empty.

    column: column to read, search or set. where: column that filters an aggregate. op: function of an aggregate, or
    operator of a calculation. number: operand of a calculation. row: id of the row that an update sets.
    """

    kind: StepKind
    table: str = ""
    column: str = ""
    where: str = ""
    op: str = ""
    number: int = 0
    row: str = ""

    def arguments(self, value: str | int) -> str:
        """Return the JSON arguments of this step's tool call for the current value."""
        match self.kind:
            case StepKind.get:
                fields: dict[str, str | int] = {"table": self.table, "id": value, "column": self.column}
            case StepKind.find_row:
                fields = {"table": self.table, "column": self.column, "value": value}
            case StepKind.aggregate:
                fields = {
                    "op": self.op,
                    "table": self.table,
                    "column": self.column,
                    "where": self.where,
                    "value": value,
                }
            case StepKind.calculate:
                fields = {"expression": f"{value} {self.op} {self.number}"}
            case StepKind.update:
                fields = {"table": self.table, "id": self.row, "column": self.column, "value": value}
        return json.dumps(fields, separators=(",", ":"))
