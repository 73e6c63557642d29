"""Demonstrations of a task family as documents to train on."""

from collections.abc import Iterator

from moetrain.chat.messages import Message
from moetrain.chat.template import conversation_pieces, pieces_to_text, pieces_to_tokens
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Split, TaskFamily
from moetrain.tasks.registry import demonstrator_of

RL_FIRST_TASK = 1_000_000
"""Number of the first training task of RL; demonstrations are of tasks below it."""


def dialogues(
    family: TaskFamily, tokenizer: Tokenizer, *, count: int, seed: int, source: str, declare_tools: bool = False
) -> Iterator[TokenizedDocument]:
    """Yield the demonstrator's conversations of training tasks 0 to count - 1; its turns are the targets."""
    tools = family.tools if declare_tools else ()
    for messages in _conversations(family, count=min(count, RL_FIRST_TASK), seed=seed):
        pieces = conversation_pieces(messages, tools)
        tokens, is_target = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
        yield TokenizedDocument(tokens=tokens, loss_mask=is_target, source=source)


def dialogue_texts(family: TaskFamily, *, count: int, seed: int) -> Iterator[str]:
    """Yield the same conversations as text, special tokens spelt out, for training a tokenizer."""
    for messages in _conversations(family, count=count, seed=seed):
        yield pieces_to_text(conversation_pieces(messages))


def _conversations(family: TaskFamily, *, count: int, seed: int) -> Iterator[list[Message]]:
    if not count:
        return
    demonstrator = demonstrator_of(family)
    for index in range(count):
        yield demonstrator.demonstrate(family.task(Split.train, index), seed_of(seed, "demonstration", index))[0]
