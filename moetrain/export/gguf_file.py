"""Writes a GGUF file one tensor at a time, and reads it back. The only module that uses the package gguf."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import CheckpointError, ConfigError
from moetrain.export.folder import not_written
from moetrain.export.gguf_metadata import ARCHITECTURE, Metadata
from moetrain.export.gguf_tensors import BLOCK, BLOCK_BYTES, GgufTensor, quantized_of
from moetrain.quant.grids import Quantized

GGUF_FILE = "model.gguf"
_ALL_FLOAT32, _MOSTLY_Q4_0, _MOSTLY_BF16 = 0, 2, 32
"""Values of `general.file_type`, which llama.cpp only displays."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Type of a tensor in a file, and the offset of its data."""

    type: str
    offset: int


def write_gguf(path: Path, *, metadata: Metadata, tensors: Iterable[GgufTensor]) -> int:
    """Write the file and return the bytes of its tensors. One tensor is in memory at a time."""
    gguf = _library()
    planned = list(tensors)
    types = {tensor.type for tensor in planned}
    file_type = _MOSTLY_Q4_0 if "Q4_0" in types else _MOSTLY_BF16 if "BF16" in types else _ALL_FLOAT32
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_file_type(file_type)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.type]
        # The writer wants bytes per row of a quantised tensor, given as a shape of uint8.
        shape = _byte_shape(tensor.shape) if tensor.type == "Q4_0" else tensor.shape
        stored = torch.uint8 if tensor.type == "Q4_0" else torch.float32
        numpy_type = torch.empty(0, dtype=stored).numpy().dtype
        writer.add_tensor_info(tensor.name, shape, numpy_type, tensor.num_bytes, raw_dtype=kind)
    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                writer.write_tensor_data(tensor.data())
    except OSError as error:
        raise not_written(path, error) from error
    return sum(tensor.num_bytes for tensor in planned)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor | Quantized]]:
    """Return metadata and tensors by their names in the file; Q4_0 as codes and scales.

    Raises CheckpointError when the file is damaged or contains another type.
    """
    gguf = _library()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = {tensor.name: _tensor_of(tensor, path) for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error}): export again") from error
    return metadata, tensors


def is_gguf(folder: Path) -> bool:
    """Return whether the export in `folder` is a GGUF file."""
    return (folder / GGUF_FILE).is_file()


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """Return type and place of every tensor of a file by name."""
    reader = _library().GGUFReader(path)
    return {
        tensor.name: TensorPlace(type=tensor.tensor_type.name, offset=int(tensor.data_offset))
        for tensor in reader.tensors
    }


def _tensor_of(tensor: Any, path: Path) -> Tensor | Quantized:
    shape = [int(size) for size in reversed(tensor.shape)]
    data = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type.name == "Q4_0":
        return quantized_of(data.view(*_byte_shape(tuple(shape))))
    if tensor.tensor_type.name == "BF16":
        return data.view(torch.bfloat16).view(shape)
    if tensor.tensor_type.name == "F32":
        return data.view(shape)
    raise CheckpointError(f"{path}: {tensor.name} has type {tensor.tensor_type.name}: moetrain writes F32, BF16, Q4_0")


def _byte_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES)


def _add(writer: Any, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"GGUF requires the package gguf, which is not installed ({error}): pip install 'moetrain[gguf]'"
        ) from error
    return gguf
