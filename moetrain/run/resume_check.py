"""Checks a training stage's folder before the stage resumes, once instead of once per rank."""

from dataclasses import asdict, replace
from typing import Any

from moetrain.commands.training import DocumentRun, RlRun, TrainingRun
from moetrain.errors import CheckpointError
from moetrain.log import read_metrics
from moetrain.rl.config import kernels_for
from moetrain.run.begun import as_begun
from moetrain.runtime import default_device
from moetrain.stage_files import METRICS
from moetrain.train.config import TrainConfig


def check_resume(run: TrainingRun) -> None:
    """Raise `CheckpointError` if the metrics are invalid or the last checkpoint is of another configuration."""
    metrics = run.run.path / METRICS
    if metrics.is_file():
        read_metrics(metrics)
    folder = run.run.path / "checkpoints"
    if not folder.is_dir():
        return
    if isinstance(run, DocumentRun):
        run = as_begun(run)
    # These imports load torch, which a stage without checkpoints does not need here.
    from moetrain.checkpoint import read as checkpoint
    from moetrain.checkpoint.resume import check_identity
    from moetrain.train.identity import identity_of
    from moetrain.train.precision import expected_precision

    try:
        loaded = checkpoint.open_checkpoint(checkpoint.folder_of(folder, max(checkpoint.steps(folder))))
    except (CheckpointError, ValueError):
        return  # no checkpoint, or a damaged one; the stage then falls back to an earlier one
    stored: dict[str, Any] = loaded.state["identity"]
    train = train_of(run)
    compute_dtype, _ = expected_precision(train, device=default_device(), folder=run.run.path)
    train = replace(train, compute_dtype=compute_dtype)
    current = identity_of(
        model=run.model,
        quant=run.quant,
        optim=run.optim,
        train=train,
        seed=run.run.seed,
        origin=None,
        others=own_sections(run),
    )
    # Only the stage can compute the digests of its data, so they are taken from the checkpoint.
    digests = {name: value for name, value in stored.items() if name not in current or name == "origin"}
    check_identity(loaded, current | digests)


def train_of(run: TrainingRun) -> TrainConfig:
    """Return the training section, with the kernels that the stage requires."""
    return kernels_for(run.rollout, run.train) if isinstance(run, RlRun) else run.train


def own_sections(run: TrainingRun) -> dict[str, Any]:
    """Return the config sections that belong to the identity of this kind of stage only, by name."""
    if isinstance(run, RlRun):
        return {"task": asdict(run.task), "rollout": asdict(run.rollout), "rl": asdict(run.rl)}
    return {"data": asdict(run.data)} if isinstance(run, DocumentRun) else {}
