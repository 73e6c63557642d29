"""Reads the weights of a Hugging Face folder by their names in memory, each on request.

On disk each expert is three matrices, or the experts of a layer are fused as transformers has them in memory. In both
cases values are read one matrix at a time, in the dtype of the file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moetrain.errors import CheckpointError
from moetrain.hf.names import FUSED_KINDS, expert_matrix, fused_names
from moetrain.hf.shape import from_hf_config
from moetrain.hf.slices import flat_range
from moetrain.model.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("BF16", "F16", "F32", "F64")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class DiskTensor:
    """A tensor on disk: its name, its file, and its shape in the file."""

    name: str
    file: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The elements [first, last) of a flattened tensor on disk."""

    tensor: DiskTensor
    first: int
    last: int


class HfFolder(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a folder by name in memory; `[name]` returns a whole tensor in float32.

    A tensor in memory is one tensor on disk or several, one after the other: a fused expert tensor consists of the
    matrices of its experts.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read names and shapes of all files of the folder.

        Layers beyond `config.num_layers` (the multi-token-prediction head of DeepSeek-V3) are ignored. Raises
        CheckpointError for a missing or unreadable file, and for an expert's matrix that is missing or has another
        shape than those of other experts.
        """
        self._path = path
        disk = {
            name: tensor
            for name, tensor in _tensors_of(path).items()
            if (layer := _LAYER.match(name)) is None or int(layer[1]) < config.num_layers
        }
        try:
            fused = fused_names(disk)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._parts = {name: [tensor] for name, tensor in disk.items() if expert_matrix(name) is None}
        self._shapes = {name: tensors[0].shape for name, tensors in self._parts.items()}
        for name, matrices in fused.items():
            self._fuse(name, [disk[matrix] for matrix in matrices])

    def _fuse(self, name: str, matrices: list[DiskTensor]) -> None:
        first = matrices[0]
        for matrix in matrices:
            if matrix.shape != first.shape or len(matrix.shape) != 2:
                raise CheckpointError(
                    f"{self._path}: {matrix.name} has shape {list(matrix.shape)}, {first.name} has "
                    f"{list(first.shape)}: both must have the same two-dimensional shape"
                )
        num_parts = len(FUSED_KINDS[name.rsplit(".", 1)[1]])
        rows, columns = first.shape
        self._parts[name] = matrices
        self._shapes[name] = (len(matrices) // num_parts, rows * num_parts, columns)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return self._shapes

    def sources(self, name: str, *, first: int, last: int) -> Iterator[Source]:
        """Yield the ranges on disk that make up the elements [first, last) of a flattened tensor, in order."""
        start = 0
        for tensor in self._parts[name]:
            begin, end = max(first - start, 0), min(last - start, tensor.size)
            if begin < end:
                yield Source(tensor=tensor, first=begin, last=end)
            start += tensor.size

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of a flattened tensor, in the dtype of the file."""
        ranges = [self._read(source) for source in self.sources(name, first=first, last=last)]
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges) if ranges else torch.empty(0)

    def _read(self, source: Source) -> torch.Tensor:
        path = self._path / source.tensor.file
        try:
            with safe_open(path, framework="pt") as file:
                return flat_range(file.get_slice(source.tensor.name), first=source.first, last=source.last)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one whole tensor in float32."""
        shape = self._shapes[name]
        whole = torch.empty(shape)
        filled = 0
        for source in self.sources(name, first=0, last=whole.numel()):
            whole.view(-1)[filled : filled + source.last].copy_(self._read(source))
            filled += source.last
        return whole

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._shapes)


def open_hf_folder(path: Path) -> tuple[ModelConfig, HfFolder]:
    """Return config and weights of a folder with config.json and safetensors files; weights are read on request.

    Raises CheckpointError for a missing or unreadable file, and for weights that are quantised.
    """
    values = _json(path / "config.json")
    if "quantization_config" in values:
        raise CheckpointError(
            f"{path / 'config.json'}: the weights are quantised: give a folder of bf16 or fp32 weights"
        )
    config = from_hf_config(values)
    return config, HfFolder(path, config)


def _json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
    elif (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no .safetensors file")
    return files


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_FILE}: has no weight_map from names of tensors to names of files")
    return weight_map


def _tensors_of(path: Path) -> dict[str, DiskTensor]:
    """Return every tensor of a folder by its name on disk.

    Raises CheckpointError when two files contain the same tensor, or when the files do not match the index.
    """
    tensors: dict[str, DiskTensor] = {}
    for file in weight_files(path):
        for tensor in _tensors_in(path, file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{path}: {tensor.name} is in two files, {tensors[tensor.name].file} and {file}: "
                    "remove the file that does not belong to these weights"
                )
            tensors[tensor.name] = tensor
    if (path / INDEX_FILE).is_file():
        for name, file in _weight_map(path).items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(
                    f"{path / file}: {name} is missing, and {INDEX_FILE} lists it in this file: copy the folder again"
                )
    return tensors


def _tensors_in(path: Path, file_name: str) -> Iterator[DiskTensor]:
    try:
        with safe_open(path / file_name, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping and cannot be iterated
                stored = file.get_slice(name)
                if stored.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path / file_name}: {name} has dtype {stored.get_dtype()}: give weights in "
                        f"{', '.join(_DTYPES)}; quantised weights must be dequantised first"
                    )
                yield DiskTensor(name=name, file=file_name, shape=tuple(stored.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / file_name}: cannot be read ({error})") from error
