"""Reading checkpoint folders: verified by checksums, and independent of the layout that wrote them. No engine, no
ranks.

A checkpoint is a folder `step_00000100`. Its tensors are global, one per logical parameter, each stored as one or more
pieces in safetensors files (`model-r<rank>-<n>` for parameters and buffers, `optimizer-r<rank>-<n>` for optimizer
state), written by the ranks that own them. `index.json` maps flat ranges of tensors to files, and contains size and
sha256 of every file and its own sha256. `state.json` contains step, configuration, data position and random streams. A
folder with the final name is complete (see `checkpoint.write`). Nothing is pickled.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moetrain.checkpoint.folders import CHECKPOINTS as CHECKPOINTS
from moetrain.checkpoint.folders import INDEX_FILE as INDEX_FILE
from moetrain.checkpoint.folders import REPAIR as REPAIR
from moetrain.checkpoint.folders import STATE_FILE as STATE_FILE
from moetrain.checkpoint.folders import folder_of as folder_of
from moetrain.checkpoint.folders import is_checkpoint as is_checkpoint
from moetrain.checkpoint.folders import read_json as read_json
from moetrain.checkpoint.folders import steps as steps
from moetrain.errors import CheckpointError
from moetrain.files import sha256_of
from moetrain.hf.slices import flat_range

_log = logging.getLogger(__name__)

FORMAT = 2
_WHOLE_TENSORS = 1  # the previous format, with each tensor whole in one file; only read
OPTIMIZER_PREFIX = "optimizer/"
_REPLACED = ".replaced.tmp"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One piece of a tensor: `count` elements from flat index `start`, stored under `key` in the file `file`."""

    file: str
    key: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A global tensor of a checkpoint: its shape, and its pieces ordered by start."""

    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name, read from disk on access, whole or as a flat range."""

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
        """Create a view of the tensors stored in `folder`."""
        self._folder = folder
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one whole tensor on the CPU; raises `CheckpointError` if its file does not contain it."""
        shape = self._stored[name].shape
        return self.read(name, first=0, last=math.prod(shape)).view(shape)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._stored.items()}

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of a flattened tensor; opens only the files that contain some of them."""
        wanted = [
            self._range(piece, first=max(first, piece.start), last=min(last, piece.start + piece.count), name=name)
            for piece in self._stored[name].pieces
            if piece.start < last and first < piece.start + piece.count
        ]
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted) if wanted else torch.empty(0)

    def _range(self, piece: Stored, *, first: int, last: int, name: str) -> torch.Tensor:
        path = self._folder / piece.file
        try:
            with safe_open(path, framework="pt") as file:
                return flat_range(file.get_slice(piece.key), first=first - piece.start, last=last - piece.start)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name} ({error}): {REPAIR}") from error

    def of_model(self) -> "TensorFiles":
        """Return only parameters and buffers, without optimizer state."""
        kept = {name: tensor for name, tensor in self._stored.items() if not name.startswith(OPTIMIZER_PREFIX)}
        return TensorFiles(self._folder, kept)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._stored)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._stored)


