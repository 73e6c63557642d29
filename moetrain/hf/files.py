"""Finds the weight files of a folder and reads tensors from them, whole, by rows or by a flat range.

Nothing is interpreted here: a tensor has the name, dtype and shape that its file states.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.hf.slices import flat_range

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class DiskTensor:
    """A tensor on disk. dtype: as safetensors names it, such as BF16 or F8_E4M3."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) of the flattened tensor, in the dtype of the file."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return flat_range(file.get_slice(self.name), first=first, last=last)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); copy the file again") from error


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows [top, bottom) of a tensor along its first axis."""

    tensor: DiskTensor
    top: int
    bottom: int


def read_rows(rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Return the values of `rows` under the same keys, in the dtypes of the files. Each file is opened once.

    Opening a file parses its header, which takes milliseconds where it lists thousands of tensors.
    """
    values: dict[str, Tensor] = {}
    for path in dict.fromkeys(part.tensor.path for part in rows.values()):
        try:
            with safe_open(path, framework="pt") as file:
                for key, part in rows.items():
                    if part.tensor.path == path:
                        values[key] = file.get_slice(part.tensor.name)[part.top : part.bottom]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); copy the file again") from error
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises CheckpointError when it cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): give a Hugging Face model folder") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}: give a JSON object")
    return values


def weight_files(path: Path) -> list[str]:
    """Return the names of the weight files: those in the index, else `model.safetensors`, else all .safetensors files.

    Raises CheckpointError when there are none, or when the index names a file that does not exist.
    """
    if (path / INDEX_FILE).is_file():
        files = sorted(set(_weight_map(path).values()))
        for file in files:
            if not (path / file).is_file():
                raise CheckpointError(f"{path / file}: the file is missing, and {INDEX_FILE} names it: copy it there")
        if SINGLE_FILE not in files and (path / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"{path}: {SINGLE_FILE} is not one of the files that {INDEX_FILE} names: remove the file or the index"
            )
    elif (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no .safetensors file; give a folder with weights")
    return files


def disk_tensors(path: Path) -> dict[str, DiskTensor]:
    """Return every tensor of a folder by its name on disk; no values are read.

    Raises CheckpointError when two files contain the same tensor, or when the files do not match the index.
    """
    tensors: dict[str, DiskTensor] = {}
    for file in weight_files(path):
        for tensor in _tensors_in(path / file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{path}: {tensor.name} is in two files, {tensors[tensor.name].path.name} and {file}: "
                    "remove the file that does not belong to these weights"
                )
            tensors[tensor.name] = tensor
    if (path / INDEX_FILE).is_file():
        for name, file in _weight_map(path).items():
            if name not in tensors or tensors[name].path != path / file:
                raise CheckpointError(
                    f"{path / file}: {name} is missing, and {INDEX_FILE} lists it in this file: copy the folder again"
                )
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{path / INDEX_FILE}: has no weight_map from names of tensors to names of files; copy the file again"
        )
    return weight_map


def _tensors_in(path: Path) -> Iterator[DiskTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping and cannot be iterated
                stored = file.get_slice(name)
                yield DiskTensor(name=name, path=path, shape=tuple(stored.get_shape()), dtype=stored.get_dtype())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the file again") from error


def is_floating(tensor: Tensor) -> bool:
    """Return whether a tensor has a dtype in which non-finite numbers can be tested."""
    return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
