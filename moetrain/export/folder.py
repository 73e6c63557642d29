"""Folders of weights in the layout of Hugging Face: written atomically, and checked against their digests.

This module handles files and bytes; `compressed_tensors` interprets the tensors. `moetrain.json` contains the size and
sha256 of every other file, and the sha256 of its own content.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moetrain.checkpoint.read import TensorFiles, fingerprint, read_json, whole_tensor_files
from moetrain.checkpoint.shape import CONFIG_FILE as CONFIG_FILE
from moetrain.errors import CheckpointError, SaveError
from moetrain.files import previous_name, replace_folder, sync, write_json
from moetrain.hf.folder import INDEX_FILE
from moetrain.stage_files import EXPORT_RECORD

_log = logging.getLogger(__name__)

_FORMAT = 1
_REPAIR = "export again, or copy the folder again from an intact copy"


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `final` when the block succeeds and is removed when it fails.

    An export in `final` is replaced if its record and its files are the same; another one, or one to which files were
    added, is kept as `final`.previous, .previous.2 ...
    Raises CheckpointError when `final` exists and is not an export.
    """
    if final.exists() and not (final / EXPORT_RECORD).is_file():
        raise CheckpointError(
            f"{final}: exists and has no {EXPORT_RECORD}, so it is not an export: give another folder"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        if final.exists() and not _is_same(final, partial):
            kept = previous_name(final)
            final.rename(kept)
            _log.warning("%s had another export, which was moved to %s", final, kept)
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two exports have the same record, and no file that the other lacks."""
    records = [(folder / EXPORT_RECORD).read_bytes() for folder in (one, other)]
    names = [{path.name for path in folder.iterdir()} for folder in (one, other)]
    return records[0] == records[1] and names[0] <= names[1]


def not_written(path: Path, error: Exception) -> SaveError:
    """Return the error of a file of weights that could not be written."""
    return SaveError(f"{path}: not written: {error}; make room, and run the same command again")


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> int:
    """Write named tensors as shards with an index, one shard in memory at a time; return the bytes of the tensors."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        path = folder / f"{len(shards)}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise not_written(path, error) from error
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(folder.stat().st_mode & 0o666)  # save_file makes files that only their owner can read
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file_name)
        file_of.update(dict.fromkeys(names, file_name))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": file_of}, indent=2)
    return total


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `moetrain.json` with `record` and the digest of every file in `folder`. Call it after all other files."""
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir())}
    content = {"format": _FORMAT, **record, "files": files}
    write_json(folder / EXPORT_RECORD, {**content, "sha256": _digest(content)}, indent=2)


def read_record(folder: Path) -> dict[str, Any]:
    """Check every file of an export against its digest and return the content of `moetrain.json`.

    Raises CheckpointError that names the file that is missing or has changed.
    """
    record = stated_record(folder)
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing; {_REPAIR}")
        if fingerprint(path) != expected:
            raise CheckpointError(f"{path}: the file has changed, its size or sha256 differs; {_REPAIR}")
    return record


def stated_record(folder: Path) -> dict[str, Any]:
    """Return the content of `moetrain.json`, without reading other files. Raises CheckpointError if it is damaged."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give the folder of an export")
    record = read_json(folder / EXPORT_RECORD)
    stated = record.pop("sha256", None)
    if record.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / EXPORT_RECORD}: format is {record.get('format')}, this version reads {_FORMAT}; {_REPAIR}"
        )
    if stated != _digest(record):
        raise CheckpointError(f"{folder / EXPORT_RECORD}: its content does not match its sha256; {_REPAIR}")
    return record


def open_weights(folder: Path) -> TensorFiles:
    """Return the tensors of a folder by name; each is read on request."""
    return whole_tensor_files(folder, read_json(folder / INDEX_FILE)["weight_map"])


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
