"""Compares a GGUF export with its masters, and runs it in llama.cpp where that is installed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.commands.verify import ExportFault
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.export.folder import read_record, write_record
from moetrain.export.gguf_file import GGUF_FILE, read_gguf, tensor_places
from moetrain.export.gguf_metadata import model_metadata, tokenizer_metadata
from moetrain.export.read import Export, read_export
from moetrain.export.tensors import folder_tensors
from moetrain.interpreters import ForeignProgram, find_interpreter
from moetrain.model.transformer import Transformer
from moetrain.quant.grids import Quantized, codes_of
from moetrain.runtime import torch_stream
from moetrain.stage_files import EXPORT_RECORD
from moetrain.verify.consumer import Verified
from moetrain.verify.exports import NORM_FAULT
from moetrain.verify.llama import ask_llama, llama_rows
from moetrain.verify.llama_rounding import round_inputs
from moetrain.verify.masters import Masters, plain
from moetrain.verify.table import Row

_FLOAT32_RTOL = 2.0**-22
"""Rounding of a float32 number that is multiplied by a factor and divided by it again."""
_FIRST_EXPERTS = "ffn_gate_exps.weight"


def verify_gguf(
    folder: Path,
    *,
    masters: Masters,
    seed: int = 0,
    num_rows: int = 4,
    num_tokens: int = 64,
    llama_python: str | None = None,
    fault: ExportFault = ExportFault.none,
) -> Verified:
    """Compare the GGUF export in `folder` with its fp32 `masters`, and with llama.cpp on rows of random tokens.

    llama_python: interpreter of an environment with llama-cpp-python, see `find_interpreter`; without it, llama.cpp is
    skipped.
    """
    with _planted(folder, fault=fault) as read_folder:
        export = read_export(read_folder)
        tokenizer = Tokenizer.load(read_folder)
        rows = list(_file_rows(export, masters=masters))
        rows.append(_metadata_row(export, tokenizer=tokenizer))
        python = find_interpreter(ForeignProgram.llama, llama_python)
        if python is None and fault is ExportFault.norm:
            cure = ForeignProgram.llama.cure
            raise ConfigError(f"fault is {fault}, which only llama.cpp shows: give code or scale; {cure}")
        if python is None:
            why = f"llama.cpp: llama-cpp-python is not installed; {ForeignProgram.llama.cure}"
            return Verified(rows=rows, skipped=[why])
        tokens_BT = torch.randint(
            export.model.vocab_size, (num_rows, num_tokens), generator=torch_stream(seed, "verify.exports")
        )
        path = read_folder / GGUF_FILE
        answer = ask_llama(python, model=path, tokens_BT=tokens_BT)
        rows += llama_rows(
            answer,
            model=_model(export, fault=fault),
            rounded=round_inputs(_model(export, fault=fault), export),
            tokens_BT=tokens_BT,
            tokenizer=tokenizer,
            types={place.type for place in tensor_places(path).values()},
        )
    return Verified(rows=rows, skipped=[])


def _file_rows(export: Export, *, masters: Masters) -> Iterator[Row]:
    """Yield the comparison of the file's tensors with the masters'."""
    tensors = folder_tensors(export.model)
    codes = scales = num_codes = num_scales = 0
    for name, file in export.experts.items():
        ours = codes_of(masters[name], grid=export.quant.grid, group_size=export.quant.group_size)
        codes += int((ours.codes_XOI != file.codes_XOI).sum())
        scales += int((ours.scales_XOG != file.scales_XOG).sum())
        num_codes += file.codes_XOI.numel()
        num_scales += file.scales_XOG.numel()
    if export.experts:
        yield Row(name="codes that differ from the masters'", value=codes, bound=0, note=f"of {num_codes} in the file")
        yield Row(
            name="scales that differ from the masters'", value=scales, bound=0, note=f"of {num_scales} in the file"
        )
    is_float32 = export.record["gguf_dtype"] == "float32"
    differing = [
        name
        for name, found in export.dense.items()
        if not _is_same(found, plain(masters, name) if is_float32 else tensors.stored(name, plain(masters, name)))
    ]
    note = f"of {len(export.dense)} in the file" + (f"; the first: {differing[0]}" if differing else "")
    yield Row(name="other tensors that differ", value=len(differing), bound=0, note=note)


def _is_same(found: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor of the file is the expected one; float32 may have been scaled and scaled back."""
    if expected.dtype is torch.float32:
        return torch.allclose(found, expected, rtol=_FLOAT32_RTOL, atol=0)
    return torch.equal(found.to(expected.dtype), expected)


def _metadata_row(export: Export, *, tokenizer: Tokenizer) -> Row:
    stored = read_gguf(export.path / GGUF_FILE)[0]
    expected = model_metadata(export.model) | tokenizer_metadata(tokenizer, num_rows=export.model.vocab_size)
    differing = [key for key, value in expected.items() if not _is_same_value(stored.get(key), value)]
    note = f"of {len(expected)} keys" + (f"; the first: {differing[0]}" if differing else "")
    return Row(name="metadata that differ from model and tokenizer", value=len(differing), bound=0, note=note)


def _is_same_value(found: Any, expected: object) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float) and torch.tensor(expected).item() == found  # the file has float32
    return bool(found == expected)


def _model(export: Export, *, fault: ExportFault) -> Transformer:
    """Return our model with the numbers that the file stands for: code times scale, not rounded to bf16."""
    model = Transformer(export.model, compute_dtype=torch.float32)
    weights = export.dense | {name: _products(quantized) for name, quantized in export.experts.items()}
    model.load_state_dict(weights)
    if fault is ExportFault.norm:
        with torch.no_grad():
            model.model.norm.weight.mul_(NORM_FAULT)
    return model


def _products(quantized: Quantized) -> Tensor:
    scales_XOI = quantized.scales_XOG.float().repeat_interleave(quantized.group_size, -1)
    return quantized.codes_XOI.float() * scales_XOI


@contextmanager
def _planted(folder: Path, *, fault: ExportFault) -> Iterator[Path]:
    """Yield the folder, or a temporary copy whose first block of experts contains the fault."""
    if fault not in (ExportFault.code, ExportFault.scale):
        yield folder
        return
    record = read_record(folder)
    del record["files"], record["format"]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "export"
        shutil.copytree(folder, copy)
        path = copy / GGUF_FILE
        first = min(place.offset for name, place in tensor_places(path).items() if name.endswith(_FIRST_EXPERTS))
        with path.open("r+b") as file:
            file.seek(first + (2 if fault is ExportFault.code else 1))  # after the scale, or its high byte
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ (1 if fault is ExportFault.code else 4)]))
        (copy / EXPORT_RECORD).unlink()
        write_record(copy, record)
        yield copy
