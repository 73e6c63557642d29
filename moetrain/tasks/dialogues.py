"""Turns the demonstrations of a task family into training documents."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Iterator
from typing import Any

from moetrain.chat.context import ContextPolicy
from moetrain.chat.messages import Message
from moetrain.chat.pieces import Piece, pieces_to_text
from moetrain.chat.template import ChatTemplate
from moetrain.chat.tool_schema import declaration
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError, described
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Demonstrates, Grade, Split, TaskFamily
from moetrain.tasks.registry import demonstrator_of
from moetrain.tasks.segments import segments

_log = logging.getLogger(__name__)

RL_FIRST_TASK = 1_000_000
"""Number of RL's first training task; demonstrations use tasks with smaller numbers."""


def demonstration(
    family: Demonstrates, task: Any, *, stream: int, perfect: bool = False
) -> tuple[list[Message], Grade]:
    """Return the demonstrator's conversation and its grade; a coroutine is run to its end.

    Raises TypeError if it returns something else.
    """

    async def awaited(made: Awaitable[tuple[list[Message], Grade]]) -> tuple[list[Message], Grade]:
        return await made

    made = family.demonstrate(task, stream, perfect=perfect)
    found = asyncio.run(awaited(made)) if inspect.isawaitable(made) else made
    if not isinstance(found, tuple) or [type(part) for part in found] != [list, Grade]:
        raise TypeError("demonstrate does not return a list of messages and a Grade")
    return found


def demonstrations(family: TaskFamily, *, count: int, seed: int) -> Iterator[tuple[int, list[Message]]]:
    """Yield (stream, conversation) of the demonstrator on training tasks 0 to count - 1.

    A demonstration that fails is left out and counted in the log. Raises DataError when all of them fail.
    """
    if not count:
        return
    demonstrator = demonstrator_of(family)
    wanted = min(count, RL_FIRST_TASK)
    num_failed, reason = 0, ""
    for index in range(wanted):
        stream = seed_of(seed, "demonstration", index)
        try:
            messages, _ = demonstration(demonstrator, family.task(Split.train, index), stream=stream)
        except Exception as error:  # a plugin's code may raise anything
            num_failed, reason = num_failed + 1, described(error)
            continue
        yield stream, messages
    if num_failed == wanted:
        raise DataError(f"none of the {wanted} demonstrations of {type(family).__name__} could be made: {reason}")
    if num_failed:
        _log.warning("%d of %d demonstrations failed and are left out; last error: %s", num_failed, wanted, reason)


def conversations(
    family: TaskFamily, *, template: ChatTemplate, count: int, seed: int, declare_tools: bool = False
) -> Iterator[list[Piece]]:
    """Yield the same conversations as pieces, each whole."""
    declared = declaration(family.tools) if declare_tools else ""
    for _, messages in demonstrations(family, count=count, seed=seed):
        yield template.conversation_pieces(messages, declared)


def dialogues(
    family: TaskFamily,
    tokenizer: Tokenizer,
    *,
    count: int,
    seed: int,
    source: str,
    declare_tools: bool = False,
    policy: ContextPolicy | None = None,
) -> Iterator[TokenizedDocument]:
    """Yield the segments of the same conversations as tokens; the demonstrator's turns are the targets.

    policy: how conversations are divided into segments; None is one segment.
    """
    tokenizer.check_chat()
    tools = family.tools if declare_tools else ()
    for stream, messages in demonstrations(family, count=count, seed=seed):
        for tokens, is_target in segments(
            messages, policy=policy or ContextPolicy(), tools=tools, stream=stream, tokenizer=tokenizer
        ):
            yield TokenizedDocument(tokens=tokens, loss_mask=is_target, source=source)


def dialogue_texts(
    family: TaskFamily, *, template: ChatTemplate, count: int, seed: int, policy: ContextPolicy | None = None
) -> Iterator[str]:
    """Yield the same conversations as text, with the names of special tokens, for training a tokenizer."""
    yield from map(pieces_to_text, conversations(family, template=template, count=count, seed=seed))
    if policy is not None:
        yield from policy.texts
