"""Writing checkpoint folders: every rank writes its own part, then one process completes the folder. No collectives.

The steps are, in this order:

1. the main rank creates `.step_00000100.tmp/`;

2. each rank writes `model-r<rank>-<n>.safetensors` and `optimizer-r<rank>-<n>.safetensors`, syncs them to disk, and
writes `part-r<rank>.json` with its pieces and the size and sha256 of its files;

3. when all parts are there, the main rank writes `state.json` and `index.json` and removes the `part-*` files;

4. the folder is renamed to `step_00000100`;

5. checkpoints that are no longer kept are renamed to `.step_<n>.removed.tmp` and removed.

If a process is killed before step 4, there is no new checkpoint; after it, the checkpoint is complete.
`checkpoint.read.remove_leftovers` removes the rest. All files and folders are synced to disk before the rename.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.checkpoint.read import (
    FORMAT,
    INDEX_FILE,
    OPTIMIZER_PREFIX,
    STATE_FILE,
    Stored,
    canonical_json,
    fingerprint,
    folder_of,
    index_digest,
    read_json,
    steps,
)
from moetrain.errors import CheckpointError
from moetrain.files import replace_folder, sync, write_text
from moetrain.parallel.protocol import Piece

_log = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
_CHUNK_BYTES = 16 << 20  # bytes per write and hash update
_HEADER_ALIGNMENT = 8  # required by safetensors
_DTYPE_NAMES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16", torch.int32: "I32"}


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints to keep: the `newest` ones, and those whose step is a multiple of `every` (0: none)."""

    newest: int
    every: int = 0


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write checkpoint `step` of tensors that are all in this process, keep the newest `keep` ones, and return its
    path.
    """
    pieces = [
        Piece(name=name, shape=tuple(tensor.shape), start=0, values_P=tensor.detach().cpu().reshape(-1))
        for name, tensor in tensors.items()
    ]
    partial = begin(folder, step)
    write_part(partial, pieces, rank=0, shard_bytes=shard_bytes)
    return commit(partial, step, num_parts=1, state=state, retention=Retention(newest=keep))


def begin(folder: Path, step: int) -> Path:
    """Create the empty folder into which checkpoint `step` is written, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{folder_of(folder, step).name}.tmp"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def write_part(partial: Path, pieces: Sequence[Piece], *, rank: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the pieces owned by `rank`, and then `part-r<rank>.json`, which marks them as complete on disk.

    A piece that is a whole tensor keeps its name and shape in the file; other pieces are flat and named
    `<name>@<start>`.
    """
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for prefix in ("model", "optimizer"):
        mine = [piece for piece in pieces if piece.name.startswith(OPTIMIZER_PREFIX) == (prefix == "optimizer")]
        for number, shard in enumerate(_shards(mine, shard_bytes=shard_bytes), start=1):
            file_name = f"{prefix}-r{rank:05d}-{number:05d}.safetensors"
            files[file_name] = _write_safetensors(partial / file_name, shard)
            for piece in shard:
                stored = Stored(file=file_name, key=_key(piece), start=piece.start, count=piece.values_P.numel())
                entry = tensors.setdefault(piece.name, {"shape": list(piece.shape), "pieces": []})
                entry["pieces"].append(asdict(stored))
    write_text(_part_file(partial, rank), canonical_json({"files": files, "tensors": tensors}))


def commit(partial: Path, step: int, *, num_parts: int, state: Mapping[str, Any], retention: Retention) -> Path:
    """Complete the checkpoint from `num_parts` parts on disk, and remove the checkpoints that are no longer kept.

    Raises CheckpointError if a part is missing, or if the parts do not cover every tensor exactly.
    """
    folder = partial.parent
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for rank in range(num_parts):
        path = _part_file(partial, rank)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: rank {rank} wrote this file, but it is not visible here: the run folder must be on a file "
                "system that all hosts share"
            )
        part = read_json(path)
        files |= part["files"]
        for name, entry in part["tensors"].items():
            tensors.setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
    for name, entry in tensors.items():
        entry["pieces"].sort(key=lambda piece: int(piece["start"]))
        _check_whole(name, entry)
    write_text(partial / STATE_FILE, canonical_json({**state, "step": step}))
    files[STATE_FILE] = fingerprint(partial / STATE_FILE)
    index: dict[str, Any] = {"format": FORMAT, "step": step, "files": files, "tensors": tensors}
    write_text(partial / INDEX_FILE, canonical_json({**index, "sha256": index_digest(index)}))
    for rank in range(num_parts):
        _part_file(partial, rank).unlink()
    sync(partial)
    final = folder_of(folder, step)
    replace_folder(partial, final)
    _retain(folder, step, retention=retention)
    return final


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"part-r{rank:05d}.json"


def _check_whole(name: str, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the sorted pieces cover the tensor without gap or overlap."""
    end = 0
    for piece in entry["pieces"]:
        if piece["start"] != end:
            raise CheckpointError(f"{name}: a piece ends at element {end}, but the next begins at {piece['start']}")
        end += piece["count"]
    if end != math.prod(entry["shape"]):
        raise CheckpointError(f"{name}: its pieces end at element {end}, but its shape is {entry['shape']}")


def _key(piece: Piece) -> str:
    is_whole = piece.values_P.numel() == math.prod(piece.shape)
    return piece.name if is_whole else f"{piece.name}@{piece.start}"


def _shards(pieces: Sequence[Piece], *, shard_bytes: int) -> Iterator[list[Piece]]:
    """Yield the pieces, ordered by name, in lists of at most `shard_bytes` bytes (or of one larger piece)."""
    shard: list[Piece] = []
    room = shard_bytes
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.start)):
        if shard and piece.values_P.nbytes > room:
            yield shard
            shard, room = [], shard_bytes
        shard.append(piece)
        room -= piece.values_P.nbytes
    if shard:
        yield shard


def _write_safetensors(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write CPU pieces to one safetensors file, synced to disk; return its size and sha256.

    The writer of the safetensors library copies the data and holds Python's GIL meanwhile, which would block the
    training that runs beside it. This one copies nothing and hashes the data while writing.
    """
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        key = _key(piece)
        header[key] = {
            "dtype": _DTYPE_NAMES[piece.values_P.dtype],
            "shape": list(piece.shape) if key == piece.name else [piece.values_P.numel()],
            "data_offsets": [end, end + piece.values_P.nbytes],
        }
        end += piece.values_P.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for block in (memoryview(data) for data in _blocks(text, pieces)):
            for start in range(0, len(block), _CHUNK_BYTES):
                chunk = block[start : start + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
            size += len(block)
    sync(path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(header: bytes, pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; the bytes of pieces are views of their memory."""
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        yield piece.values_P.contiguous().view(torch.uint8).numpy().data.cast("B")


def _retain(folder: Path, step: int, *, retention: Retention) -> None:
    """Remove the checkpoints up to `step` that are not kept, and all later ones.

    Later checkpoints are damaged ones that `latest` skipped; they must not displace a good one.
    """
    present = steps(folder)
    kept = [other for other in present if other <= step][-retention.newest :]
    for other in present:
        if other > step:
            _log.warning("removing the checkpoint of step %d: the run resumed before it and is now at %d", other, step)
        elif other in kept or (retention.every and other % retention.every == 0):
            continue
        path = folder_of(folder, other)
        removed = folder / f".{path.name}.removed.tmp"  # an incomplete folder must never have the name of a checkpoint
        path.rename(removed)
        shutil.rmtree(removed)
