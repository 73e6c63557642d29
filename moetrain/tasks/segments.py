"""Divides a demonstration into the segments that a context policy makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from moetrain.chat.context import Context, ContextKind, ContextPolicy
from moetrain.chat.messages import Message, Role, call_id
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.tool_schema import ToolSpec, declaration
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError


def segments(
    messages: Sequence[Message],
    *,
    policy: ContextPolicy,
    tools: Sequence[ToolSpec] = (),
    stream: int,
    tokenizer: Tokenizer,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the segments of a demonstration: tokens, and for each whether it is a target.

    A note is the reasoning of the turn that follows it, which must therefore hold all that the turn depends on. Turns
    that a segment takes over from an earlier one are no targets. tools: those to declare. stream: seeds the number of
    calls of each segment. Raises DataError for wrong ids of calls, for a question after the first turn that the policy
    would lose, and for a turn without the reasoning that would be a note.
    """
    tokenize = partial(pieces_to_tokens, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
    template = tokenizer.template
    declared = declaration(tools) if tools else ""
    whole = template.conversation_pieces(messages, declared)
    turns = [place for place, message in enumerate(messages) if message.role is Role.assistant]
    if policy.kind is ContextKind.full or not turns:
        yield tokenize(whole)
        return
    _check_questions(messages[turns[0] :], policy=policy)
    context = Context(
        policy,
        messages[: turns[0]],
        template=template,
        declaration=declared,
        stream=stream,
        tokenize=lambda pieces: tokenize(pieces)[0],
    )
    tokens, is_target = list(context.opening), [False] * len(context.opening)
    for place, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        before = messages[place - 1].role if place else None
        turn = tokenize(template.turn_pieces(_numbered(messages[place], first=context.next_call), before))
        tokens += turn[0]
        is_target += turn[1]
        if following == len(messages):
            break
        given = _renumbered(messages, place, following, first=context.next_call)
        num_calls = len(messages[place].tool_calls)
        after = context.add(turn[0], given, num_calls=num_calls)
        if context.is_full:
            note = messages[following].reasoning
            if context.asks_for_note:
                if not note:
                    raise DataError(
                        "task.context.kind=notes takes the reasoning of a demonstration's turns as notes, and a turn "
                        "has none: let the demonstrator reason, or give another kind"
                    )
                written = tokenize(template.turn_pieces(Message(role=Role.assistant, content=note), Role.user))
                tokens += context.note_request + written[0]
                is_target += [False] * len(context.note_request) + written[1]
            yield tokens, is_target
            context.begin_next(note)
            after, tokens, is_target = context.opening, [], []
        tokens += after
        is_target += [False] * len(after)
    yield tokens, is_target


def _check_questions(messages: Sequence[Message], *, policy: ContextPolicy) -> None:
    if policy.kind is not ContextKind.hide_results and Role.user in {item.role for item in messages}:
        raise DataError(
            f"task.context.kind={policy.kind} keeps the first question only, and a demonstration has a later one: give "
            "full or hide_results"
        )


def _numbered(message: Message, *, first: int) -> Message:
    """Return a turn whose calls are numbered from `first`."""
    calls = [replace(call, id=call_id(call.name, first + place)) for place, call in enumerate(message.tool_calls)]
    return replace(message, tool_calls=calls)


def _renumbered(messages: Sequence[Message], place: int, following: int, *, first: int) -> list[Message]:
    """Return the messages between turn `place` and the turn `following`, with the new ids of the turn's calls."""
    old = [call.id for call in messages[place].tool_calls]
    new = [call.id for call in _numbered(messages[place], first=first).tool_calls]
    ids = dict(zip(old, new, strict=True))
    return [
        replace(message, tool_call_id=ids.get(message.tool_call_id, message.tool_call_id))
        for message in messages[place + 1 : following]
    ]
