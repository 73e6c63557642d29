"""The packing plan of a prepared folder: which pieces of documents make up each row. Does not import torch.

A plan needs the documents' lengths only. `rows-LENGTH.bin` holds, as int64, the number of the first piece of each row
and, at the end, the number of all pieces. `pieces-LENGTH.bin` holds for each piece its start (int64, over all token
files) and its length in the row (int32), 12 bytes together. A negative length marks the continuation of a split
document: the row begins this piece with `[BOS]`, which is not in the token file. `plan-LENGTH.json` is written last.

Documents are packed by best fit in windows of 50,000, so memory does not grow with the folder.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moetrain.data.config import Overlong
from moetrain.data.fit import PackingCounts, best_fit
from moetrain.data.order import ORDER_VERSION
from moetrain.data.store.index import DOCUMENTS, ENDS, SPLIT, Index, Part, index_digest
from moetrain.data.store.tokens import Maps, TokenStore
from moetrain.errors import DataError
from moetrain.files import atomic_file, read_json_or_empty, sha256_of, write_json

_log = logging.getLogger(__name__)

_WINDOW = 50_000
"""Documents that are packed together."""
ROWS = np.dtype("<i8")
PIECES = np.dtype([("start", "<i8"), ("length", "<i4")])


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """seq_len: tokens per row. overlong: policy for documents longer than a row. part: documents to pack."""

    seq_len: int
    overlong: Overlong
    part: Part = Part.training

    @property
    def name(self) -> str:
        """Return the part of the file names that tells plans apart."""
        policy = [] if self.overlong is Overlong.split else [self.overlong.value]
        part = [] if self.part is Part.training else [self.part.name]
        return "-".join([str(self.seq_len), *policy, *part])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan on disk, with its counts. described: its JSON file; when it is removed, a new plan is made."""

    described: Path
    rows: Path
    pieces: Path
    counts: PackingCounts


def plan_of(folder: Path, index: Index, *, request: PlanRequest) -> Plan:
    """Return the plan of a folder; it is written if it is not there yet.

    Raises DataError when the plan does not fit its files, or cannot be written.
    """
    described = folder / f"plan-{request.name}.json"
    rows, pieces = folder / f"rows-{request.name}.bin", folder / f"pieces-{request.name}.bin"
    made_of = {"version": ORDER_VERSION, "index": index_digest(folder), "window": _WINDOW}
    known = read_json_or_empty(described)
    counts = _counts_in(known)
    if counts is None or {key: known.get(key) for key in made_of} != made_of:
        started = time.monotonic()
        try:
            counts = _write(folder, index, request=request, rows=rows, pieces=pieces)
            digests = {path.name: sha256_of(path) for path in (rows, pieces)}
            write_json(described, {**made_of, "counts": asdict(counts), "sha256": digests})
        except OSError as error:
            raise DataError(
                f"the packing plan of {folder} for rows of {request.seq_len} tokens cannot be written: {error}; "
                f"prepare the folder with data.seq_len={request.seq_len}, or make it writable"
            ) from error
        seconds = time.monotonic() - started
        _log.info("%s: %d rows of %d tokens planned in %.1f s", folder, counts.num_rows, request.seq_len, seconds)
    for path, size in (
        (rows, (counts.num_rows + 1) * ROWS.itemsize),
        (pieces, counts.num_pieces * PIECES.itemsize),
    ):
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} does not have the {size} bytes of its plan: {cure(described)}")
    return Plan(described=described, rows=rows, pieces=pieces, counts=counts)


def check_plans(folder: Path) -> None:
    """Read the files of all plans of a folder; raise DataError that names the first that was changed."""
    for described in sorted(folder.glob("plan-*.json")):
        stated = read_json_or_empty(described).get("sha256")
        for name, digest in stated.items() if isinstance(stated, dict) else ():
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise DataError(f"{folder / name} has other content than {described.name} states: {cure(described)}")


def cure(described: Path) -> str:
    """Return what to do about a damaged plan."""
    return f"remove {described}, and a new plan is made"


