"""The origin of weights (`init_from`): the folder of a stage, one checkpoint, or a Hugging Face folder."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.identity import model_of, quant_of
from moetrain.checkpoint.masters import MastersReader
from moetrain.checkpoint.read import CHECKPOINTS, Checkpoint
from moetrain.checkpoint.shape import mismatched_fields, shape_changes
from moetrain.data.tokenizer import Tokenizer, holds_tokenizer
from moetrain.errors import CheckpointError, DataError
from moetrain.files import sha256_of
from moetrain.hf.folder import open_hf_folder, weight_files
from moetrain.model.config import ModelConfig
from moetrain.parallel.protocol import Engine, StateReader
from moetrain.parallel.state import WithoutMtp
from moetrain.parallel.topology import Topology
from moetrain.quant.config import QuantConfig
from moetrain.quant.masters import CodeReader

_log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Name of the tokenizer folder in a stage's folder."""


@dataclass(kw_only=True)
class Origin:
    """Checked weights to start from.

    - tensors: parameters and buffers under their names in memory, each read from disk on access.
    - reader: the same tensors, with access to ranges.
    - quant: the quantisation they were trained with, None if unknown.
    - codes: experts that are stored as codes and scales, None if there are none. `tensors` and `reader` have their
      dequantised values.
    - is_fp8: whether they are stored in FP8.
    - hashed_files: the files that `digest` reads, empty if it reads none.
    - tokenizer: folder of the tokenizer, None if there is none beside the weights.
    - tokenizer_digest: digest of the tokenizer they were trained with, None if unknown.
    - make_digest: see `digest`.
    - step: number of steps trained, 0 for a Hugging Face folder.
    - checkpoint: the checkpoint with the state of its run, None for a Hugging Face folder.
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
    codes: CodeReader | None = None
    is_fp8: bool = False
    hashed_files: Sequence[Path] = ()

    @cached_property
    def digest(self) -> str:
        """Return a sha256 that changes with the weights; for a Hugging Face folder this reads all files."""
        return self.make_digest()


def shared_digest(origin: Origin, topology: Topology) -> str:
    """Return the digest of `origin`, on every rank. Each rank reads its share of the files. Collective."""
    if not origin.hashed_files:
        return topology.broadcast_object(origin.digest if topology.is_main else "")
    own = _digests(origin.hashed_files[topology.rank :: topology.world_size])
    by_rank = topology.gather_objects(own)
    digest = ""
    if by_rank is not None:
        number = len(origin.hashed_files)
        in_order = [by_rank[index % len(by_rank)][index // len(by_rank)] for index in range(number)]
        digest = _joint(in_order)
    return topology.broadcast_object(digest)


def read_origin(path: Path) -> Origin:
    """Return the weights in `path`.

    For a stage's folder, this is its newest good checkpoint; a checkpoint named directly must be good. Raises
    `CheckpointError` that names the file or folder and the remedy.
    """
    if checkpoint.is_checkpoint(path):
        # `path` may be a symlink; the tokenizer is in the stage of the link or of its target.
        return _of_checkpoint(path, stages=[path.absolute().parent.parent, path.resolve().parent.parent])
    if (path / CHECKPOINTS).is_dir():
        newest = checkpoint.latest(path / CHECKPOINTS).path
        if newest is None:
            raise CheckpointError(
                f"{path / CHECKPOINTS}: contains no checkpoint; run the stage until it has written one"
            )
        return _of_checkpoint(newest, stages=[path])
    if (path / "config.json").is_file():
        return _of_hf_folder(path)
    raise CheckpointError(
        f"{path}: neither the folder of a stage (with {CHECKPOINTS}/), nor a checkpoint (step_*), "
        "nor a Hugging Face folder (with config.json)"
    )


def start_from(engine: Engine, origin: Origin, *, model: ModelConfig) -> None:
    """Load the weights of `origin` into an engine with model config `model`; optimizer state and step start from zero.

    Raises `CheckpointError` if the weights do not fit (`check_fit`).
    """
    for line in check_fit(origin, model):
        _log.info("model.%s (from %s)", line, origin.path)
    engine.load_state(_fitting(origin.reader, origin, model=model), with_optimizer=False)
    if isinstance(origin.reader, MastersReader):
        origin.reader.report()
    _log.info("weights from %s (step %d)", origin.path, origin.step)


def continue_state(engine: Engine, origin: Origin, *, model: ModelConfig) -> None:
    """Load the weights and the optimizer state of `origin`, a checkpoint. Raises the same errors as `start_from`."""
    assert origin.checkpoint is not None
    for line in check_fit(origin, model):
        _log.info("model.%s (from %s)", line, origin.path)
    engine.load_state(_fitting(origin.checkpoint.tensors, origin, model=model), with_optimizer=True)


def _fitting(reader: StateReader, origin: Origin, *, model: ModelConfig) -> StateReader:
    """Return a reader without the modules of multi-token prediction that `model` leaves out."""
    if model.num_mtp_layers == origin.model.num_mtp_layers:
        return reader
    return WithoutMtp(reader, origin.model, kept=model.num_mtp_layers)


def check_fit(origin: Origin, model: ModelConfig) -> list[str]:
    """Return the model fields that change and are allowed to, as "field: before -> now".

    Raises `CheckpointError` if a field differs on which the meaning of the weights depends.
    """
    if mismatches := mismatched_fields(origin.model, model):
        raise CheckpointError(
            f"{origin.path}: its model does not fit ({'; '.join(mismatches)}); change these model fields to match"
        )
    return shape_changes(origin.model, model)


def _of_checkpoint(path: Path, *, stages: Sequence[Path]) -> Origin:
    """Return the weights of a checkpoint; `stages` are the stage folders in which to look for the tokenizer."""
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
    files = [path / "config.json", *(path / file for file in weight_files(path))]
    return Origin(
        path=path,
        tensors=tensors,
        reader=tensors,
        model=model,
        quant=tensors.quant,
        codes=tensors if tensors.quant is not None else None,
        is_fp8=tensors.is_fp8,
        tokenizer=path if holds_tokenizer(path) else None,
        make_digest=lambda: _joint(_digests(files)),
        step=0,
        hashed_files=files,
    )


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer.json").is_file() else None


def _own_tokenizer(folders: Sequence[Path], written: str | None) -> Path | None:
    """Return the first folder with a tokenizer; raises CheckpointError if its digest differs from the checkpoint's."""
    found = next(filter(None, map(_tokenizer_in, folders)), None)
    if found is not None and written is not None:
        path = found / "tokenizer.json"
        digest = sha256_of(path)
        if digest != written and _loaded_digest(found) != written:
            raise CheckpointError(
                f"{path}: its sha256 is {digest[:12]}..., but the weights were trained with {written[:12]}...; "
                "copy the original tokenizer there"
            )
    return found


def _loaded_digest(folder: Path) -> str:
    """Return the digest of a tokenizer, which has the name of its chat template, too; "" when it cannot be read."""
    try:
        return Tokenizer.load(folder).digest
    except DataError:
        return ""


def _digests(files: Sequence[Path]) -> list[bytes]:
    """Return the sha256 of each file; several are read at the same time."""
    with ThreadPoolExecutor() as pool:
        return [bytes.fromhex(digest) for digest in pool.map(sha256_of, files)]


def _joint(digests: Sequence[bytes]) -> str:
    """Return the sha256 of several, in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
