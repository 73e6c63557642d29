"""Reads weights of every kind, including exports. Loads torch, so import it after checking the input."""

import logging
from dataclasses import replace
from pathlib import Path

from moetrain.checkpoint.masters import MastersReader
from moetrain.checkpoint.origin import Origin, read_origin
from moetrain.checkpoint.shape import EXPORT as EXPORT
from moetrain.checkpoint.shape import mismatched_fields
from moetrain.commands.training import TrainingRun
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.folder import read_record
from moetrain.export.read import ExportTensors, export_format, is_export, quant_of_record, read_export
from moetrain.export.tensors import folder_tensors
from moetrain.files import sha256_of, user_path
from moetrain.hf.folder import HfFolder, open_hf_folder
from moetrain.inference.build import build_model
from moetrain.inference.mode import Mode
from moetrain.inference.protocol import Model
from moetrain.inference.speculation import Speculation
from moetrain.inference.weights import Tensors, TensorsWithCodes
from moetrain.kernels.build import Library
from moetrain.quant.config import QuantConfig
from moetrain.quant.masters import CodeReader
from moetrain.stage_files import EXPORT_RECORD

_log = logging.getLogger(__name__)


def read_weights(init_from: str) -> Origin:
    """Return the weights of a stage folder, a checkpoint, an export or a Hugging Face folder.

    The weights of a quantised export are dequantised. Raises `CheckpointError`, which names what is missing or damaged.
    """
    try:
        return _read(user_path(init_from))
    except CheckpointError as error:
        if str(error).startswith("config.json: "):
            raise CheckpointError(f"{init_from}: {error}") from error
        raise


def training_weights(run: TrainingRun) -> Origin:
    """Return the weights that a stage trains further, or the checkpoint that it continues.

    Where experts are stored as codes, the reader gives their masters. Raises as `read_weights`, and ConfigError for
    `dither_masters` without codes. Logs a warning when training quantises weights that were quantised in another way.
    """
    if run.continue_from is not None:
        return read_weights(run.continue_from)
    assert run.init_from is not None, "the caller has checked that there are weights"
    origin, quant = read_weights(run.init_from), run.quant
    if origin.codes is None or origin.quant is None:
        if run.dither_masters:
            raise ConfigError(
                f"dither_masters is true, and {origin.path} holds no experts as codes: their weights are masters "
                "already; leave it out"
            )
        if quant.enabled and origin.is_fp8:
            _log.warning(
                "%s: the weights are FP8, and training quantises experts on quant.grid=%s: they are quantised twice",
                origin.path, quant.grid,
            )  # fmt: skip
        return origin
    stored = origin.quant
    is_same = (quant.format, quant.group_size) == (stored.format, stored.group_size)
    if run.dither_masters and not (quant.enabled and is_same):
        raise ConfigError(
            f"dither_masters is true, and training does not quantise the experts of {origin.path} as they are stored "
            f"(quant.format={stored.format}, quant.group_size={stored.group_size}), so it would only add noise: set "
            "quant.* as stored, or leave dither_masters out"
        )
    if not quant.enabled:
        _log.warning("%s: the experts are %s; quant.enabled=false trains them unquantised", origin.path, stored.format)
        quant = stored
    elif not is_same:
        _log.warning(
            "%s: the experts are %s in groups of %d, and training takes quant.format=%s, quant.group_size=%d: they are "
            "quantised twice", origin.path, stored.format, stored.group_size, quant.format, quant.group_size,
        )  # fmt: skip
        return origin
    else:
        _warn_of_plain_experts(origin)
    seed = run.run.seed if run.dither_masters else None
    return replace(origin, reader=MastersReader(origin.reader, origin.codes, grid=quant.grid, seed=seed))


def _warn_of_plain_experts(origin: Origin) -> None:
    """Log a warning when a folder of packed experts has layers whose experts are plain, which training quantises."""
    assert origin.codes is not None
    experts = folder_tensors(origin.model).experts
    if plain := sorted(experts - origin.codes.packed_experts().keys()):
        _log.warning(
            "%s: %d of %d tensors of routed experts are plain, and training quantises them like the packed ones: an "
            "export has them as codes, too", origin.path, len(plain), len(experts),
        )  # fmt: skip


