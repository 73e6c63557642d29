"""Marks documents that repeat an earlier one of the source, and chooses the held-out documents. Does not import torch.

Each shard has sorted its keys, so documents with the same key are found range by range of the keys: memory does not
grow with the number of documents, except for those that nearly repeat another one.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moetrain.data.prepare.shard import Shard
from moetrain.data.store.index import Part

_KEYS_AT_ONCE = 1 << 22
_NUM_KEYS = 1 << 64


def mark_identical(shards: Sequence[Shard], *, bases: Sequence[int], parts: np.ndarray) -> int:
    """Mark every document whose text an earlier one has as left out; return their number.

    bases: number of documents before each shard. parts: uint8, `Part` of each document.
    """
    num_marked = 0
    for _, later in _repeats(shards, key=0, bases=bases, parts=parts):
        parts[later] = Part.left_out
        num_marked += len(later)
    return num_marked


def mark_similar(shards: Sequence[Shard], *, bases: Sequence[int], parts: np.ndarray, num_bands: int) -> int:
    """Mark every document as left out that shares a band with an earlier one, directly or through others.

    Of each group of near duplicates the first document is kept. Returns their number.
    """
    parents: dict[int, int] = {}

    def root_of(number: int) -> int:
        while (parent := parents.get(number, number)) != number:
            parents[number] = parents.get(parent, parent)
            number = parent
        return number

    for band in range(num_bands):
        for firsts, later in _repeats(shards, key=1 + band, bases=bases, parts=parts):
            for one, other in zip(firsts.tolist(), later.tolist(), strict=True):
                low, high = sorted((root_of(one), root_of(other)))
                parents[high] = low
    num_marked = 0
    for number in parents:
        if root_of(number) != number:
            parts[number] = Part.left_out
            num_marked += 1
    return num_marked


def _repeats(
    shards: Sequence[Shard], *, key: int, bases: Sequence[int], parts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (number of the first document with a key, number of a later one) for all that share a key.

    Documents that are left out do not count.
    """
    keys = [np.load(shard.work("-keys.npy"), mmap_mode="r")[key] for shard in shards]
    positions = [np.load(shard.work("-positions.npy"), mmap_mode="r")[key] for shard in shards]
    num_ranges = max(1, -(-sum(map(len, keys)) // _KEYS_AT_ONCE))
    bounds = [np.uint64(number * _NUM_KEYS // num_ranges) for number in range(num_ranges)]
    cuts = [np.append(np.searchsorted(each, bounds), len(each)) for each in keys]
    for number in range(num_ranges):
        spans = [slice(cut[number], cut[number + 1]) for cut in cuts]
        found = np.concatenate([each[span] for each, span in zip(keys, spans, strict=True)])
        documents = np.concatenate(
            [base + each[span].astype(np.int64) for each, span, base in zip(positions, spans, bases, strict=True)]
        )
        order = np.lexsort((documents, found))
        order = order[parts[documents[order]] != Part.left_out]
        found, documents = found[order], documents[order]
        is_first = np.append(True, found[1:] != found[:-1])[: len(found)]
        firsts = documents[np.maximum.accumulate(np.where(is_first, np.arange(len(found)), 0))]
        yield firsts[~is_first], documents[~is_first]
