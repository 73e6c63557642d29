"""Demonstrations of a task family as documents to train on."""

from collections.abc import Iterator

from moetrain.chat.template import conversation_pieces, pieces_to_text, pieces_to_tokens
from moetrain.data.packing import TokenizedDocument
from moetrain.data.tokenizer import Tokenizer
from moetrain.tasks.protocol import Split, TaskFamily

RL_FIRST_TASK = 1_000_000
"""Number of the first training task of RL; demonstrations are of tasks below it."""


def dialogues(
    family: TaskFamily, tokenizer: Tokenizer, *, count: int, source: str, declare_tools: bool = False
) -> Iterator[TokenizedDocument]:
    """Yield the scripted expert's conversations of training tasks 0 to count - 1, what it says as targets."""
    tokenizer.check_chat()
    tools = family.tools if declare_tools else ()
    for index in range(min(count, RL_FIRST_TASK)):
        messages, _ = family.demonstrate(family.task(Split.train, index), index)
        pieces = conversation_pieces(messages, tools)
        tokens, is_target = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
        yield TokenizedDocument(tokens=tokens, loss_mask=is_target, source=source)


def dialogue_texts(family: TaskFamily, *, count: int) -> Iterator[str]:
    """Yield the same conversations as text, special tokens spelt out, for training a tokenizer."""
    for index in range(count):
        messages, _ = family.demonstrate(family.task(Split.train, index), index)
        yield pieces_to_text(conversation_pieces(messages))