def check_export(origin: Origin, export: ExportConfig) -> None:
    """Log a warning when an export quantises experts that are stored in FP8.

    Raises ConfigError when the masters are exported and the folder has codes only.
    """
    if origin.codes is not None and export.format is ExportFormat.bf16:
        raise ConfigError(
            f"export.format is bf16, which casts float32 masters, and {origin.path} has codes only: give "
            "export.format=bf16_dequantized, or the stage that trained them as init_from"
        )
    if origin.is_fp8 and export.format is not ExportFormat.bf16:
        _log.warning("%s: the weights are FP8, and the export quantises experts again", origin.path)


def check_is_export(origin: Origin, *, given: str | None) -> None:
    """Raise CheckpointError if weights are not those of an export. given: the value of init_from."""
    if not is_export(origin.path):
        raise CheckpointError(f"init_from is {given}: not an export; give the folder of an export stage")


def generation_model(
    origin: Origin,
    *,
    library: Library | None,
    mode: Mode = Mode.fast,
    speculation: Speculation = Speculation.off,
) -> Model:
    """Return the model for generation. Experts that are stored as codes and scales are computed with these."""
    quant = origin.quant or QuantConfig()
    if origin.codes is not None:
        quant = QuantConfig()
    return build_model(
        with_codes(origin), config=origin.model, quant=quant, library=library, mode=mode, speculation=speculation
    )


def with_codes(origin: Origin) -> Tensors:
    """Return the weights by name, with experts that are stored as codes and scales as such."""
    return origin.tensors if origin.codes is None else TensorsWithCodes(origin.tensors, origin.codes)


def unquantized(origin: Origin) -> Origin:
    """Return the weights to generate with as they are, without quantising experts."""
    return replace(origin, quant=None, codes=None)


def read_same_model(value: str, *, field: str, origin: Origin) -> Origin:
    """Return the weights in the folder `value`. Raises `CheckpointError` if their model differs from that of `origin`.

    field: config field that contains `value`, for the message.
    """
    other = read_weights(value)
    if mismatches := mismatched_fields(other.model, origin.model):
        raise CheckpointError(f"{field} is {value}: its model differs from {origin.path} ({'; '.join(mismatches)})")
    return other


def read_masters(value: str, *, field: str, origin: Origin) -> Origin:
    """Return the float32 masters from which `origin` was exported. Raises as `read_same_model`, and for an export."""
    masters = read_same_model(value, field=field, origin=origin)
    if is_export(masters.path):
        raise CheckpointError(f"{field} is {value}: this is an export; give the stage or checkpoint it was made from")
    return masters


def _read(path: Path) -> Origin:
    if is_export(path / EXPORT):
        path = path / EXPORT
    if not is_export(path):
        origin = read_origin(path)
        if (path / "config.json").is_file():
            _check_shapes(origin)
        return origin
    tensors: ExportTensors | HfFolder
    if export_format(path) is ExportFormat.gguf:
        export = read_export(path)
        record, model, tensors = export.record, export.model, ExportTensors(export)
        codes: CodeReader | None = export if export.experts else None
    else:
        record = read_record(path)
        model, tensors = open_hf_folder(path)
        codes = tensors if tensors.packed_experts() else None
    origin = Origin(
        path=path,
        tensors=tensors,
        reader=tensors,
        model=model,
        quant=quant_of_record(record, path),
        tokenizer=path,
        make_digest=lambda: sha256_of(path / EXPORT_RECORD),  # it has the digests of all other files
        step=record["step"],
        codes=codes,
    )
    _check_shapes(origin)
    return origin


def _check_shapes(origin: Origin) -> None:
    """Check names and shapes of the tensors in a folder with a config.json.

    Values are checked as they are read: a rank reads only its own share.
    """
    try:
        folder_tensors(origin.model).check_shapes(origin.reader)
    except CheckpointError as error:
        raise CheckpointError(f"{origin.path}: {error}") from error


def tokenizer_of(origin: Origin) -> Tokenizer:
    """Return the tokenizer in the folder of the weights. Raises `CheckpointError` if it is missing or too large."""
    if origin.tokenizer is None:
        raise CheckpointError(
            f"{origin.path}: there is no {TOKENIZER_FILE} beside the weights; copy their tokenizer there"
        )
    tokenizer = Tokenizer.load(origin.tokenizer)
    if tokenizer.vocab_size > origin.model.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens and the weights beside it {origin.model.vocab_size}"
        raise CheckpointError(f"{origin.tokenizer}: it has {sizes}; copy the tokenizer of these weights there")
    return tokenizer
