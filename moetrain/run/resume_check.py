"""What a training stage left in its folder, checked before it goes on: the stage finds the same, but once a rank."""

from dataclasses import asdict, replace
from typing import Any

from moetrain.config import ReadingRun, RlRun, TrainingRun
from moetrain.errors import CheckpointError
from moetrain.log import read_metrics
from moetrain.runtime import default_device


def check_going_on(run: TrainingRun) -> None:
    """Raise the user's error when the metrics there are broken, or the checkpoints are of another configuration."""
    metrics = run.run.path / "metrics.jsonl"
    if metrics.is_file():
        read_metrics(metrics)
    folder = run.run.path / "checkpoints"
    if not folder.is_dir():
        return
    # These bring torch in; most stages have not begun.
    from moetrain.checkpoint import read as checkpoint
    from moetrain.checkpoint.resume import check_identity
    from moetrain.train.identity import identity_of
    from moetrain.train.precision import settled

    try:
        loaded = checkpoint.open_checkpoint(checkpoint.folder_of(folder, max(checkpoint.steps(folder))))
    except (CheckpointError, ValueError):
        return  # damaged, or none: the stage takes an earlier one
    kept: dict[str, Any] = loaded.state["identity"]
    train = run.train
    compute_dtype, _ = settled(train, device=default_device(), folder=run.run.path)
    train = replace(train, compute_dtype=compute_dtype)
    said = identity_of(
        model=run.model,
        quant=run.quant,
        optim=run.optim,
        train=train,
        seed=run.run.seed,
        origin=None,
        others=own_sections(run),
    )
    # Of what was read there are digests, which only the stage can make.
    digests = {name: value for name, value in kept.items() if name not in said or name == "origin"}
    check_identity(loaded, said | digests)


def own_sections(run: TrainingRun) -> dict[str, Any]:
    """Return the sections that only a stage of this kind has, of those that make it the run it is."""
    if isinstance(run, RlRun):
        return {"task": asdict(run.task), "rollout": asdict(run.rollout), "rl": asdict(run.rl)}
    return {"data": asdict(run.data)} if isinstance(run, ReadingRun) else {}
