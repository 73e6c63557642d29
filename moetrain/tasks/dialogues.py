"""Demonstrations of a task family as documents to train on."""

from collections.abc import Iterator

from moetrain.chat.template import Piece, conversation_pieces, pieces_to_text, pieces_to_tokens
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Split, TaskFamily
from moetrain.tasks.registry import demonstrator_of

RL_FIRST_TASK = 1_000_000
"""Number of the first training task of RL; demonstrations are of tasks below it."""


def conversations(family: TaskFamily, *, count: int, seed: int, declare_tools: bool = False) -> Iterator[list[Piece]]:
    """Yield the demonstrator's conversations of training tasks 0 to count - 1 as pieces."""
    if not count:
        return
    tools = family.tools if declare_tools else ()
    demonstrator = demonstrator_of(family)
    for index in range(min(count, RL_FIRST_TASK)):
        stream = seed_of(seed, "demonstration", index)
        yield conversation_pieces(demonstrator.demonstrate(family.task(Split.train, index), stream)[0], tools)


def dialogues(
    family: TaskFamily, tokenizer: Tokenizer, *, count: int, seed: int, source: str, declare_tools: bool = False
) -> Iterator[TokenizedDocument]:
    """Yield the same conversations as tokens; the demonstrator's turns are the targets."""
    tokenizer.check_chat()
    for pieces in conversations(family, count=count, seed=seed, declare_tools=declare_tools):
        tokens, is_target = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
        yield TokenizedDocument(tokens=tokens, loss_mask=is_target, source=source)


def dialogue_texts(family: TaskFamily, *, count: int, seed: int) -> Iterator[str]:
    """Yield the same conversations as text, special tokens spelt out, for training a tokenizer."""
    yield from map(pieces_to_text, conversations(family, count=count, seed=seed))
