"""Writes orders and questions in words. Training and held-out tasks share frames and words, never a combination."""

import functools
import random

from moetrain.tasks.ledger.orders import Order
from moetrain.tasks.phrasing import fill
from moetrain.tasks.protocol import Split

_FRAMES: dict[str, list[str]] = {
    "add": ["<add> {number} <to> {account}", "{account} <gains> {number}"],
    "take": ["<take> {number} <from> {account}", "{account} <loses> {number}"],
    "move": ["<move> {number} <from> {account} <to> {other}", "<from> {account} <to> {other} <move> {number}"],
    "copy": ["<write> the balance of {account} <into> {other}", "{other} <takes> the balance of {account}"],
    "report": ["<report> the balance of {account}", "<report> what {account} <holds>", "the end: <report> {account}"],
    "then": ["<then> go <on> <at> {next_key}", "<then> <at> {next_key}"],
    "branch": [
        "if even <go> <at> {next_key}, if odd <go> <at> {else_key}",
        "<go> <at> {next_key} if even, <at> {else_key} if odd",
    ],
    "question": [
        "<start> <at> order {start} and <follow> the <chain> <until> the report.",
        "<follow> the <chain> from order {start} <until> the report.",
        "The <chain> <begins> <at> order {start}. <carry> and report <what>.",
    ],
}
_SLOTS: dict[str, list[str]] = {
    "<add>": ["add", "put", "book", "pay", "give"],
    "<to>": ["to", "into", "onto"],
    "<gains>": ["gains", "receives", "grows by", "gets"],
    "<take>": ["take", "draw", "remove", "subtract", "book out"],
    "<from>": ["from", "out of", "off"],
    "<loses>": ["loses", "gives up", "shrinks by", "pays out"],
    "<move>": ["move", "transfer", "shift", "send"],
    "<write>": ["write", "copy", "enter", "note"],
    "<into>": ["into", "to", "onto"],
    "<takes>": ["takes over", "is set to", "becomes", "gets"],
    "<report>": ["report", "answer with", "give", "tell", "state", "say"],
    "<holds>": ["holds", "has", "contains"],
    "<then>": ["then", "next", "after that", "afterwards", ""],
    "<go>": ["go on", "go ahead", "continue", "next"],
    "<on>": ["on", "ahead"],
    "<at>": ["at", "with", "to"],
    "<start>": ["start", "begin", "set out"],
    "<follow>": ["follow", "carry out", "work through"],
    "<chain>": ["chain", "chain of orders", "list"],
    "<until>": ["until", "up to", "down to"],
    "<begins>": ["begins", "starts"],
    "<carry>": ["Carry it out", "Do all of it", "Work through it"],
    "<what>": ["what it asks for", "the balance it asks for"],
}


@functools.cache
def frames(name: str, split: Split) -> list[str]:
    """Return the phrasings of `name` (a kind of order, then, branch or question) that belong to `split`."""
    return [" ".join(text.split()) for text in fill(_FRAMES[name], _SLOTS, split=split)]


def order_text(order: Order, *, split: Split, stream: random.Random) -> str:
    """Return one phrasing of an order."""
    texts = [stream.choice(frames(order.kind.value, split))]
    if order.next_key:
        texts.append(stream.choice(frames("branch" if order.else_key else "then", split)))
    return ", ".join(texts).format(**_quoted(order))


def _quoted(order: Order) -> dict[str, str]:
    """Return the fields of an order; names and keys in quotes, so that they have the same tokens in text and JSON."""
    return {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in vars(order).items()}


def question(start: str, *, split: Split, stream: random.Random) -> str:
    """Return one phrasing of the question."""
    text = stream.choice(frames("question", split)).format(start=f'"{start}"')
    return text[0].upper() + text[1:]
