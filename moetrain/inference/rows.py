"""The tokens of one step of generation, and where their keys and values are.

N rows, each one token of a sequence; S sequences; W pages of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PAGE = 64
"""Positions of a page of the cache; the native kernels know it too."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence: `tokens` at the positions from `start` on. pages: of all its positions."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of all chunks, one after the other.

    tokens_N, positions_N: int64. sequences_N: index of the chunk, int64. tables_SW: pages of each chunk's sequence,
    int64, padded with 0. counts: rows of each chunk. lengths: tokens of each chunk's sequence up to the chunk's end.
    """

    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    sequences_N: torch.Tensor
    tables_SW: torch.Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], *, device: torch.device) -> "Rows":
        """Return the tokens of all chunks, one row per token, in the order of the chunks."""
        width = max(len(chunk.pages) for chunk in chunks)
        tables = [[*chunk.pages, *[0] * (width - len(chunk.pages))] for chunk in chunks]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.start + len(chunk.tokens))]
        sequences = [index for index, chunk in enumerate(chunks) for _ in chunk.tokens]
        return cls(
            tokens_N=torch.tensor(tokens, device=device),
            positions_N=torch.tensor(positions, device=device),
            sequences_N=torch.tensor(sequences, device=device),
            tables_SW=torch.tensor(tables, device=device),
            counts=tuple(len(chunk.tokens) for chunk in chunks),
            lengths=tuple(chunk.start + len(chunk.tokens) for chunk in chunks),
        )
