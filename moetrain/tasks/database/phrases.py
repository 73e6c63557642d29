"""Writes questions in words. A phrasing is a frame with a word chosen for each slot.

Training and held-out tasks share frames and words, but never the same combination of them.
"""

import functools
import random
from collections.abc import Sequence

from moetrain.tasks.database.steps import Step, StepKind
from moetrain.tasks.phrasing import fill
from moetrain.tasks.protocol import Split

_FRAMES: dict[str, list[str]] = {
    "get": [
        '<then><read> <its>"{column}" <of> "{table}"',
        '<then><of> "{table}" <read> <its>"{column}"',
        '<then>in table "{table}" <read> <its>"{column}"',
        '<then>what is <its>"{column}" <of> "{table}"',
    ],
    "find": [
        '<then><find> <a>"{table}" <by> "{column}"',
        '<then><find> in "{table}" <by> "{column}"',
        '<then><find> the row of "{table}" <by> "{column}"',
        '<then>in "{table}" <find> the row <by> "{column}"',
    ],
    "aggregate": [
        '<then><take>{op} of "{column}" <of> "{table}" where "{where}" is <this>',
        '<then><of> "{table}" where "{where}" is <this>, <take>{op} of "{column}"',
        '<then>where "{where}" is <this>, <take>{op} of "{column}" <of> "{table}"',
    ],
    "update": [
        '<then><write> it <as> "{column}" <of> "{row}" in "{table}"',
        '<then>in "{table}" <write> it <as> "{column}" of "{row}"',
        '<then>in "{table}", for "{row}", <write> it <as> "{column}"',
    ],
    "+": ["<then>add {number}<it>", "<then>plus {number}", "<then><take>it plus {number}", "<then>{number} more"],
    "-": [
        "<then>take {number} off<it>",
        "<then>minus {number}",
        "<then><take>it minus {number}",
        "<then>{number} less",
    ],
    "*": [
        "<then><multiply> {number}",
        "<then>times {number}",
        "<then><take>it times {number}",
        "<then>{number} times it",
    ],
    "opening": [
        '<start> <at> <row>"{row}", step {first}.',
        '<row>"{row}", step {first} is where to <start>.',
    ],
    "closing": ["<then><report> <the> <result>", "<then>what is <the> <result>"],
}
_SLOTS: dict[str, list[str]] = {
    "<then>": ["", "", "then ", "now ", "next "],
    "<read>": ["get", "read", "look up", "fetch", "check", "take"],
    "<its>": ["", "the ", "its "],
    "<of>": ["of", "in", "from", "over"],
    "<find>": ["find", "search", "pick", "look up"],
    "<a>": ["", "the ", "a "],
    "<by>": ["by", "with this", "by its", "with it as"],
    "<take>": ["", "take the ", "give the ", "get the "],
    "<this>": ["this", "it", "that"],
    "<write>": ["write", "save", "put", "store", "set"],
    "<as>": ["as", "to", "into"],
    "<multiply>": ["multiply by", "multiply it by", "multiply this by"],
    "<it>": ["", " to it", " it", " now"],
    "<start>": ["start", "begin", "go"],
    "<at>": ["at", "with", "from"],
    "<row>": ["", "row ", "the row "],
    "<report>": ["report", "answer with", "give", "tell me"],
    "<the>": ["the", "your"],
    "<result>": ["result", "last value", "value"],
}


@functools.cache
def frames(name: str, split: Split) -> list[str]:
    """Return the phrasings of `name` (a tool, an operator, opening or closing) that belong to `split`."""
    return fill(_FRAMES[name], _SLOTS, split=split)


def draw_phrases(steps: Sequence[Step], *, split: Split, stream: random.Random) -> list[str]:
    """Return one phrasing of each step."""
    names = [step.op if step.kind is StepKind.calculate else step.kind.value for step in steps]
    return [stream.choice(frames(name, split)).format(**vars(step)) for name, step in zip(names, steps, strict=True)]


def draw_lines(
    steps: Sequence[Step], *, before: Sequence[Step], after: Sequence[Step], split: Split, stream: random.Random
) -> list[str]:
    """Return the lettered lines of a question: `steps` and what to report, between steps that are not asked for."""
    texts = draw_phrases([*before, *steps], split=split, stream=stream)
    texts.append(stream.choice(frames("closing", split)))
    texts += draw_phrases(after, split=split, stream=stream)
    return [f"Step {letters(number)}: {text}" for number, text in enumerate(texts)]


def letters(number: int) -> str:
    """Return the name of a step, from 0: A to Z, then AA, AB and so on.

    Digits would be ambiguous to a model that finds a line by the tokens of its name: those of "Step 1" begin "Step 12",
    too, and those of "Step 12" end as those of "Step 2" do.
    """
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def question(start: str, lines: Sequence[str], *, first: int, split: Split, stream: random.Random) -> str:
    """Return the text of a question: the row and the step (from 0) where to start, and its lines."""
    opening = stream.choice(frames("opening", split)).format(row=start, first=letters(first))
    return "\n".join([opening[0].upper() + opening[1:], *lines])
