"""Checkpoint folders: atomic, checksummed, free of the layout that wrote them. Files only; no engine and no ranks.

A checkpoint is a folder `step_00000100` with sharded safetensors (`model-*` for parameters and buffers, `optimizer-*`
for what the optimizer holds), `state.json` (step, configuration, position in the data, digests) and `index.json` (which
file holds which tensor; size and sha256 of every file, and of the index itself). It is written as `.step_00000100.tmp`,
synced to disk and renamed, so that a folder with the final name is whole. Nothing is pickled.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moetrain.errors import CheckpointError

_log = logging.getLogger(__name__)

_FORMAT = 1
_SHARD_BYTES = 2 << 30
_STEP_FOLDER = re.compile(r"^step_(\d{8})$")
_OPTIMIZER_PREFIX = "optimizer/"
_REPAIR = "name another checkpoint, or copy this one again from where it is whole"


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, each read from its file when it is asked for."""

    def __init__(self, folder: Path, file_of: Mapping[str, str]) -> None:
        """Hold the mapping from tensor names to the names of files in `folder`."""
        self._folder = folder
        self._file_of = dict(file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU; `CheckpointError` when its file does not hold it."""
        path = self._folder / self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name} ({error}): {_REPAIR}") from error
        return tensor

    def of_model(self) -> "TensorFiles":
        """Return parameters and buffers alone, without what the optimizer holds."""
        kept = {name: file for name, file in self._file_of.items() if not name.startswith(_OPTIMIZER_PREFIX)}
        return TensorFiles(self._folder, kept)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._file_of)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._file_of)


@dataclass(kw_only=True)
class Checkpoint:
    """A checkpoint whose files were found to be whole. state: what `save` was given, with "step"."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: TensorFiles


@dataclass(kw_only=True)
class Latest:
    """The newest good checkpoint of a folder (None: it has none), and how many damaged ones were passed over."""

    path: Path | None
    num_damaged: int


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write checkpoint `step` into `folder` atomically, keep the newest `keep` ones, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.tmp"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    file_of = _write_tensors(partial, tensors, shard_bytes=shard_bytes)
    _write_text(partial / "state.json", _dump({**state, "step": step}))
    files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
    index: dict[str, Any] = {"format": _FORMAT, "step": step, "files": files, "tensors": file_of}
    index["sha256"] = _index_digest(index)
    _write_text(partial / "index.json", _dump(index))
    _sync_folder(partial)
    _move_into_place(partial, final)
    _retain(folder, step, keep=keep)
    return final


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, ascending, damaged ones included."""
    if not folder.is_dir():
        return []
    found = (_STEP_FOLDER.match(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def remove_leftovers(folder: Path) -> int:
    """Remove half-written checkpoints that a killed process left in `folder`; return how many there were."""
    leftovers = sorted(folder.glob(".step_*.tmp")) if folder.is_dir() else []
    for path in leftovers:
        _log.warning("removing %s, left half-written by a process that was stopped", path)
        shutil.rmtree(path)
    return len(leftovers)


def latest(folder: Path) -> Latest:
    """Return the newest good checkpoint in `folder`, passing over damaged ones with a log line each.

    Raises `CheckpointError` when there are checkpoints but none of them is good.
    """
    damaged: list[CheckpointError] = []
    for step in reversed(steps(folder)):
        path = folder / f"step_{step:08d}"
        try:
            load(path)
        except CheckpointError as error:
            _log.warning("checkpoint %s is damaged, falling back to the one before it: %s", path, error)
            damaged.append(error)
            continue
        return Latest(path=path, num_damaged=len(damaged))
    if damaged:
        raise CheckpointError(
            f"{folder}: none of its {len(damaged)} checkpoints is good; the newest: {damaged[0]}; "
            "delete the folder to start from the beginning"
        )
    return Latest(path=None, num_damaged=0)


def load(path: Path) -> Checkpoint:
    """Check every file of the checkpoint folder `path` against its checksum and return it, tensors read on demand.

    Raises `CheckpointError` that names the file: missing folder or shard, flipped byte, truncated JSON.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder; give a folder named step_*")
    index = _read_index(path / "index.json")
    for name, expected in index["files"].items():
        _check_file(path / name, expected)
    state = read_json(path / "state.json")
    if state.get("step") != index["step"]:
        raise CheckpointError(f"{path / 'state.json'}: step is {state.get('step')}, the index says {index['step']}")
    return Checkpoint(path=path, step=index["step"], state=state, tensors=TensorFiles(path, index["tensors"]))


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` has the form of a checkpoint folder, good or not."""
    return _STEP_FOLDER.match(path.name) is not None or (path / "index.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; `CheckpointError` when it is missing, truncated or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; {_REPAIR}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); {_REPAIR}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object; {_REPAIR}")
    return value


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path)
    digest = index.pop("sha256", None)
    if index.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: format is {index.get('format')}, this version reads {_FORMAT}; {_REPAIR}")
    if digest != _index_digest(index):
        raise CheckpointError(f"{path}: its content does not have the sha256 it states; {_REPAIR}")
    return index


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; {_REPAIR}")
    found = _fingerprint(path)
    if found["bytes"] != expected["bytes"]:
        raise CheckpointError(f"{path}: has {found['bytes']} bytes, {expected['bytes']} were written; {_REPAIR}")
    if found["sha256"] != expected["sha256"]:
        raise CheckpointError(
            f"{path}: sha256 is {found['sha256'][:12]}..., {expected['sha256'][:12]}... was written; {_REPAIR}"
        )


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, shard_bytes: int) -> dict[str, str]:
    """Write the tensors in shards and return the name of the file that holds each."""
    file_of: dict[str, str] = {}
    for prefix in ("model", "optimizer"):
        names = [name for name in tensors if name.startswith(_OPTIMIZER_PREFIX) == (prefix == "optimizer")]
        shards = _shards(names, tensors, shard_bytes=shard_bytes)
        for number, shard in enumerate(shards, start=1):
            file_name = f"{prefix}-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: tensors[name].detach().cpu().contiguous() for name in shard}, folder / file_name)
            _sync_file(folder / file_name)
            file_of.update(dict.fromkeys(shard, file_name))
    return file_of


def _shards(names: Sequence[str], tensors: Mapping[str, torch.Tensor], *, shard_bytes: int) -> list[list[str]]:
    """Cut the names, sorted, into lists of at most `shard_bytes` bytes (or one tensor)."""
    shards: list[list[str]] = []
    room = 0
    for name in sorted(names):
        if tensors[name].nbytes > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensors[name].nbytes
    return shards


def _retain(folder: Path, step: int, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and the ones beyond it.

    What lies beyond was damaged and passed over by `latest`: it must not push a good one out.
    """
    present = steps(folder)
    kept = [other for other in present if other <= step][-keep:]
    for other in present:
        if other > step:
            _log.warning("removing the checkpoint of step %d: the run went on from before it and is at %d", other, step)
        if other not in kept:
            shutil.rmtree(folder / f"step_{other:08d}")


def _move_into_place(partial: Path, final: Path) -> None:
    if final.exists():  # a damaged one that the run fell back over, or the same step saved twice
        replaced = final.with_name(f".{final.name}.replaced.tmp")
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    _sync_folder(final.parent)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _index_digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump({key: value for key, value in index.items() if key != "sha256"}).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
