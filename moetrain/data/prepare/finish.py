"""Completes a source whose shards are written: repeats, the held-out documents, `documents.bin` and the index.

Does not import torch.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.prepare.repeats import mark_identical, mark_similar
from moetrain.data.prepare.shard import Shard, read_result
from moetrain.data.prepare.similar import NUM_BANDS
from moetrain.data.sources import Choice
from moetrain.data.store.index import DOCUMENTS as DOCUMENTS_FILE
from moetrain.data.store.index import ENDS, SPLIT, Counts, Index, Part, StoredFile, TokenFile, write_index
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import atomic_file, sha256_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the index says about where its documents come from.

    name: the source's in messages, such as `data.sources.web`. inputs: number of files and bytes.
    """

    name: str
    tokenizer: Tokenizer
    source: dict[str, Any]
    fraction: float
    inputs: dict[str, int]


def finish(folder: Path, shards: Sequence[Shard], *, origin: Origin) -> Index:
    """Write what concerns all documents of a source, and at last its index, which is returned."""
    results = [read_result(shard) for shard in shards]
    read = [result.counts for result in results]
    num_unreadable = sum(counts.num_unreadable for counts in read)
    if num_unreadable:
        reason = next(counts.first_unreadable for counts in read if counts.num_unreadable)
        _log.warning("%s: %d unreadable records dropped; the first is %s", origin.name, num_unreadable, reason)
    tables = [np.load(shard.work("-documents.npy"), mmap_mode="r") for shard in shards]
    sizes = [len(table) for table in tables]
    bases = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
    with atomic_file(folder / SPLIT) as scratch:
        if bases[-1] == 0:
            raise DataError(f"{origin.name} has no documents that can be read: give a source that contains text")
        parts = _new_parts(scratch, bases[-1])
        for table, base in zip(tables, bases, strict=False):
            parts[base : base + len(table)][table["is_left_out"]] = Part.left_out
        num_identical = mark_identical(shards, bases=bases[:-1], parts=parts)
        near = any(shard.near_duplicates for shard in shards)
        num_similar = mark_similar(shards, bases=bases[:-1], parts=parts, num_bands=NUM_BANDS) if near else 0
        lone = hold_out(parts, (table["hold_out"] for table in tables), fraction=origin.fraction)
        sums: Counter[str] = Counter()
        for table, base in zip(tables, bases, strict=False):
            sums.update(_sums(table, parts[base : base + len(table)]))
        parts.flush()
    contaminated: Counter[str] = Counter()
    for counts in read:
        contaminated.update(counts.num_contaminated)
    index = write_folder(
        folder,
        files=[result.file for result in results],
        lengths=(table["length"] for table in tables),
        counts=Counts(
            num_read=sum(counts.num_read for counts in read),
            num_unreadable=num_unreadable,
            num_empty=sum(counts.num_empty for counts in read),
            num_identical=num_identical + sum(counts.num_identical for counts in read),
            num_similar=num_similar,
            num_contaminated=dict(contaminated),
            num_long=sum(counts.num_long for counts in read),
            num_left_out=int((parts == Part.left_out).sum()),
            **sums,
        ),
        origin=origin,
        lone=lone,
    )
    return index


def write_folder(
    folder: Path,
    *,
    files: list[TokenFile],
    lengths: Iterator[np.ndarray],
    counts: Counts,
    origin: Origin,
    lone: float | None,
) -> Index:
    """Write `documents.bin` and the index of a folder that has its token files and `split.bin`; return the index.

    lone: see `hold_out`.
    """
    with atomic_file(folder / DOCUMENTS_FILE) as scratch, scratch.open("wb") as file:
        end = 0
        for each in lengths:
            ends = end + np.cumsum(each, dtype=np.int64)
            file.write(ends.astype(ENDS).tobytes())
            end = int(ends[-1]) if len(ends) else end
    index = Index(
        tokenizer=origin.tokenizer.digest,
        vocab_size=origin.tokenizer.vocab_size,
        files=files,
        documents=_stored(folder / DOCUMENTS_FILE),
        split=_stored(folder / SPLIT),
        counts=counts,
        source=origin.source,
        split_rule={"fraction": origin.fraction, "lone": lone, "hash": "blake2b", "salt": Choice.hold_out.value},
        inputs=origin.inputs,
    )
    write_index(folder, index)
    return index


def hold_out(parts: np.ndarray, hashes: Iterator[np.ndarray], *, fraction: float) -> float | None:
    """Mark the documents whose hash is below `fraction` as held out; without one, that of the smallest hash.

    A single document is trained on. parts: uint8, changed in place. hashes: float64, in order, in several arrays.
    Returns the hash of a document that is held out although it is not below `fraction`, else None.
    """
    base = num_kept = num_held_out = smallest = 0
    least = np.inf
    for each in hashes:
        part = parts[base : base + len(each)]
        kept = part != Part.left_out
        part[kept & (each < fraction)] = Part.held_out
        num_kept += int(kept.sum())
        num_held_out += int((part == Part.held_out).sum())
        own = np.where(kept, each, np.inf)
        if len(own) and own.min() < least:
            least, smallest = float(own.min()), base + int(own.argmin())
        base += len(each)
    if num_held_out == 0 and num_kept > 1:
        parts[smallest] = Part.held_out
        return least
    if num_held_out == num_kept == 1:
        parts[smallest] = Part.training
    return None


def _sums(table: np.ndarray, parts: np.ndarray) -> dict[str, int]:
    """Return the counts of a shard's documents that depend on their parts."""
    training, held_out = parts == Part.training, parts == Part.held_out
    return {
        "num_training": int(training.sum()),
        "num_held_out": int(held_out.sum()),
        "num_tokens": int(table["length"][training].sum()),
        "num_tokens_held_out": int(table["length"][held_out].sum()),
        "num_characters": int(table["characters"][training | held_out].sum()),
    }


def _new_parts(path: Path, size: int) -> np.memmap[Any, Any]:
    return np.memmap(path, dtype=np.uint8, mode="w+", shape=(size,))


def _stored(path: Path) -> StoredFile:
    return StoredFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
