"""Where weights come from: the folder of a stage, one checkpoint, or a Hugging Face folder (`init_from`)."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.identity import model_of, quant_of
from moetrain.checkpoint.read import CHECKPOINTS, Checkpoint
from moetrain.checkpoint.resume import differences
from moetrain.errors import CheckpointError
from moetrain.hf.folder import open_hf_folder, weight_files
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.parallel.protocol import Engine, StateReader
from moetrain.quant.config import QuantConfig

_log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a stage's folder."""
_FREE = ("balance.", "yarn.", "max_position_embeddings")
"""Fields of the model that a stage may change without changing what the weights mean."""


@dataclass(kw_only=True)
class Origin:
    """Weights to start from, checked.

    tensors: parameters and buffers under their names in memory, each read when it is asked for where they lie in files.
    reader: the same, of which ranges can be read. quant: the grid they were trained on, None when that is not known.
    tokenizer: its folder, None when there is none beside the weights. tokenizer_digest: of the tokenizer that they were
    trained with, None when that is not known. make_digest: see `digest`. step: steps trained, 0 for a Hugging Face
    folder. checkpoint: where they are from a checkpoint, with the state of its run.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    reader: StateReader
    model: ModelConfig
    quant: QuantConfig | None
    tokenizer: Path | None
    make_digest: Callable[[], str]
    step: int
    tokenizer_digest: str | None = None
    checkpoint: Checkpoint | None = None

    @cached_property
    def digest(self) -> str:
        """A sha256 that changes with the weights; of a Hugging Face folder it reads all files."""
        return self.make_digest()


def read_origin(path: Path) -> Origin:
    """Return the weights that `path` names.

    A stage's folder gives its newest good checkpoint; a checkpoint that is named itself must be good. Raises
    `CheckpointError` that names the file or folder and says what would do.
    """
    if checkpoint.is_checkpoint(path):
        # A link may name the checkpoint, or the folder in which it lies: the tokenizer is beside one or the other.
        return _of_checkpoint(path, stages=[path.absolute().parent.parent, path.resolve().parent.parent])
    if (path / CHECKPOINTS).is_dir():
        newest = checkpoint.latest(path / CHECKPOINTS).path
        if newest is None:
            raise CheckpointError(f"{path / CHECKPOINTS}: holds no checkpoint; let the stage write one first")
        return _of_checkpoint(newest, stages=[path])
    if (path / "config.json").is_file():
        return _of_hf_folder(path)
    raise CheckpointError(
        f"{path}: neither the folder of a stage (with {CHECKPOINTS}/), nor a checkpoint (step_*), "
        "nor a Hugging Face folder (with config.json)"
    )


def start_from(engine: Engine, origin: Origin, *, model: ModelConfig) -> None:
    """Load the weights of `origin` into an engine whose model has the config `model`; optimizer and step start anew.

    Raises `CheckpointError` when they do not fit (`check_fit`).
    """
    for line in check_fit(origin, model):
        _log.info("model.%s (from %s)", line, origin.path)
    engine.load_state(origin.reader, with_optimizer=False)
    _log.info("weights from %s (step %d)", origin.path, origin.step)


def continue_state(engine: Engine, origin: Origin, *, model: ModelConfig) -> None:
    """Load the weights and the optimizer's state of `origin`, a checkpoint. Raises as `start_from`."""
    assert origin.checkpoint is not None
    for line in check_fit(origin, model):
        _log.info("model.%s (from %s)", line, origin.path)
    engine.load_state(origin.checkpoint.tensors, with_optimizer=True)


def check_fit(origin: Origin, model: ModelConfig) -> list[str]:
    """Return the fields of the model that change and may, as "field: before -> now".

    Raises `CheckpointError` when a field differs that says what the weights mean.
    """
    changed = differences(vars_of(origin.model), vars_of(model))
    if unfit := unfit_fields(origin, model):
        raise CheckpointError(
            f"{origin.path}: its model does not fit ({'; '.join(unfit)}); change the fields of model="
        )
    return changed


def unfit_fields(origin: Origin, model: ModelConfig) -> list[str]:
    """Return the fields in which `model` is another than that of the weights, as "field: theirs -> this"."""
    return [line for line in differences(vars_of(origin.model), vars_of(model)) if not line.startswith(_FREE)]


def vars_of(model: ModelConfig) -> dict[str, object]:
    """Return the fields of a model config as a nested mapping; a factor that is left open as the one derived."""
    sections = {"yarn": vars(model.yarn), "balance": vars(model.balance)}
    return {**vars(model), **sections, "routed_scaling_factor": routed_scaling_factor(model)}


def _of_checkpoint(path: Path, *, stages: Sequence[Path]) -> Origin:
    """Return the weights of a checkpoint; `stages` are the folders beside whose checkpoints the tokenizer may lie."""
    loaded = checkpoint.load(path)
    identity = loaded.state["identity"]
    written = identity.get("tokenizer") or identity.get("digests", {}).get("tokenizer")
    tensors = loaded.tensors.of_model()
    return Origin(
        path=path,
        tensors=tensors,
        reader=tensors,
        model=model_of(identity),
        quant=quant_of(identity),
        tokenizer=_own_tokenizer([stage / TOKENIZER for stage in stages], written),
        tokenizer_digest=written,
        make_digest=lambda: loaded.digest,
        step=loaded.step,
        checkpoint=loaded,
    )


def _of_hf_folder(path: Path) -> Origin:
    model, tensors = open_hf_folder(path)
    return Origin(
        path=path,
        tensors=tensors,
        reader=tensors,
        model=model,
        quant=None,
        tokenizer=_tokenizer_in(path),
        make_digest=lambda: _digest_of_files(path),
        step=0,
    )


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer.json").is_file() else None


def _own_tokenizer(folders: Sequence[Path], written: str | None) -> Path | None:
    """Return the first folder that holds a tokenizer; CheckpointError when its file is not the one that was written."""
    found = next(filter(None, map(_tokenizer_in, folders)), None)
    if found is not None and written is not None:
        path = found / "tokenizer.json"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != written:
            raise CheckpointError(
                f"{path}: sha256 is {digest[:12]}..., {written[:12]}... was written; copy the tokenizer there again"
            )
    return found


def _digest_of_files(path: Path) -> str:
    """Return a sha256 over the config and the weight files of a folder."""
    digest = hashlib.sha256()
    for file_path in [path / "config.json", *(path / file for file in weight_files(path))]:
        with file_path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
