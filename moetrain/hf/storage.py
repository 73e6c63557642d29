"""How one matrix lies on disk: plain, as FP8 in blocks, or as packed codes. Each kind is read by flat ranges.

O rows, I columns, G groups of columns.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.hf.files import DiskTensor, Rows, is_floating, read_rows
from moetrain.hf.quantization import KEY, Fp8Blocks, PackedGroups, Quantization
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import Quantized, dequantize

_PLAIN = ("BF16", "F16", "F32", "F64")
_FP8, _FP8_SCALES = "F8_E4M3", ("F32", "BF16", "F8_E8M0")
_SCALE_SUFFIX = "_scale_inv"
_WEIGHT = ".weight"
_SHAPE_SUFFIX = ".weight_shape"


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A tensor whose file contains its values."""

    tensor: DiskTensor

    @property
    def name(self) -> str:
        """Name on disk."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.tensor.shape

    def read(self, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) in the dtype of the file."""
        return self.tensor.read(first=first, last=last)


@dataclass(frozen=True, kw_only=True)
class Fp8Matrix:
    """A matrix in FP8: a value is the stored number times the scale of its block, in float32, rounded to bf16.

    The last block of an axis may be shorter. The scales may be in another file than the weights. The rule is that of
    DeepSeek-V3's conversion to bf16 (its inference code, `fp8_cast_bf16`).
    """

    weight: DiskTensor
    scales: DiskTensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        """Raise CheckpointError when the scales do not fit the matrix."""
        blocks = tuple(math.ceil(size / step) for size, step in zip(self.weight.shape, self.block, strict=False))
        if len(self.weight.shape) != 2 or self.scales.shape != blocks:
            raise CheckpointError(
                f"{self.scales.name} has shape {list(self.scales.shape)}: {self.weight.name} of shape "
                f"{list(self.weight.shape)} in blocks of {list(self.block)} requires {list(blocks)}"
            )
        if self.scales.dtype not in _FP8_SCALES:
            raise CheckpointError(
                f"{self.scales.name} has dtype {self.scales.dtype}: {', '.join(_FP8_SCALES)} are read"
            )

    @property
    def name(self) -> str:
        """Name of the weight on disk."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.weight.shape

    def read(self, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) in bf16; only the rows that contain them are read."""
        top, bottom = rows_of(first, last, columns=self.shape[1])
        rows, columns = self.block
        parts = {
            "weight": Rows(tensor=self.weight, top=top, bottom=bottom),
            "scales": Rows(tensor=self.scales, top=top // rows, bottom=math.ceil(bottom / rows)),
        }
        stored = read_rows(parts)
        by_row = stored["scales"].float().repeat_interleave(rows, 0)[top % rows :][: bottom - top]
        by_element_OI = by_row.repeat_interleave(columns, 1)[:, : self.shape[1]]
        values_OI = (stored["weight"].float() * by_element_OI).to(torch.bfloat16)
        return cut(values_OI, first=first, last=last, top=top)


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A matrix as packed codes and scales, in a format of `quant.formats`. tensors: the stored ones, by suffix."""

    module: str
    tensors: Mapping[str, DiskTensor]
    groups: PackedGroups

    @property
    def name(self) -> str:
        """Name that the unpacked weight has on disk."""
        return self.module + _WEIGHT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, from that of its scales; `stored_tensors` checks that the codes fit it."""
        rows, groups = self.tensors[".weight_scale"].shape
        return rows, groups * self.groups.group_size

    def rows(self, *, top: int, bottom: int) -> Quantized:
        """Return codes and scales of the rows [top, bottom), as stored.

        Raises CheckpointError when they are inconsistent, or when bf16 cannot hold a scale.
        """
        parts = {suffix: Rows(tensor=tensor, top=top, bottom=bottom) for suffix, tensor in self.tensors.items()}
        if shape := self.tensors.get(_SHAPE_SUFFIX):
            parts[_SHAPE_SUFFIX] = Rows(tensor=shape, top=0, bottom=2)
        stored = read_rows(parts)
        if shape and (stated := stored[_SHAPE_SUFFIX].tolist()) != list(self.shape):
            raise CheckpointError(f"{shape.name} is {stated}, but the scales are those of {list(self.shape)}")
        stored = {suffix: _in_bf16(tensor, name=self.tensors[suffix].name) for suffix, tensor in stored.items()}
        if shape:
            stored[_SHAPE_SUFFIX] = torch.tensor([bottom - top, self.shape[1]])
        try:
            quantized = FORMATS[self.groups.format].decode(stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self.module}: {error}") from error
        if not bool(torch.isfinite(16 * quantized.scales_XOG).all()):
            raise CheckpointError(
                f"{self.module}.weight_scale holds numbers that are not finite, or that make such weights: copy the "
                "folder again"
            )
        return quantized

    def read(self, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) in bf16, each a code times its scale, rounded once."""
        top, bottom = rows_of(first, last, columns=self.shape[1])
        return cut(dequantize(self.rows(top=top, bottom=bottom)), first=first, last=last, top=top)


Stored = Plain | Fp8Matrix | PackedMatrix


def stored_tensors(disk: Mapping[str, DiskTensor], quantization: Quantization | None) -> dict[str, Stored]:
    """Return every tensor by the name that it has on disk when it is not quantised.

    disk: tensors by name, without those that are not used. What a tensor is follows from the tensors beside it: one
    with a scale is quantised, one without is plain. Raises CheckpointError for a dtype that is not read, and for a
    quantised matrix that lacks a part or that config.json states to be plain.
    """
    stored: dict[str, Stored] = {}
    left = dict(disk)
    if isinstance(quantization, PackedGroups):
        for matrix in _packed(disk, quantization):
            stored[matrix.name] = matrix
            for suffix in matrix.tensors:
                del left[matrix.module + suffix]
    for name in [name for name in left if name.endswith(_WEIGHT + _SCALE_SUFFIX)]:
        weight_name = name.removesuffix(_SCALE_SUFFIX)
        if not isinstance(quantization, Fp8Blocks):
            raise CheckpointError(
                f"{name} is a scale of FP8, and config.json states no quantization_config of FP8: copy config.json "
                "again"
            )
        if weight_name not in left:
            raise CheckpointError(f"{weight_name} is missing, and its scales {name} are there: copy the folder again")
        weight, scales = left.pop(weight_name), left.pop(name)
        if weight.dtype != _FP8:
            raise CheckpointError(f"{weight.name} has dtype {weight.dtype} and a scale: only {_FP8} is read with one")
        stored[weight_name] = Fp8Matrix(weight=weight, scales=scales, block=quantization.block)
    for name, tensor in left.items():
        if tensor.dtype not in _PLAIN:
            raise CheckpointError(_unknown(tensor, quantization))
        if name in stored:
            raise CheckpointError(f"{name} is there twice, plain and packed: remove one of them")
        stored[name] = Plain(tensor=tensor)
    return stored


def _packed(disk: Mapping[str, DiskTensor], groups: PackedGroups) -> Iterator[PackedMatrix]:
    suffixes = FORMATS[groups.format].suffixes
    modules = dict.fromkeys(name.removesuffix(suffix) for name in disk for suffix in suffixes if name.endswith(suffix))
    for module in modules:
        parts = {suffix: disk.get(module + suffix) for suffix in suffixes}
        tensors = {suffix: tensor for suffix, tensor in parts.items() if tensor is not None}
        if missing := parts.keys() - tensors.keys():
            raise CheckpointError(f"{module}{min(missing)} is missing: a packed matrix requires {', '.join(suffixes)}")
        if any(len(tensor.shape) != (1 if suffix == _SHAPE_SUFFIX else 2) for suffix, tensor in tensors.items()):
            raise CheckpointError(f"{module}: a packed matrix has two axes; experts that are packed fused are not read")
        if (shape := tensors.get(_SHAPE_SUFFIX)) and shape.shape != (2,):
            raise CheckpointError(f"{module}{_SHAPE_SUFFIX} has shape {list(shape.shape)}: it holds two numbers, [2]")
        for suffix, tensor in tensors.items():
            if tensor.dtype not in (read := FORMATS[groups.format].dtypes.get(suffix, (tensor.dtype,))):
                raise CheckpointError(f"{module}{suffix} has dtype {tensor.dtype}: {', '.join(read)} are read")
        if tensors[".weight_packed"].shape[0] != tensors[".weight_scale"].shape[0]:
            raise CheckpointError(f"{module}: weight_packed and weight_scale have different numbers of rows")
        codes = tensors[suffixes[0]].shape[1] * FORMATS[groups.format].codes_per_element
        if codes != (scales := tensors[".weight_scale"].shape[1]) * groups.group_size:
            raise CheckpointError(
                f"{module}: a row has {codes} codes and {scales} scales, but config.json states group_size "
                f"{groups.group_size}: copy the folder again, or correct {KEY} in config.json"
            )
        on_disk = tensors[suffixes[0]].name.removesuffix(suffixes[0])
        if groups.ignores(on_disk):
            raise CheckpointError(
                f"{on_disk} is packed, but quantization_config.ignore in config.json names it as plain"
            )
        yield PackedMatrix(module=module, tensors=tensors, groups=groups)


def rows_of(first: int, last: int, *, columns: int) -> tuple[int, int]:
    """Return the rows [top, bottom) of a matrix that contain the elements [first, last)."""
    return first // columns, math.ceil(last / columns)


def cut(rows_OI: Tensor, *, first: int, last: int, top: int) -> Tensor:
    """Return the elements [first, last) of a matrix from its rows, of which `top` is the first. 1-D."""
    start = top * rows_OI.shape[1]
    return rows_OI.reshape(-1)[first - start : last - start]


def _in_bf16(tensor: Tensor, *, name: str) -> Tensor:
    """Return scales in bf16, the dtype that codes are multiplied in, and other tensors as they are."""
    if not is_floating(tensor) or tensor.dtype is torch.bfloat16:
        return tensor
    rounded = tensor.to(torch.bfloat16)
    if not torch.equal(rounded.to(tensor.dtype), tensor):
        raise CheckpointError(f"{name} is {tensor.dtype} and bf16 cannot hold its numbers: give scales in bf16")
    return rounded


def _unknown(tensor: DiskTensor, quantization: Quantization | None) -> str:
    stated = {
        NoneType: "states no quantization_config",
        Fp8Blocks: "states FP8 in blocks",
        PackedGroups: "states packed experts",
    }[type(quantization)]
    return (
        f"{tensor.path}: {tensor.name} has dtype {tensor.dtype}, which is not read here ({', '.join(_PLAIN)}; "
        f"{_FP8} with its {_SCALE_SUFFIX}; packed experts), and config.json {stated}: give the bf16 weights"
    )
