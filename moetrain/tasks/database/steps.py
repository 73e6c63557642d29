"""Steps of a question and their phrasings. A step turns the current value into the next by one tool call.

Phrasings of the held-out split are sentences that training never shows, made of words that it does.
"""

import json
import random
from dataclasses import dataclass
from enum import StrEnum

from moetrain.tasks.protocol import Split


class StepKind(StrEnum):
    """What a step does; its value is the name of the tool it calls."""

    get = "get"
    find_row = "find"
    aggregate = "aggregate"
    calculate = "calculate"
    update = "update"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. `column` is read, searched or set; `where` is the aggregate's filter; `op` its function or operator;
    `number` the operand of a calculation; `row` the row that an update sets."""

    kind: StepKind
    table: str = ""
    column: str = ""
    where: str = ""
    op: str = ""
    number: int = 0
    row: str = ""

    def arguments(self, value: str | int) -> str:
        """Return the JSON arguments of the call that this step makes of the current value."""
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


_PHRASES: dict[StepKind, dict[Split, list[str]]] = {
    StepKind.get: {
        Split.train: [
            'get "{column}" from "{table}"',
            'read "{column}" of "{table}"',
            'in "{table}" read its "{column}"',
            'from "{table}" get the "{column}"',
            'look up "{column}" in "{table}"',
        ],
        Split.held_out: [
            'from "{table}" read "{column}"',
            'in "{table}" look up its "{column}"',
            'get the "{column}" of "{table}"',
        ],
    },
    StepKind.find_row: {
        Split.train: [
            'find "{table}" by "{column}"',
            'find the "{table}" with this "{column}"',
            'search "{table}" by "{column}"',
            'in "{table}" find the row with this "{column}"',
            'search for the "{table}" row by its "{column}"',
        ],
        Split.held_out: ['search "{table}" with this "{column}"', 'find the row of "{table}" by its "{column}"'],
    },
    StepKind.aggregate: {
        Split.train: [
            '{op} of "{column}" in "{table}" where "{where}" is this',
            'take the {op} of "{column}" over "{table}" where "{where}" is this',
            'in "{table}" where "{where}" is this, {op} of "{column}"',
            'where "{where}" is this in "{table}", take the {op} of "{column}"',
        ],
        Split.held_out: [
            'over "{table}" where "{where}" is this, take the {op} of "{column}"',
            'where "{where}" is this, {op} of "{column}" in "{table}"',
        ],
    },
    StepKind.update: {
        Split.train: [
            'set "{column}" of "{row}" in "{table}" to it',
            'write it to "{column}" of "{row}" in "{table}"',
            'in "{table}" set the "{column}" of "{row}" to it',
            'save it as "{column}" of "{row}" in "{table}"',
        ],
        Split.held_out: [
            'in "{table}" write it to the "{column}" of "{row}"',
            'save it in "{table}" as "{column}" of "{row}"',
        ],
    },
}
_OPERATOR_PHRASES: dict[str, dict[Split, list[str]]] = {
    "+": {Split.train: ["add {number}", "plus {number}", "add {number} to it"], Split.held_out: ["it plus {number}"]},
    "-": {
        Split.train: ["minus {number}", "take {number} off", "take {number} off it"],
        Split.held_out: ["it minus {number}"],
    },
    "*": {
        Split.train: ["times {number}", "multiply by {number}", "multiply it by {number}"],
        Split.held_out: ["it times {number}"],
    },
}
_OPENINGS: dict[Split, list[str]] = {
    Split.train: ['Start at "{row}".', 'Begin with "{row}".', 'Take the row "{row}".', 'Start with row "{row}".'],
    Split.held_out: ['Begin at row "{row}".', 'Start with the row "{row}".'],
}
_FILLERS = ["", "", "", "then ", "now "]
_CLOSINGS: dict[Split, list[str]] = {
    Split.train: ["Report the result.", "Report the last value.", "Answer with the result.", "Then report it."],
    Split.held_out: ["Answer with the last value.", "Then report the result."],
}


def phrase(step: Step, *, split: Split, stream: random.Random) -> str:
    """Return one phrasing of a step."""
    choices = _OPERATOR_PHRASES[step.op] if step.kind is StepKind.calculate else _PHRASES[step.kind]
    return stream.choice(_FILLERS) + stream.choice(choices[split]).format(**vars(step))


def question(start: str, phrases: list[str], *, split: Split, stream: random.Random) -> str:
    """Return the text of a question: where to start, the numbered steps as phrased, what to report."""
    lines = [stream.choice(_OPENINGS[split]).format(row=start)]
    lines += [f"Step {number}: {text}" for number, text in enumerate(phrases, 1)]
    return "\n".join([*lines, stream.choice(_CLOSINGS[split])])
