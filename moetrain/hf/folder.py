"""The weights of a Hugging Face folder, under the names in memory, read when they are asked for and no more than that.

On disk each expert is three matrices (or, as transformers has them in memory, a layer's are fused); either way an
expert's values are read one matrix at a time, in the dtype of the file. E experts, F expert width, D hidden.
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
from moetrain.hf.shape import from_hf_config
from moetrain.hf.slices import flat_range
from moetrain.model.config import ModelConfig

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_KINDS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True, kw_only=True)
class DiskTensor:
    """A tensor on disk: its name and shape there, and its file."""

    name: str
    file: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The elements [first, last) of a tensor on disk laid flat."""

    tensor: DiskTensor
    first: int
    last: int


class HfFolder(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a folder by name in memory, float32 when they are asked for whole.

    A tensor in memory is one or several on disk end to end: a fused expert tensor is the matrices of its experts.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read names and shapes of all files of the folder.

        Layers beyond the last (the multi-token-prediction head of DeepSeek-V3) are left out. Raises CheckpointError for
        a missing or unreadable file, and a missing or misshapen matrix of an expert.
        """
        self._path = path
        disk: dict[str, DiskTensor] = {}
        for file in _files(path):
            for tensor in _tensors_in(path, file):
                layer = _LAYER.match(tensor.name)
                if layer is None or int(layer[1]) < config.num_layers:
                    disk[tensor.name] = tensor
        self._parts: dict[str, list[DiskTensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        prefixes: dict[str, int] = {}
        for name, tensor in disk.items():
            match = _SINGLE.fullmatch(name)
            if match is None:
                self._parts[name], self._shapes[name] = [tensor], tensor.shape
            else:
                prefixes[match["prefix"]] = max(prefixes.get(match["prefix"], 0), int(match["expert"]) + 1)
        for prefix, num_experts in prefixes.items():
            self._fuse(prefix, disk, num_experts=num_experts)

    def _fuse(self, prefix: str, disk: Mapping[str, DiskTensor], *, num_experts: int) -> None:
        for fused, kinds in _KINDS.items():
            names = [f"{prefix}.{expert}.{kind}_proj.weight" for expert in range(num_experts) for kind in kinds]
            missing = next((name for name in names if name not in disk), None)
            if missing is not None:
                raise CheckpointError(f"{self._path}: {missing} is missing")
            rows, columns = disk[names[0]].shape
            for name in names:
                if disk[name].shape != (rows, columns):
                    raise CheckpointError(
                        f"{self._path}: {name} has shape {list(disk[name].shape)}, {names[0]} has {[rows, columns]}"
                    )
            self._parts[f"{prefix}.{fused}"] = [disk[name] for name in names]
            self._shapes[f"{prefix}.{fused}"] = (num_experts, rows * len(kinds), columns)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        return self._shapes

    def sources(self, name: str, *, first: int, last: int) -> Iterator[Source]:
        """Yield what has to be read on disk for the elements [first, last) of a tensor laid flat, in order."""
        start = 0
        for tensor in self._parts[name]:
            begin, end = max(first - start, 0), min(last - start, tensor.size)
            if begin < end:
                yield Source(tensor=tensor, first=begin, last=end)
            start += tensor.size

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of a tensor laid flat, in the dtype of the file."""
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
        """Return one tensor whole, float32."""
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
    """Return config and weights of a folder with config.json and safetensors; no weight is read yet.

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
        values: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): give a Hugging Face model folder") from error
    return values


def _files(path: Path) -> list[str]:
    """Return the names of the weight files: those of the index where there is one."""
    if (path / INDEX_FILE).is_file():
        weight_map = _json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / INDEX_FILE}: has no weight_map")
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no .safetensors file")
    return files


def _tensors_in(path: Path, file_name: str) -> Iterator[DiskTensor]:
    try:
        with safe_open(path / file_name, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping and cannot be iterated
                yield DiskTensor(name=name, file=file_name, shape=tuple(file.get_slice(name).get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / file_name}: cannot be read ({error})") from error