@dataclass(kw_only=True)
class Checkpoint:
    """A checkpoint with verified index and state. state: what the run saved, with "step". files: size and sha256 by
    name. digest: a sha256 that changes with the weights.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: TensorFiles
    files: dict[str, dict[str, Any]]
    digest: str


@dataclass(kw_only=True)
class Latest:
    """The newest good checkpoint of a folder (None if it has none), and the number of damaged ones skipped."""

    path: Path | None
    num_damaged: int


def remove_leftovers(folder: Path) -> int:
    """Remove the incomplete folders that a killed process left in `folder`; return their number.

    A checkpoint that was being replaced is restored if its replacement was not completed.
    """
    leftovers = sorted(folder.glob(".step_*.tmp")) if folder.is_dir() else []
    for path in leftovers:
        final = folder / path.name.removeprefix(".").removesuffix(_REPLACED)
        if path.name.endswith(_REPLACED) and not final.exists():
            _log.warning("restoring %s, because its replacement was not completed", final)
            path.rename(final)
            continue
        _log.warning("removing %s, left incomplete by a process that was stopped", path)
        shutil.rmtree(path)
    return len(leftovers)


def damage_of(path: Path) -> str | None:
    """Return what is wrong with the checkpoint folder `path`, or None if every file matches its checksum."""
    try:
        load(path)
    except CheckpointError as error:
        return str(error)
    return None


def latest(
    folder: Path, *, present: Sequence[int] | None = None, damage: Callable[[Path], str | None] = damage_of
) -> Latest:
    """Return the newest checkpoint in `folder` without `damage`; logs each damaged one that is skipped.

    present: the steps to check, ascending; None uses those found by `steps`. Raises `CheckpointError` if there are
    checkpoints but all are damaged.
    """
    damaged: list[str] = []
    for step in reversed(steps(folder) if present is None else present):
        path = folder_of(folder, step)
        found = damage(path)
        if found is None:
            for reason in damaged:
                _log.warning("a checkpoint is damaged, falling back to %s: %s", path, reason)
            return Latest(path=path, num_damaged=len(damaged))
        damaged.append(found)
    if damaged:
        raise CheckpointError(
            f"{folder}: none of the {len(damaged)} checkpoints here is intact; the newest: {damaged[0]}; "
            "delete the folder to start from the beginning"
        )
    return Latest(path=None, num_damaged=0)


def load(path: Path) -> Checkpoint:
    """Verify every file of the checkpoint folder `path` against its checksum and return the checkpoint.

    Tensors are read on access. Raises `CheckpointError` that names the file: missing folder or file, changed byte,
    truncated JSON.
    """
    found = open_checkpoint(path)
    check_files(found)
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder `path`, with verified index and state but unverified weight files.

    Raises `CheckpointError` that names the file.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: this checkpoint folder does not exist; give a folder named step_*")
    index = read_json(path / INDEX_FILE)
    digest = index.pop("sha256", None)
    if index.get("format") not in (FORMAT, _WHOLE_TENSORS):
        raise CheckpointError(
            f"{path / INDEX_FILE}: format is {index.get('format')}, but this version reads {_WHOLE_TENSORS} and "
            f"{FORMAT}; {REPAIR}"
        )
    if digest != index_digest(index):
        raise CheckpointError(f"{path / INDEX_FILE}: its content does not match its sha256; {REPAIR}")
    _check_file(path / STATE_FILE, index["files"][STATE_FILE])
    state = read_json(path / STATE_FILE)
    if state.get("step") != index["step"]:
        raise CheckpointError(
            f"{path / STATE_FILE}: step is {state.get('step')}, but {index['step']} in {INDEX_FILE}; {REPAIR}"
        )
    is_of_whole_tensors = index["format"] == _WHOLE_TENSORS
    stored = _whole_tensors(path, index["tensors"]) if is_of_whole_tensors else _stored_tensors(index["tensors"])
    return Checkpoint(
        path=path,
        step=index["step"],
        state=state,
        tensors=TensorFiles(path, stored),
        files=index["files"],
        digest=index_digest({name: file for name, file in index["files"].items() if name.startswith("model-")}),
    )


def check_files(checkpoint: Checkpoint, *, part: int = 0, num_parts: int = 1) -> None:
    """Raise `CheckpointError` that names the first file with a wrong size or checksum, among every `num_parts`-th file.

    Ranks that each check one `part` verify all files together.
    """
    for name in sorted(checkpoint.files)[part::num_parts]:
        _check_file(checkpoint.path / name, checkpoint.files[name])


def canonical_json(value: Mapping[str, Any]) -> str:
    """Return canonical JSON text, as hashed for digests."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def index_digest(index: Mapping[str, Any]) -> str:
    """Return the sha256 of an index, excluding its own "sha256" entry."""
    return hashlib.sha256(
        canonical_json({key: value for key, value in index.items() if key != "sha256"}).encode()
    ).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def whole_tensor_files(folder: Path, file_of: Mapping[str, str]) -> TensorFiles:
    """Return the tensors of a folder in which each tensor is whole in the file given by `file_of`.

    Raises `CheckpointError` that names a file which is missing, unreadable, or lacks a tensor.
    """
    return TensorFiles(folder, _whole_tensors(folder, file_of))


def _whole_tensors(folder: Path, file_of: Mapping[str, str]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file_name in sorted(set(file_of.values())):
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                for name in (name for name in file_of if file_of[name] == file_name):
                    shape = tuple(file.get_slice(name).get_shape())
                    piece = Stored(file=file_name, key=name, start=0, count=math.prod(shape))
                    stored[name] = StoredTensor(shape=shape, pieces=(piece,))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder / file_name}: the file is missing; {REPAIR}") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / file_name}: cannot be read ({error}): {REPAIR}") from error
    return {name: stored[name] for name in file_of}


def _stored_tensors(table: Mapping[str, Any]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(shape=tuple(entry["shape"]), pieces=tuple(Stored(**piece) for piece in entry["pieces"]))
        for name, entry in table.items()
    }


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; {REPAIR}")
    found = fingerprint(path)
    if found["bytes"] != expected["bytes"]:
        raise CheckpointError(f"{path}: has {found['bytes']} bytes instead of {expected['bytes']}; {REPAIR}")
    if found["sha256"] != expected["sha256"]:
        raise CheckpointError(
            f"{path}: its sha256 is {found['sha256'][:12]}... instead of {expected['sha256'][:12]}...; {REPAIR}"
        )
