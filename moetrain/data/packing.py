"""Packs documents into rows of T tokens with little padding; no document spans two rows.

A document longer than a row is split into several documents, truncated or dropped, according to `Overlong`, and
counted. Rows store documents back to back; tensors are made when a batch is requested. `segments_BT` separates the
documents of a row in loss, attention and positions, so the loss does not depend on which documents share a row.

B rows of a batch, T tokens per row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moetrain.data.batch import TokenBatch
from moetrain.data.config import Overlong
from moetrain.data.fit import PackingCounts, best_fit
from moetrain.runtime import python_stream


@dataclass(kw_only=True)
class TokenizedDocument:
    """One document as tokens. loss_mask: True where the model learns to predict the token. source: its name."""

    tokens: Sequence[int] | np.ndarray
    loss_mask: Sequence[bool] | np.ndarray
    source: str


@dataclass(kw_only=True)
class PackedRows:
    """The rows of one source.

    tokens: int32, all documents back to back, in row order. loss_mask: bool, for each of `tokens`. document_ends:
    int64, end of each document in `tokens`. row_ends: int64, for each row the number of documents in all rows up to and
    including it.
    """

    seq_len: int
    tokens: np.ndarray
    loss_mask: np.ndarray
    document_ends: np.ndarray
    row_ends: np.ndarray
    counts: PackingCounts = field(default_factory=PackingCounts)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_ends)

    def order(self, name: str, *, seed: int, epoch: int) -> Callable[[int], int]:
        """Return the function from a place in pass `epoch` to the row there: a shuffled list."""
        order = list(range(self.num_rows))
        python_stream(seed, f"data/{name}", epoch).shuffle(order)
        return order.__getitem__

    def sample(self, count: int, *, seed: int) -> list[int]:
        """Return the numbers of at most `count` rows, chosen by a shuffled list, sorted."""
        chosen = list(range(self.num_rows))
        python_stream(seed, "data/validation").shuffle(chosen)
        return sorted(chosen[:count])

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens and loss mask of each document."""
        begin = 0
        for end in self.document_ends.tolist():
            yield self.tokens[begin:end], self.loss_mask[begin:end]
            begin = end

    def batch(self, rows: Sequence[int], *, pad_id: int) -> TokenBatch:
        """Return the rows with these numbers as a batch."""
        shape = (len(rows), self.seq_len)
        tokens_BT = np.full(shape, pad_id, dtype=np.int64)
        segments_BT, positions_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        loss_mask_BT = np.zeros(shape, dtype=bool)
        for index, row in enumerate(rows):
            first = int(self.row_ends[row - 1]) if row else 0
            column = 0
            for segment, document in enumerate(range(first, int(self.row_ends[row])), start=1):
                begin = int(self.document_ends[document - 1]) if document else 0
                end = int(self.document_ends[document])
                span = slice(column, column + end - begin)
                tokens_BT[index, span] = self.tokens[begin:end]
                loss_mask_BT[index, span] = self.loss_mask[begin:end]
                segments_BT[index, span] = segment
                positions_BT[index, span] = np.arange(end - begin)
                column += end - begin
        return TokenBatch(
            tokens_BT=torch.from_numpy(tokens_BT),
            segments_BT=torch.from_numpy(segments_BT),
            positions_BT=torch.from_numpy(positions_BT),
            loss_mask_BT=torch.from_numpy(loss_mask_BT),
        )


@dataclass(kw_only=True)
class ValidationRows:
    """Held-out rows of one source.

    num_characters: characters of the predicted tokens' text, without special tokens. Total nats divided by it are nats
    per character, which can be compared between tokenizers.
    """

    batch: TokenBatch
    num_characters: int


def pack(documents: Iterable[TokenizedDocument], *, seq_len: int, overlong: Overlong, bos_id: int) -> PackedRows:
    """Return `documents` packed by best fit: each, in the order given, goes to the row where it leaves the least room.

    The second and later parts of a split document begin with `bos_id`, because continued text has no role marker.
    """
    counts = PackingCounts()
    pieces = [piece for document in documents for piece in _fit_document(document, seq_len, overlong, bos_id, counts)]
    rows = best_fit([len(tokens) for tokens, _ in pieces], seq_len=seq_len)
    order = [index for row in rows for index in row]
    lengths = [len(pieces[index][0]) for index in order]
    packed = PackedRows(
        seq_len=seq_len,
        tokens=_concatenate([pieces[index][0] for index in order], np.int32),
        loss_mask=_concatenate([pieces[index][1] for index in order], np.bool_),
        document_ends=np.cumsum(lengths, dtype=np.int64),
        row_ends=np.cumsum([len(row) for row in rows], dtype=np.int64),
        counts=counts,
    )
    counts.num_pieces, counts.num_rows = len(pieces), len(rows)
    counts.num_tokens, counts.num_targets = len(packed.tokens), int(packed.loss_mask.sum())
    return packed


_Piece = tuple[np.ndarray, np.ndarray]


def _fit_document(
    document: TokenizedDocument, seq_len: int, overlong: Overlong, bos_id: int, counts: PackingCounts
) -> Iterator[_Piece]:
    """Yield the document, or its parts if it is longer than a row; parts without a predicted token are dropped."""
    tokens = np.asarray(document.tokens, dtype=np.int32)
    loss_mask = np.asarray(document.loss_mask, dtype=np.bool_).copy()
    if len(tokens) != len(loss_mask):
        raise ValueError(f"a document of {document.source} has {len(tokens)} tokens and {len(loss_mask)} mask values")
    loss_mask[:1] = False  # nothing precedes the first token
    counts.num_documents += 1
    parts = [(tokens, loss_mask)]
    if len(tokens) > seq_len and overlong is Overlong.drop:
        counts.num_dropped += 1
        return
    if len(tokens) > seq_len and overlong is Overlong.truncate:
        counts.num_truncated += 1
        parts = [(tokens[:seq_len], loss_mask[:seq_len])]
    elif len(tokens) > seq_len:
        counts.num_split += 1
        parts = _split_document(tokens, loss_mask, seq_len, bos_id)
    for part in parts:
        if part[1].any():
            yield part
        else:
            counts.num_dropped_untrainable += 1


def _split_document(tokens: np.ndarray, loss_mask: np.ndarray, seq_len: int, bos_id: int) -> list[_Piece]:
    parts = [(tokens[:seq_len], loss_mask[:seq_len])]
    for begin in range(seq_len, len(tokens), seq_len - 1):
        span = slice(begin, begin + seq_len - 1)
        parts.append((np.concatenate(([bos_id], tokens[span])), np.concatenate(([False], loss_mask[span]))))
    return parts


def _concatenate(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype=dtype)
