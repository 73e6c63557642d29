"""Writes a checkpoint as a folder that transformers and other engines load: weights, config, tokenizer, template."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.chat.pieces import BOS, EOS, PAD
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import CheckpointError
from moetrain.export.compressed_tensors import packed_tensors, quantization_config
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.consumers import consumer_reasons
from moetrain.export.experts import ExpertCodes
from moetrain.export.folder import CONFIG_FILE, atomic_folder, write_record, write_weights
from moetrain.export.gguf_file import GGUF_FILE, write_gguf
from moetrain.export.gguf_metadata import model_metadata, tokenizer_metadata
from moetrain.export.gguf_tensors import gguf_tensors
from moetrain.export.tensors import FiniteReader, FolderTensors, folder_tensors
from moetrain.files import write_json
from moetrain.hf.consumers import PLAIN_LAYERS, check_consumers
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ModelConfig
from moetrain.parallel.protocol import StateReader
from moetrain.parallel.state import WithoutMtp
from moetrain.quant.config import QuantConfig
from moetrain.quant.consumers import Consumer
from moetrain.quant.formats import FORMATS
from moetrain.quant.grids import check_group_size, dequantize
from moetrain.quant.masters import CodeReader

_log = logging.getLogger(__name__)

_BYTES_PER_MEGABYTE = 1 << 20
_BYTES_PER_BF16 = 2
_BYTES_PER_FP32 = 4


@dataclass(kw_only=True)
class ExportReport:
    """Sizes of an export. Bytes count tensors, without the headers of files."""

    format: str
    """Name of the quantisation format if experts are packed, else of the `ExportFormat`."""
    num_bytes: int = 0
    """Bytes of the weights as stored."""
    num_bytes_bf16: int = 0
    """Bytes of the same weights with experts in bf16."""
    num_quantized: int = 0
    """Number of parameters that were quantised."""
    num_groups: int = 0
    """Number of groups of those parameters; each has one scale."""
    num_zero_groups: int = 0
    """Number of groups whose codes are all zero, because their weights were zero or too small for a scale."""
    num_changed_groups: int = 0
    """Number of groups that were exported with their original codes and scales, and that quantising again with the grid
    in the record would change."""

    def count(self, experts: ExpertCodes) -> None:
        """Take the counts of the experts that were written."""
        self.num_quantized, self.num_groups = experts.num_quantized, experts.num_groups
        self.num_zero_groups, self.num_changed_groups = experts.num_zero_groups, experts.num_changed


CONTEXT = "context"
"""Key of the record with the context policy that the weights were trained with; null where it is unknown."""


def export_model(
    reader: StateReader,
    *,
    folder: Path,
    model: ModelConfig,
    quant: QuantConfig,
    export: ExportConfig,
    tokenizer: Tokenizer,
    step: int,
    sources: Mapping[str, str],
    context: Mapping[str, Any] | None = None,
    codes: CodeReader | None = None,
) -> ExportReport:
    """Write the parameters and buffers of a checkpoint as the Hugging Face folder `folder`.

    reader: fp32 tensors by name in memory. They are streamed: one expert (or one other tensor) is read at a time, and
    at most twice `export.shard_megabytes` of tensors to write are in memory beside it.

    codes: experts that the weights have as codes and scales already. They are written as they are, and the record
    names a grid that reproduces all of them, or as many as possible.

    Experts are quantised with `quant`'s grid and group size: in quantized and bf16_dequantized always, in gguf if
    `quant` is enabled, in bf16 never. `step`, `sources` (such as the path of the checkpoint and the digest of the data)
    and `context` (the context policy of training) are stored in moetrain.json. The folder is written atomically and
    replaces an older export. Raises CheckpointError when the weights do not fit the model or the tokenizer, and
    ConfigError when one of `export.consumers` would compute the model differently.
    """
    export.check_library()
    reader, model = _without_modules(reader, model, format=export.format)
    reasons = export_reasons(model, quant, format=export.format)
    check_consumers(reasons, export.wanted)
    tensors = folder_tensors(model)
    tensors.check_shapes(reader)
    _check_rows(tokenizer, model)
    experts = ExpertCodes(reader := FiniteReader(reader), codes, quant=quant, shapes=tensors.shapes)
    is_packed = export.format is ExportFormat.quantized
    _add_plain_layers(reasons, tensors, experts=experts, export=export)
    report = ExportReport(format=quant.format.value if is_packed else export.format.value)
    with atomic_folder(folder) as partial:
        if export.format is ExportFormat.gguf:
            _write_gguf(
                partial, reader, model=model, quant=quant, export=export, tokenizer=tokenizer, tensors=tensors,
                experts=experts, report=report,
            )  # fmt: skip
        else:
            written = _disk_tensors(reader, tensors=tensors, experts=experts, format=export.format, report=report)
            report.num_bytes = write_weights(partial, written, shard_bytes=export.shard_megabytes * _BYTES_PER_MEGABYTE)
        report.count(experts)
        quant = replace(quant, grid=experts.grid)
        config = _config(model, quant, export=export, ignore=_ignored(tensors, experts), tokenizer=tokenizer)
        write_json(partial / CONFIG_FILE, config, indent=2)
        write_json(partial / "generation_config.json", _generation_config(tokenizer), indent=2)
        tokenizer.save(partial)
        write_record(
            partial,
            _record(quant, report, tokenizer=tokenizer, step=step, sources=sources)
            | {"consumers": reasons, "gguf_dtype": export.gguf_dtype.value, CONTEXT: context},
        )
    _log_report(folder, report, reasons=reasons)
    return report


def _add_plain_layers(
    reasons: dict[Consumer, list[str]], tensors: FolderTensors, *, experts: ExpertCodes, export: ExportConfig
) -> None:
    """Add the reason of an export with layers whose experts are plain. Raises ConfigError as `check_consumers`."""
    if export.format is ExportFormat.quantized and not all(map(experts.quantizes, tensors.experts)):
        reasons[Consumer.transformers].append(PLAIN_LAYERS)
        check_consumers(reasons, export.consumers or [])


def _without_modules(
    reader: StateReader, model: ModelConfig, *, format: ExportFormat
) -> tuple[StateReader, ModelConfig]:
    """Return weights and shape; for GGUF without modules of multi-token prediction, which are not written there."""
    if format is not ExportFormat.gguf or not model.num_mtp_layers:
        return reader, model
    _log.info("the modules of multi-token prediction are left out: they are not written to GGUF")
    return WithoutMtp(reader, model, kept=0), replace(model, num_mtp_layers=0)


def _ignored(tensors: FolderTensors, experts: ExpertCodes) -> list[str]:
    """Return what compressed-tensors must not read as quantised: other linears, and experts that are written plain."""
    plain = {name.rpartition(".")[0] for name in tensors.experts if not experts.quantizes(name)}
    return [*tensors.unquantized_linears, *(f"re:{re.escape(module)}\\..*" for module in plain)]


def _check_rows(tokenizer: Tokenizer, model: ModelConfig) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {model.vocab_size} rows: "
            "use the tokenizer that the model was trained with"
        )


def _log_report(folder: Path, report: ExportReport, *, reasons: Mapping[Consumer, list[str]]) -> None:
    _log.info(
        "exported %s as %s: %.1f MB (%.1f MB in bf16), %d parameters quantised, %d of %d groups zero",
        folder,
        report.format,
        report.num_bytes / _BYTES_PER_MEGABYTE,
        report.num_bytes_bf16 / _BYTES_PER_MEGABYTE,
        report.num_quantized,
        report.num_zero_groups,
        report.num_groups,
    )
    if report.num_changed_groups:
        _log.warning(
            "%d of %d groups keep codes and scales that no grid reproduces: the export is exact, but training from it "
            "changes them",
            report.num_changed_groups,
            report.num_groups,
        )
    for consumer, why in reasons.items():
        if why:
            _log.info("%s does not compute this export as it was trained: %s", consumer, "; ".join(why))
        else:
            _log.info("%s computes this export as it was trained", consumer)


def export_reasons(model: ModelConfig, quant: QuantConfig, *, format: ExportFormat) -> dict[Consumer, list[str]]:
    """Return the reasons of `consumer_reasons`, and those of the quantisation format where experts are quantised."""
    reasons = consumer_reasons(model, format)
    is_quantised = format is ExportFormat.quantized or (format is ExportFormat.gguf and quant.enabled)
    if is_quantised and model.num_moe_layers + model.num_mtp_layers:
        for consumer in Consumer:  # what llama.cpp cannot read of GGUF, the file cannot hold
            reader = Consumer.llama_cpp if format is ExportFormat.gguf else consumer
            reasons[consumer] += FORMATS[quant.format].obstacles(reader, quant.group_size)
    return reasons


def _write_gguf(
    folder: Path,
    reader: StateReader,
    *,
    model: ModelConfig,
    quant: QuantConfig,
    export: ExportConfig,
    tokenizer: Tokenizer,
    tensors: FolderTensors,
    experts: ExpertCodes,
    report: ExportReport,
) -> None:
    if quant.enabled:
        for inputs in (model.hidden_size, model.moe_intermediate_size):
            check_group_size(inputs, group_size=quant.group_size)
    metadata = model_metadata(model) | tokenizer_metadata(tokenizer, num_rows=model.vocab_size)
    planned = gguf_tensors(
        reader, model=model, tensors=tensors, experts=experts if quant.enabled else None, dtype=export.gguf_dtype
    )
    report.num_bytes = write_gguf(folder / GGUF_FILE, metadata=metadata, tensors=planned)
    report.num_bytes_bf16 = sum(
        shape.numel() * (_BYTES_PER_FP32 if name in tensors.float32 else _BYTES_PER_BF16)
        for name, shape in tensors.shapes.items()
    )


def _disk_tensors(
    reader: StateReader,
    *,
    tensors: FolderTensors,
    experts: ExpertCodes,
    format: ExportFormat,
    report: ExportReport,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) for one tensor or expert after the other, and add their sizes to `report`."""
    for name, shape in tensors.shapes.items():
        for copy, original in tensors.copies.get(name, {}).items():
            whole = tensors.shapes[original]
            stored = tensors.stored(original, reader.read(original, first=0, last=whole.numel()).view(whole))
            report.num_bytes_bf16 += stored.nbytes
            yield copy, stored
        if name not in tensors.experts:
            stored = tensors.stored(name, reader.read(name, first=0, last=shape.numel()).view(shape))
            report.num_bytes_bf16 += stored.nbytes
            yield name, stored
            continue
        size = shape[1:].numel()
        for expert in range(shape[0]):
            report.num_bytes_bf16 += size * _BYTES_PER_BF16
            if format is ExportFormat.bf16 or not experts.quantizes(name):
                weight_1OI = reader.read(name, first=expert * size, last=(expert + 1) * size).view(1, *shape[1:])
                yield from hf_disk_tensors({name: tensors.stored(name, weight_1OI)}, first_expert=expert)
                continue
            quantized = experts.of(name, expert, top=0, bottom=shape[1])
            if format is ExportFormat.quantized:
                yield from packed_tensors(name, quantized, format=FORMATS[experts.format], first_expert=expert)
            else:
                yield from hf_disk_tensors({name: dequantize(quantized)}, first_expert=expert)


def _config(
    model: ModelConfig, quant: QuantConfig, *, export: ExportConfig, ignore: list[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    config = {**to_hf_config(model), "dtype": "bfloat16", **_token_ids(tokenizer)}
    if export.format is ExportFormat.quantized:
        config["quantization_config"] = quantization_config(quant, ignore=ignore)
    return config


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.special_ids
    return {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return _token_ids(tokenizer) | {"eos_token_id": tokenizer.end_ids}


def _record(
    quant: QuantConfig, report: ExportReport, *, tokenizer: Tokenizer, step: int, sources: Mapping[str, str]
) -> dict[str, Any]:
    grid = {"format": quant.format.value, "name": quant.grid.value, "group_size": quant.group_size}
    return {
        "step": step,
        "sources": dict(sources),
        "grid": grid if report.num_quantized else None,
        "tokenizer": tokenizer.digest,
        "report": asdict(report),
    }
