"""Which documents share a row: best fit over lengths, and the counts of packing. Does not import torch."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(kw_only=True)
class PackingCounts:
    """Counts of a source's documents during packing."""

    num_documents: int = 0
    """Documents before packing."""
    num_pieces: int = 0
    """Documents in rows; each part of a split document counts."""
    num_split: int = 0
    """Documents split into parts."""
    num_truncated: int = 0
    """Documents truncated to a row."""
    num_dropped: int = 0
    """Documents dropped because they are longer than a row."""
    num_dropped_untrainable: int = 0
    """Documents, or parts of split ones, dropped because none of their tokens is predicted."""
    num_dropped_unreadable: int = 0
    """Records dropped because their format could not read them (`data.sources.*.unreadable=drop`)."""
    num_tokens: int = 0
    """Tokens in rows, padding excluded."""
    num_targets: int = 0
    """Tokens that are predicted."""
    num_rows: int = 0
    """Rows."""


def best_fit(lengths: Sequence[int], *, seq_len: int) -> list[list[int]]:
    """Return the item numbers of each row. Each item, in order, goes into the fullest row that has room for it.

    Ties go to the older row. An item that fits in no row opens a new one.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for index, length in enumerate(lengths):
        position = bisect.bisect_left(open_rows, (length, -1))
        if position < len(open_rows):
            room, row = open_rows.pop(position)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            bisect.insort(open_rows, (room - length, row))
    return rows
