"""Writes orders and questions in words. Training and held-out tasks share frames and words, never a combination."""

import functools
import random

from moetrain.tasks.ledger.orders import Order
from moetrain.tasks.phrasing import fill
from moetrain.tasks.protocol import Split

_FRAMES: dict[str, list[str]] = {
    "add": ["<please> <add> {number} <to> {account}", "<now> {account} <gains> {number} <more>"],
    "take": ["<please> <take> {number} <from> {account}", "<now> {account} <loses> {number} <more>"],
    "move": [
        "<please> <move> {number} <from> {account} <to> {other}",
        "<now> <move> {number} <to> {other}, <out> {account}",
    ],
    "copy": [
        "<please> <write> <what> {account} <has> <to> {other}",
        "<now> {other} <takes> <what> {account} <has>",
    ],
    "report": ["<please> <report> <what> {account} <has>", "<end> <report> <what> {account} <has>"],
    "then": ["<then> <go> <at> {next_key}", "<then> <comes> <order> {next_key}"],
    "branch": [
        "<go> <at> {next_key} if even, <at> {else_key} if odd",
        "if even <go> <at> {next_key}, if odd <at> {else_key}",
    ],
    "question": [
        "<start> <with> order {start} and <follow> the <chain> <until> the report.",
        "<follow> the <chain> from order {start} <until> the report.",
        "The <chain> <begins> <with> order {start}. <carry> and report <asked>.",
    ],
}
_SLOTS: dict[str, list[str]] = {
    "<please>": ["", "please", "now", "kindly"],
    "<add>": ["add", "put", "book", "grant"],
    "<to>": ["to", "into", "onto"],
    "<gains>": ["gains", "receives", "grows by", "rises by"],
    "<more>": ["", "more", "in all", "at once"],
    "<take>": ["take", "draw", "remove", "subtract"],
    "<from>": ["from", "out of", "off"],
    "<loses>": ["loses", "shrinks by", "falls by", "drops"],
    "<move>": ["move", "transfer", "shift", "send"],
    "<out>": ["out of", "away from", "at the cost of"],
    "<write>": ["write", "copy", "enter", "note"],
    "<what>": ["the balance", "the amount", "the sum", "the figure"],
    "<has>": ["holds", "has", "shows"],
    "<takes>": ["takes over", "is set to", "becomes", "copies"],
    "<report>": ["report", "answer with", "tell", "state", "say"],
    "<end>": ["at the end", "to finish,", "this is the last order:", "finally"],
    "<then>": ["then", "next", "after that", "afterwards"],
    "<go>": ["go on", "go ahead", "continue", "proceed"],
    "<now>": ["", "now", "today", "here", "again"],
    "<order>": ["", "order", "number", "the order", "the row"],
    "<comes>": ["comes", "follows", "it is the turn of"],
    "<at>": ["at", "with", "to"],
    "<with>": ["at", "with", "from"],
    "<start>": ["start", "begin", "set out"],
    "<follow>": ["follow", "carry out", "work through"],
    "<chain>": ["chain", "chain of orders", "list"],
    "<until>": ["until", "up to", "down to"],
    "<begins>": ["begins", "starts"],
    "<carry>": ["Carry it out", "Do all of it", "Work through it"],
    "<asked>": ["what it asks for", "the balance it asks for"],
}


@functools.cache
def frames(name: str, split: Split) -> list[list[str]]:
    """Return the phrasings of `name` (a kind of order, then, branch or question) that belong to `split`, by frame."""
    return [[" ".join(text.split()) for text in fill([frame], _SLOTS, split=split)] for frame in _FRAMES[name]]


def _drawn(name: str, *, split: Split, stream: random.Random) -> str:
    return stream.choice(stream.choice(frames(name, split)))


def order_text(order: Order, *, split: Split, stream: random.Random) -> str:
    """Return one phrasing of an order."""
    texts = [_drawn(order.kind.value, split=split, stream=stream)]
    if order.next_key:
        texts.append(_drawn("branch" if order.else_key else "then", split=split, stream=stream))
    return ", ".join(texts).format(**_quoted(order))


def _quoted(order: Order) -> dict[str, str]:
    """Return the fields of an order; names and keys in quotes, so that they have the same tokens in text and JSON."""
    return {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in vars(order).items()}


def question(start: str, *, split: Split, stream: random.Random) -> str:
    """Return one phrasing of the question."""
    text = _drawn("question", split=split, stream=stream).format(start=f'"{start}"')
    return text[0].upper() + text[1:]
