"""Pieces: rendered text in which each part is known to be a special token, given text, or text that the model produces.

Training renders pieces instead of running a Jinja engine, so that text never becomes a special token and the loss mask
is exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

BOS, EOS, PAD, UNK = "[BOS]", "[EOS]", "[PAD]", "[UNK]"
ROLES: tuple[str, ...] = (BOS, EOS, PAD, UNK)
"""Special tokens that every tokenizer may have, under names of its own."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of text or one special token. is_sampled: whether the model produces it; otherwise it is given."""

    text: str
    is_special: bool = False
    is_sampled: bool = False


def special(token: str) -> Piece:
    """Return a special token that is given."""
    return Piece(text=token, is_special=True)


def sampled(pieces: Sequence[Piece], *, is_sampled: bool) -> list[Piece]:
    """Return the pieces that are not empty, marked as produced by the model or as given."""
    return [replace(piece, is_sampled=is_sampled) for piece in pieces if piece.text]


def with_bos(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of a document with `[BOS]` in front, unless they already begin with a special token."""
    if pieces and pieces[0].is_special:
        return list(pieces)
    return [special(BOS), *pieces]


def pieces_to_text(pieces: Sequence[Piece]) -> str:
    """Return the text of `pieces`, with the names of special tokens."""
    return "".join(piece.text for piece in pieces)


def pieces_to_tokens(
    pieces: Sequence[Piece], *, encode: Callable[[str], list[int]], special_ids: Mapping[str, int]
) -> tuple[list[int], list[bool]]:
    """Return token ids and, for each id, whether the model produces it. Text never becomes a special token."""
    tokens: list[int] = []
    is_sampled: list[bool] = []
    for piece in pieces:
        ids = [special_ids[piece.text]] if piece.is_special else encode(piece.text)
        tokens += ids
        is_sampled += [piece.is_sampled] * len(ids)
    return tokens, is_sampled
