"""Previews a source before training: its size, and its records as the model reads them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from moetrain.chat.pieces import Piece, pieces_to_text, pieces_to_tokens, with_bos
from moetrain.data.tokenizer import Tokenizer

_COUNTED_CHARACTERS = 500_000
"""Characters of a source that are tokenized to estimate its number of tokens."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of documents: of the middle one, of that at 99 %, and of the longest."""

    median: int
    high: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> "Lengths":
        """Return the figures of at least one length."""
        median, high, longest = np.quantile(np.asarray(lengths), [0.5, 0.99, 1.0], method="inverted_cdf").tolist()
        return cls(median=median, high=high, longest=longest)


@dataclass(frozen=True, kw_only=True)
class SourceSize:
    """Size of a source. If `is_sampled`, it is extrapolated from some of the documents or characters."""

    num_documents: int
    num_duplicates: int
    """Documents left out because they repeat an earlier one; in prepared data, near duplicates too."""
    num_dropped: int
    """Other documents left out: empty or unreadable ones; in prepared data, also those in an evaluation set."""
    num_characters: int
    """Characters of text; special tokens have none."""
    num_tokens: int | None
    """None when there is no tokenizer."""
    learned_share: float
    """Share of the characters that the model learns to predict; in prepared data, share of the tokens after
    the first of a document."""
    lengths: Lengths | None
    """None when there is no tokenizer."""
    is_sampled: bool


def measure(
    documents: Iterable[Iterable[Piece]],
    *,
    num_documents: int,
    tokenizer: Tokenizer | None,
    num_duplicates: int = 0,
    num_dropped: int = 0,
) -> SourceSize:
    """Return the size of a source with `num_documents` documents, measured on `documents`: all or the first of them.

    num_duplicates, num_dropped: see `SourceSize`.
    """
    num_read = num_characters = num_learned = num_counted = 0
    lengths = []
    for document in documents:
        pieces = with_bos(list(document))
        texts = [piece for piece in pieces if not piece.is_special]
        length = len(pieces_to_text(texts))
        num_read += 1
        num_characters += length
        num_learned += sum(len(piece.text) for piece in texts if piece.is_sampled)
        if tokenizer is not None and num_counted < _COUNTED_CHARACTERS:
            num_counted += length
            tokens, _ = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
            lengths.append(len(tokens))
    scale = num_documents / max(1, num_read)
    num_tokens = sum(lengths)
    return SourceSize(
        num_documents=num_documents,
        num_duplicates=num_duplicates,
        num_dropped=num_dropped,
        num_characters=round(num_characters * scale),
        num_tokens=round(num_tokens * scale * num_characters / max(1, num_counted)) if tokenizer is not None else None,
        learned_share=num_learned / max(1, num_characters),
        lengths=Lengths.of(lengths) if lengths else None,
        is_sampled=num_read < num_documents or (tokenizer is not None and num_counted < num_characters),
    )


def spans(pieces: Iterable[Piece], *, max_characters: int) -> list[tuple[str, bool]]:
    """Return a rendered document as spans of (text, whether it is learned), up to `max_characters`.

    Control characters are escaped, so that a terminal does not interpret them.
    """
    found = []
    room = max_characters
    for is_learned, group in groupby(with_bos(list(pieces)), key=lambda piece: piece.is_sampled):
        text = pieces_to_text(list(group))
        if room > 0 and text:
            found.append((_printable(text[:room]), is_learned))
        room -= len(text)
    if room < 0:
        found.append((f" ... {-room} more characters", False))
    return found


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
