"""Reads an export: checks its digests, then returns its model, its weights, and its codes and scales."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint.read import read_json
from moetrain.errors import CheckpointError
from moetrain.export.compressed_tensors import unpacked_experts
from moetrain.export.config import ExportFormat
from moetrain.export.folder import CONFIG_FILE, open_weights, read_record, stated_record
from moetrain.export.gguf_file import GGUF_FILE, read_gguf
from moetrain.export.gguf_tensors import tensors_of_gguf
from moetrain.export.tensors import folder_tensors
from moetrain.hf.names import copied_name, fused_tensors, used_names
from moetrain.hf.shape import from_hf_config
from moetrain.model.config import ModelConfig
from moetrain.quant.config import FormatName, QuantConfig, quant_config
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import Quantized, dequantize
from moetrain.stage_files import EXPORT_RECORD


@dataclass(kw_only=True)
class Export:
    """An export in memory. Tensors have the names of the model in memory, with fused experts."""

    path: Path
    format: ExportFormat
    model: ModelConfig
    quant: QuantConfig
    """Format and grid of the experts; not enabled when the experts are cast masters."""
    step: int
    record: dict[str, Any]
    """Content of moetrain.json."""
    dense: dict[str, Tensor]
    """Tensors stored in bf16 or fp32; in the bf16 formats these are all tensors."""
    experts: dict[str, Quantized]
    """Codes and scales of the routed experts; empty in the bf16 formats."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies that modules of multi-token prediction have of other tensors, by the name of the copy."""

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor of the model: bf16 or fp32 as stored, quantised experts dequantised to bf16."""
        return dict(ExportTensors(self))

    def packed_experts(self) -> dict[str, int]:
        """Return name and number of experts of the tensors that are stored as codes and scales; see `CodeReader`."""
        return {name: len(quantized.codes_XOI) for name, quantized in self.experts.items()}

    def codes(self, name: str, *, first: int, last: int) -> Quantized:
        """Return codes and scales of the experts [first, last) of a tensor; see `CodeReader`."""
        whole = self.experts[name]
        return Quantized(codes_XOI=whole.codes_XOI[first:last], scales_XOG=whole.scales_XOG[first:last])


class ExportTensors(Mapping[str, Tensor]):
    """The weights of an export by name. Experts that are stored as codes are dequantised to bf16 on access.

    Implements `StateReader`, too: a range dequantises the experts that it touches.
    """

    def __init__(self, export: Export) -> None:
        self._export = export

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor."""
        quantized = self._export.experts.get(name)
        return self._export.dense[name] if quantized is None else dequantize(quantized)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter([*self._export.dense, *self._export.experts])

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._export.dense) + len(self._export.experts)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor."""
        dense = {name: tuple(tensor.shape) for name, tensor in self._export.dense.items()}
        return dense | {name: tuple(quantized.codes_XOI.shape) for name, quantized in self._export.experts.items()}

    def read(self, name: str, *, first: int, last: int) -> Tensor:
        """Return the elements [first, last) of a flattened tensor."""
        if name not in self._export.experts:
            return self._export.dense[name].reshape(-1)[first:last]
        size = self._export.experts[name].codes_XOI[0].numel()
        begin, end = first // size, -(-last // size)
        part = dequantize(self._export.codes(name, first=begin, last=end)).reshape(-1)
        return part[first - begin * size : last - begin * size]


def is_export(folder: Path) -> bool:
    """Return whether `folder` contains the record of an export; its content is not checked."""
    return (folder / EXPORT_RECORD).is_file()


def export_format(folder: Path) -> ExportFormat:
    """Return how the routed experts of an export are stored."""
    return _format_of(stated_record(folder), folder)


def read_export(folder: Path) -> Export:
    """Return an export after checking the digest of every file and the shape of every tensor.

    Raises CheckpointError that names the file or tensor that does not fit.
    """
    record = read_record(folder)
    model = from_hf_config(read_json(folder / CONFIG_FILE))
    copies: dict[str, Tensor] = {}
    quant, stored = quant_of_record(record, folder), _format_of(record, folder)
    if stored is ExportFormat.gguf:
        dense, experts = tensors_of_gguf(read_gguf(folder / GGUF_FILE)[1], model=model, tensors=folder_tensors(model))
    else:
        files = open_weights(folder)
        used = used_names(files, num_layers=model.num_layers, num_mtp_layers=model.num_mtp_layers).names
        copies = {name: files[name] for name in files if name not in used and copied_name(name) is not None}
        format = FORMATS[quant.format]
        packed = {name for name in used if name.endswith(format.suffixes)}
        experts = unpacked_experts({name: files[name] for name in used if name in packed}, format=format)
        dense = fused_tensors({name: files[name] for name in used if name not in packed})
    export = Export(
        path=folder,
        format=stored,
        model=model,
        quant=quant,
        step=record["step"],
        record=record,
        dense=dense,
        experts=experts,
        copies=copies,
    )
    tensors = folder_tensors(model)
    tensors.check(ExportTensors(export))
    for name, quantized in experts.items():
        if name not in tensors.experts or quantized.group_size != export.quant.group_size:
            raise CheckpointError(
                f"{folder}: {name} is quantised in groups of {quantized.group_size}: {EXPORT_RECORD} states another "
                "size, export again"
            )
    return export


def quant_of_record(record: Mapping[str, Any], folder: Path) -> QuantConfig:
    """Return format and grid of the experts from a record; not enabled when the experts are cast masters."""
    grid = record["grid"]
    if grid is None:
        return QuantConfig()
    fields = {"enabled": True, "grid": grid["name"], **{name: grid[name] for name in grid if name != "name"}}
    try:
        return quant_config(fields)
    except ValueError as error:
        raise CheckpointError(f"{folder / EXPORT_RECORD}: {error}; export again with this version") from error


def _format_of(record: Mapping[str, Any], folder: Path) -> ExportFormat:
    """Return how the experts are stored. For packed experts, the record names the quantisation format instead."""
    stored = record["report"]["format"]
    if stored in list(FormatName):
        return ExportFormat.quantized
    try:
        return ExportFormat(stored)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / EXPORT_RECORD}: format is {stored!r}, which this version does not read; export again"
        ) from error
