"""Compares a quantised export with the master weights, with transformers, and with our own model.

transformers reads the folder with its own classes and compressed-tensors, so no code of this package affects those
logits. Shape letters: B rows, T tokens, V vocabulary.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.commands.verify import ExportFault
from moetrain.errors import ConfigError
from moetrain.export.compressed_tensors import module_of
from moetrain.export.config import ExportFormat
from moetrain.export.folder import open_weights, read_record, write_record
from moetrain.export.read import Export, read_export
from moetrain.export.tensors import folder_tensors
from moetrain.hf.names import copied_name
from moetrain.hf.shape import to_hf_config
from moetrain.model.transformer import Transformer
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import Quantized, codes_of, dequantize
from moetrain.runtime import torch_stream
from moetrain.stage_files import EXPORT_RECORD
from moetrain.verify.consumer import logits_of
from moetrain.verify.masters import Masters, plain
from moetrain.verify.table import Row

FP32_BOUND = 1e-5
"""Bound on the largest difference of fp32 logits, divided by max(1, largest logit). It allows for another order of
summation."""

NORM_FAULT = 1.001
"""Factor of the fault `norm`."""


def verify_exports(
    folder: Path,
    *,
    masters: Masters,
    seed: int = 0,
    num_rows: int = 4,
    num_tokens: int = 64,
    fault: ExportFault = ExportFault.none,
) -> list[Row]:
    """Compare the quantised export in `folder` with its fp32 `masters` (by their name in memory); return the rows.

    Logits are computed on `num_rows` rows of `num_tokens` random tokens. Raises `CheckpointError` for a damaged folder,
    and `ConfigError` for an export that is not quantised. `verify.bf16` compares exports in bf16.
    """
    with _with_fault(folder, fault=fault) as read_folder:
        export = read_export(read_folder)
        if export.format is not ExportFormat.quantized:
            wanted = f"export.format={ExportFormat.quantized}"
            raise ConfigError(f"{folder} is an export of format {export.format}: give an export with {wanted}")
        title = FORMATS[export.quant.format].title
        quantized = {
            name: codes_of(masters[name], grid=export.quant.grid, group_size=export.quant.group_size)
            for name in export.experts
        }
        tokens_BT = torch.randint(
            export.model.vocab_size, (num_rows, num_tokens), generator=torch_stream(seed, "verify.exports")
        )
        expected = _expected_weights(export, masters=masters, quantized=quantized)
        rows = [*_file_rows(export, expected=expected, quantized=quantized)]
        for dtype in (torch.bfloat16, torch.float32):
            loaded = transformers_model(read_folder, dtype=dtype)
            theirs_BTV = transformers_logits(loaded, tokens_BT)
            reference_BTV = transformers_logits(_reference_model(export, loaded=loaded, weights=expected), tokens_BT)
            differing = int((theirs_BTV != reference_BTV).sum() + theirs_BTV.isnan().sum())
            name = f"{str(dtype).removeprefix('torch.')}: {title} file against dequantised weights"
            note = f"of {theirs_BTV.numel()} logits of transformers"
            rows.append(Row(name=name, value=differing, bound=0, note=note))
        ours_BTV = logits_of(float32_model(export, fault=fault), tokens_BT)
        rows.append(agreement_row(ours_BTV, theirs_BTV))  # float32, the last dtype of the loop
        rows.append(_size_row(export, title=title))
    return rows


def _expected_weights(export: Export, *, masters: Masters, quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """Return the weights that training computes with, derived from the masters and not from the file."""
    tensors = folder_tensors(export.model)
    return {
        name: dequantize(quantized[name]) if name in quantized else tensors.stored(name, plain(masters, name))
        for name in tensors.shapes
    }


def _file_rows(export: Export, *, expected: Mapping[str, Tensor], quantized: Mapping[str, Quantized]) -> Iterator[Row]:
    pairs = [(quantized[name], export.experts[name]) for name in quantized]
    codes = sum(int((ours.codes_XOI != file.codes_XOI).sum()) for ours, file in pairs)
    scales = sum(int((ours.scales_XOG != file.scales_XOG).sum()) for ours, file in pairs)
    num_codes = sum(ours.codes_XOI.numel() for ours, _ in pairs)
    num_scales = sum(ours.scales_XOG.numel() for ours, _ in pairs)
    yield Row(name="codes that differ from the masters'", value=codes, bound=0, note=f"of {num_codes} in the file")
    yield Row(name="scales that differ from the masters'", value=scales, bound=0, note=f"of {num_scales} in the file")
    others = [name for name in expected if name not in quantized]
    differing = sum(not torch.equal(expected[name].float(), export.dense[name].float()) for name in others)
    differing += differing_copies(export, expected)
    number = len(others) + len(export.copies)
    yield Row(name="other tensors that differ", value=differing, bound=0, note=f"of {number} in the file")


def differing_copies(export: Export, expected: Mapping[str, Tensor]) -> int:
    """Return how many copies of tensors in modules of multi-token prediction differ from what they are copies of."""
    originals = {name: copied_name(name) for name in export.copies}
    return sum(
        original is None or not torch.equal(export.copies[name].float(), expected[original].float())
        for name, original in originals.items()
    )


def agreement_row(ours_BTV: Tensor, theirs_BTV: Tensor) -> Row:
    """Return the comparison of our float32 logits with those of transformers."""
    largest = float(theirs_BTV.abs().max())
    difference = float((ours_BTV - theirs_BTV).abs().max())
    return Row(
        name="our fp32 logits against transformers'",
        value=difference / max(1.0, largest),
        bound=FP32_BOUND,
        note=f"largest difference {difference:.2e}, largest logit {largest:.2f}",
    )


def _size_row(export: Export, *, title: str) -> Row:
    report = export.record["report"]
    num_packed, num_bf16 = int(report["num_bytes"]), int(report["num_bytes_bf16"])
    return Row(
        name=f"bytes of {title} over bytes of bf16",
        value=num_packed / num_bf16,
        bound=1.0,
        note=f"{num_packed} over {num_bf16}; {report['num_zero_groups']} of {report['num_groups']} groups are zero",
    )


def transformers_model(folder: Path, *, dtype: torch.dtype) -> Any:
    """Load the folder with transformers and return the model with every weight in `dtype`.

    transformers keeps unpacked experts in the dtype of their scales (bf16) whatever `dtype` is, so they are cast here.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _reference_model(export: Export, *, loaded: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' model with `weights`, each cast to the dtype of the same weight in `loaded`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(export.model)))
    model.load_state_dict({name: weights[name].to(dtypes[name]) for name in dtypes}, assign=True)
    return model.eval()


@torch.no_grad()
def transformers_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return the logits of transformers' model [B, T, V]."""
    logits_BTV: Tensor = model(tokens_BT).logits
    return logits_BTV


def float32_model(export: Export, *, fault: ExportFault) -> Transformer:
    """Return our model, which computes in float32, with the weights of an export."""
    model = Transformer(export.model, compute_dtype=torch.float32)
    model.load_state_dict(export.weights())
    if fault is ExportFault.norm:
        with torch.no_grad():
            model.model.norm.weight.mul_(NORM_FAULT)
    return model


@contextmanager
def _with_fault(folder: Path, *, fault: ExportFault) -> Iterator[Path]:
    """Yield the folder, or a temporary copy whose first packed matrix contains the fault."""
    if fault not in (ExportFault.code, ExportFault.scale):
        yield folder
        return
    record = read_record(folder)
    format = FORMATS[read_export(folder).quant.format]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "export"
        shutil.copytree(folder, copy)
        files = open_weights(copy)
        module = min(module_of(name, format=format) for name in files if name.endswith(format.suffixes))
        changed = format.named(module, _with_changed_value(format.read(module, files), fault=fault))
        for path in copy.glob("*.safetensors"):
            tensors = load_file(path)
            if here := {name: tensor for name, tensor in changed.items() if name in tensors}:
                save_file(tensors | here, path, metadata={"format": "pt"})
        (copy / EXPORT_RECORD).unlink()
        write_record(copy, record)
        yield copy


def _with_changed_value(quantized: Quantized, *, fault: ExportFault) -> Quantized:
    codes_OI, scales_OG = quantized.codes_XOI.clone(), quantized.scales_XOG.clone()
    if fault is ExportFault.code:
        codes_OI[0, 0] = 0 if codes_OI[0, 0] else 1
    else:
        scales_OG[0, 0] *= 2
    return Quantized(codes_XOI=codes_OI, scales_XOG=scales_OG)
