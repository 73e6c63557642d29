"""Reads the weights of a Hugging Face folder by their names in memory, each on request.

On disk each expert is three matrices, or the experts of a layer are fused as transformers has them in memory. In both
cases values are read one matrix at a time. Plain tensors are read in the dtype of the file, quantised ones in bf16.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.errors import CheckpointError
from moetrain.hf.files import INDEX_FILE as INDEX_FILE
from moetrain.hf.files import DiskTensor, disk_tensors, is_floating, read_object
from moetrain.hf.files import weight_files as weight_files
from moetrain.hf.mtp_modules import with_held_modules
from moetrain.hf.names import FUSED_KINDS, UsedNames, copied_name, expert_matrix, fused_names, used_names
from moetrain.hf.quantization import PackedGroups, Quantization, quantization_of
from moetrain.hf.shape import from_hf_config
from moetrain.hf.storage import Fp8Matrix, PackedMatrix, Plain, Stored, stored_tensors
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import Quantized

_log = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Names of files that may hold weights; one that is not read is named in the log."""
_ROUTER = ".gate.weight"
"""End of the name of a router's matrix, which stays in float32 in an export."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The elements [first, last) of a flattened tensor on disk."""

    tensor: Stored
    first: int
    last: int


class HfFolder(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a folder by name in memory; `[name]` returns a whole tensor in float32.

    A tensor in memory is one tensor on disk or several, one after the other: a fused expert tensor consists of the
    matrices of its experts.
    """

    def __init__(self, path: Path, config: ModelConfig, *, quantization: Quantization | None = None) -> None:
        """Read names and shapes of all files of the folder.

        quantization: what config.json states. What the folder holds beside the language model is ignored, with a line
        in the log. Raises CheckpointError for a missing or unreadable file, a dtype that is not read, and for an
        expert's matrix that is missing or has another shape than those of other experts.
        """
        self.path = path
        self.quantization = quantization
        disk = disk_tensors(path)
        try:
            used = used_names(disk, num_layers=config.num_layers, num_mtp_layers=config.num_mtp_layers)
            stored = stored_tensors({name: disk[on_disk] for name, on_disk in used.names.items()}, quantization)
            fused = fused_names(stored)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if config.num_mtp_layers:
            _warn_of_other_copies(path, disk, used)
        if used.unused:
            counts = ", ".join(f"{what}: {count} tensors" for what, count in sorted(used.unused.items()))
            _log.info("%s: not used: %s", path, counts)
        read = {tensor.path.name for tensor in disk.values()}
        if others := sorted({file.name for ending in _WEIGHT_FILES for file in path.glob(ending)} - read):
            _log.info("%s: files not used: %s", path, ", ".join(others))
        self.dtypes = {
            tensor.tensor.dtype
            for name, tensor in stored.items()
            if isinstance(tensor, Plain) and len(tensor.shape) > 1 and not name.endswith(_ROUTER)
        }
        """Dtypes of the matrices that are not quantised, except routers, as safetensors names them."""
        self.is_fp8 = any(isinstance(tensor, Fp8Matrix) for tensor in stored.values())
        self._has_own_names = all(name == on_disk for name, on_disk in used.names.items())
        """Whether the names are those of the language model alone."""
        self._parts = {name: [tensor] for name, tensor in stored.items() if expert_matrix(name) is None}
        self._shapes = {name: tensors[0].shape for name, tensors in self._parts.items()}
        for name, matrices in fused.items():
            if name in self._parts:
                raise CheckpointError(f"{path}: {name} is there twice, fused and per expert: remove one of them")
            self._fuse(name, [stored[matrix] for matrix in matrices])

    def _fuse(self, name: str, matrices: list[Stored]) -> None:
        first = matrices[0]
        for matrix in matrices:
            if matrix.shape != first.shape or len(matrix.shape) != 2:
                raise CheckpointError(
                    f"{self.path}: {matrix.name} has shape {list(matrix.shape)}, {first.name} has "
                    f"{list(first.shape)}: both must have the same two-dimensional shape"
                )
        num_parts = _num_parts(name)
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
            size = math.prod(tensor.shape)
            begin, end = max(first - start, 0), min(last - start, size)
            if begin < end:
                yield Source(tensor=tensor, first=begin, last=end)
            start += size

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of a flattened tensor, in the dtype of the file or dequantised to bf16.

        Raises CheckpointError when they cannot be read or are not finite.
        """
        ranges = [self._read(source) for source in self.sources(name, first=first, last=last)]
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges) if ranges else torch.empty(0)

    def _read(self, source: Source) -> torch.Tensor:
        try:
            values = source.tensor.read(first=source.first, last=source.last)
        except CheckpointError as error:
            raise _with_folder(error, self.path) from error
        if is_floating(values) and not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{self.path}: {source.tensor.name} holds numbers that are not finite: copy the folder again"
            )
        return values

    @property
    def quant(self) -> QuantConfig | None:
        """Config with which packed experts can be trained further; None if the folder has none."""
        is_packed = isinstance(self.quantization, PackedGroups) and bool(self.packed_experts())
        return self.quantization.quant if isinstance(self.quantization, PackedGroups) and is_packed else None

    def packed_experts(self) -> dict[str, int]:
        """Return name in memory and number of experts of the fused tensors of which all matrices are packed."""
        return {
            name: self._shapes[name][0]
            for name, parts in self._parts.items()
            if len(self._shapes[name]) == 3 and all(isinstance(part, PackedMatrix) for part in parts)
        }

    @property
    def is_plain_or_packed(self) -> bool:
        """Whether names are those in memory, and no weights are quantised, or all routed experts and nothing else."""
        if self.is_fp8 or not self._has_own_names:
            return False
        packed = {name for name, parts in self._parts.items() if any(isinstance(part, PackedMatrix) for part in parts)}
        return not packed or packed == {name for name, shape in self._shapes.items() if len(shape) == 3}

    def check_packing(self) -> None:
        """Raise CheckpointError if some matrices of a layer's experts are packed and others are not."""
        layers: dict[str, list[bool]] = {}
        for name, parts in self._parts.items():
            if len(self._shapes[name]) == 3:
                layers.setdefault(name.rpartition(".")[0], []).extend(isinstance(part, PackedMatrix) for part in parts)
        for layer, is_packed in layers.items():
            if any(is_packed) and not all(is_packed):
                raise CheckpointError(
                    f"{self.path}: {sum(is_packed)} of {len(is_packed)} matrices of {layer} are packed: the experts of "
                    "a layer are read if all of them are packed, or none"
                )

    def codes(self, name: str, *, first: int, last: int) -> Quantized:
        """Return codes [E, O, I] and scales of the experts [first, last) of a tensor of `packed_experts`, as stored."""
        num_parts = _num_parts(name)
        matrices: Sequence[Stored] = self._parts[name][first * num_parts : last * num_parts]
        experts, rows, columns = last - first, *self._shapes[name][1:]
        codes_XOI = torch.empty(experts, rows, columns, dtype=torch.int8)
        scales: list[torch.Tensor] = []
        filled = codes_XOI.view(-1, columns)
        for number, matrix in enumerate(matrices):
            assert isinstance(matrix, PackedMatrix), f"{name} is packed"
            height = matrix.shape[0]
            try:
                quantized = matrix.rows(top=0, bottom=height)
            except CheckpointError as error:
                raise _with_folder(error, self.path) from error
            filled[number * height : (number + 1) * height] = quantized.codes_XOI
            scales.append(quantized.scales_XOG)
        return Quantized(codes_XOI=codes_XOI, scales_XOG=torch.cat(scales).view(experts, rows, -1))

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

    Raises CheckpointError for a missing or unreadable file, and for weights that are quantised in another way than
    `hf.quantization` describes.
    """
    values = read_object(path / "config.json")
    stated = from_hf_config(values)
    config = with_held_modules(stated, path)
    if config.num_mtp_layers < stated.num_mtp_layers:
        _log.info(
            "%s: config.json states %d modules of multi-token prediction, and the folder holds %d",
            *(path, stated.num_mtp_layers, config.num_mtp_layers),
        )
    folder = HfFolder(path, config, quantization=quantization_of(values))
    folder.check_packing()
    if rounded := folder.dtypes - {"BF16", "F8_E4M3"}:
        _log.info("%s: weights are stored in %s; an export rounds them to bf16", path, ", ".join(sorted(rounded)))
    if folder.is_fp8:
        _log.info("%s: the weights are FP8; they are read as bf16", path)
    elif isinstance(folder.quantization, PackedGroups):
        packed, format = len(folder.packed_experts()), folder.quantization.format
        _log.info("%s: %d tensors of experts are stored in %s", path, packed, format)
    return config, folder


def _warn_of_other_copies(path: Path, disk: Mapping[str, DiskTensor], used: UsedNames) -> None:
    """Log a warning when a module of multi-token prediction has another embedding or head than the model.

    Three rows of each are compared.
    """
    for copy in disk:
        original = copied_name(copy)
        if original is None or original not in used.names:
            continue
        ours, theirs = disk[used.names[original]], disk[copy]
        is_same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if is_same and (len(ours.shape) != 2 or not ours.size):
            continue  # the shape is refused where it is compared with the model's
        for row in (0, ours.shape[0] // 2, ours.shape[0] - 1) if is_same else ():
            first, last = row * ours.shape[1], (row + 1) * ours.shape[1]
            is_same &= torch.equal(ours.read(first=first, last=last), theirs.read(first=first, last=last))
        if not is_same:
            _log.warning("%s: %s differs from %s, which the module uses instead", path, copy, original)


def _num_parts(name: str) -> int:
    """Return the number of matrices on disk per expert of a fused tensor."""
    return len(FUSED_KINDS[name.rsplit(".", 1)[1]])


def _with_folder(error: CheckpointError, path: Path) -> CheckpointError:
    """Return the error with the folder in its message, which names the file already if it comes from one."""
    text = str(error)
    return error if text.startswith(str(path)) else CheckpointError(f"{path}: {text}")