def _counts_in(described: Mapping[str, Any]) -> PackingCounts | None:
    try:
        return PackingCounts(**described["counts"])
    except (KeyError, TypeError):  # damaged: it is planned anew
        return None


def _write(folder: Path, index: Index, *, request: PlanRequest, rows: Path, pieces: Path) -> PackingCounts:
    counts = PackingCounts()
    store = TokenStore(folder, index)
    with ExitStack() as stack:  # it closes the files before they get their names
        scratch = [stack.enter_context(atomic_file(path)) for path in (pieces, rows)]
        pieces_file, rows_file = [stack.enter_context(path.open("wb")) for path in scratch]
        for starts, lengths in _windows(folder, index, part=request.part):
            files = [rows_file, pieces_file]
            _pack_window(starts, lengths, request=request, store=store, counts=counts, files=files)
            store.maps.release()
        rows_file.write(np.array([counts.num_pieces], dtype=ROWS).tobytes())
    return counts


def _windows(folder: Path, index: Index, *, part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the starts and lengths of the documents of a part, from windows of the folder's documents."""
    maps = Maps()
    ends, parts = maps.array(folder / DOCUMENTS, ENDS), maps.array(folder / SPLIT, np.dtype("u1"))
    for begin in range(0, len(ends), _WINDOW):
        window = np.asarray(ends[begin : begin + _WINDOW])
        starts = np.concatenate((ends[begin - 1 : begin] if begin else np.zeros(1, dtype=np.int64), window[:-1]))
        chosen = parts[begin : begin + _WINDOW] == part
        yield starts[chosen], (window - starts)[chosen]
        maps.release()


def _pack_window(
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    request: PlanRequest,
    store: TokenStore,
    counts: PackingCounts,
    files: Sequence[BinaryIO],
) -> None:
    counts.num_documents += len(starts)
    is_long = lengths > request.seq_len
    if request.overlong is Overlong.drop:
        counts.num_dropped += int(is_long.sum())
        starts, lengths = starts[~is_long], lengths[~is_long]
    elif request.overlong is Overlong.truncate:
        counts.num_truncated += int(is_long.sum())
        lengths = np.minimum(lengths, request.seq_len)
    else:
        counts.num_split += int(is_long.sum())
    starts, lengths, is_first = _split(starts, lengths, seq_len=request.seq_len)
    learned = store.num_learned(starts, lengths, is_first=is_first)
    keeps = learned > 0
    counts.num_dropped_untrainable += int((~keeps).sum())
    starts, lengths, is_first = starts[keeps], lengths[keeps], is_first[keeps]
    in_row = lengths + ~is_first  # with [BOS]
    rows = best_fit(in_row.tolist(), seq_len=request.seq_len)
    firsts = counts.num_pieces + np.cumsum([0, *map(len, rows)], dtype=np.int64)[:-1]
    order = np.array([index for row in rows for index in row], dtype=np.int64)
    pieces = np.empty(len(order), dtype=PIECES)
    pieces["start"], pieces["length"] = starts[order], np.where(is_first, in_row, -in_row)[order]
    files[0].write(firsts.astype(ROWS).tobytes())
    files[1].write(pieces.tobytes())
    counts.num_pieces += len(order)
    counts.num_rows += len(rows)
    counts.num_tokens += int(in_row.sum())
    counts.num_targets += int(learned.sum())


def _split(starts: np.ndarray, lengths: np.ndarray, *, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return start, length and whether it is the first of each piece; only the first has room for `seq_len` tokens."""
    num_pieces = 1 + np.maximum(0, -(-(lengths - seq_len) // (seq_len - 1)))
    document = np.repeat(np.arange(len(starts)), num_pieces)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    is_first = piece == 0
    offset = np.where(is_first, 0, seq_len + (piece - 1) * (seq_len - 1))
    room = np.where(is_first, seq_len, seq_len - 1)
    return starts[document] + offset, np.minimum(room, lengths[document] - offset), is_first
