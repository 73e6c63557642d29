"""What `moetrain data` shows of a prepared folder: numbers from the index, lengths, and documents. No torch."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from moetrain.chat.pieces import Piece
from moetrain.data.order import Permutation
from moetrain.data.preview import Lengths, SourceSize
from moetrain.data.store.index import DOCUMENTS, ENDS, SPLIT, Index, Part, check_sizes, read_index
from moetrain.data.store.tokens import Maps, TokenStore
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError

_MAX_SAMPLED = 200_000
"""Documents whose lengths are read."""


class PreparedPreview:
    """A prepared folder to look at."""

    def __init__(self, folder: Path, *, tokenizer: Tokenizer) -> None:
        """Open the folder. Raises DataError when a file does not fit, or `tokenizer` is not the one of the folder."""
        self._index: Index = read_index(folder)
        check_sizes(folder, self._index)
        if self._index.tokenizer != tokenizer.digest:
            raise DataError(
                f"{folder} was prepared with another tokenizer than that of data.tokenizer.path: leave the key out, or "
                "prepare again with it"
            )
        self._tokenizer = tokenizer
        self._store = TokenStore(folder, self._index)
        maps = Maps()
        self._ends = maps.array(folder / DOCUMENTS, ENDS)
        self._parts = maps.array(folder / SPLIT, np.dtype("u1"))
        # The permutation spreads the documents that are looked at over the folder.
        sampled = min(len(self._ends), _MAX_SAMPLED)
        chosen = Permutation(len(self._ends), key=0).at(np.arange(sampled)).astype(np.int64)
        self._chosen = chosen[self._parts[chosen] != Part.left_out]

    def size(self) -> SourceSize:
        """Return the numbers of the folder. Lengths and the learned share come from part of the documents if it is
        large.
        """
        counts = self._index.counts
        starts = np.where(self._chosen > 0, self._ends[self._chosen - 1], 0)
        lengths = self._ends[self._chosen] - starts
        order = np.argsort(starts)
        is_first = np.ones(len(order), dtype=np.bool_)
        learned = self._store.num_learned(starts[order], lengths[order], is_first=is_first)
        return SourceSize(
            num_documents=counts.num_training + counts.num_held_out,
            num_duplicates=counts.num_identical + counts.num_similar,
            num_dropped=counts.num_unreadable + counts.num_empty + sum(counts.num_contaminated.values()),
            num_characters=counts.num_characters,
            num_tokens=counts.num_tokens + counts.num_tokens_held_out,
            learned_share=float(learned.sum() / max(1, (lengths - 1).sum())),
            lengths=Lengths.of(lengths) if len(lengths) else None,
            is_sampled=False,
        )

    def documents(self) -> Iterator[list[Piece]]:
        """Yield documents as pieces of text, learned and not; the first piece has the name of a special token."""
        for number in self._chosen.tolist():
            start = int(self._ends[number - 1]) if number else 0
            tokens_N, mask_N = self._store.read(start, int(self._ends[number]) - start)
            mask_N[:1] = False
            pieces: list[Piece] = []
            runs = groupby(zip(tokens_N.tolist(), mask_N.tolist(), strict=True), key=lambda pair: pair[1])
            for is_learned, group in runs:
                text = self._tokenizer.decode([token for token, _ in group])
                pieces.append(Piece(text=text, is_special=not pieces, is_sampled=is_learned))
            yield pieces
