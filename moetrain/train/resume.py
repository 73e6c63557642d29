"""An engine's whole state to a checkpoint folder and back, for training and RL loops alike. All of it collective.

`identity` is what makes a run the run it is (its configuration apart from layout, and the digests of its data): a
folder whose checkpoints have another identity is refused, field by field, instead of being continued into something
that neither configuration describes.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import CheckpointError
from moetrain.parallel.protocol import Engine
from moetrain.parallel.state import TensorReader
from moetrain.train import checkpoint

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Resumed:
    """Where a run stands. step: steps that are done. state: what the loop gave `save_state`. num_damaged: checkpoints
    that were passed over because they were damaged."""

    step: int
    state: dict[str, Any]
    num_damaged: int


def resume(engine: Engine, folder: Path, *, identity: Mapping[str, Any]) -> Resumed:
    """Load the newest good checkpoint of `folder` into the engine, if there is one, and return where the run stands.

    Raises `CheckpointError` when all checkpoints are damaged, or when they are of a run with another identity.
    """
    found = checkpoint.Latest(path=None, num_damaged=0)
    failure: CheckpointError | None = None
    if engine.topology.is_main:
        checkpoint.remove_leftovers(folder)
        try:
            found = checkpoint.latest(folder)
        except CheckpointError as error:
            failure = error  # raised on every rank below, so that none waits for the others
    found, failure = engine.topology.broadcast_object((found, failure))
    if failure is not None:
        raise failure
    if found.path is None:
        return Resumed(step=0, state={}, num_damaged=0)
    loaded = checkpoint.load(found.path)
    _check_identity(loaded, identity)
    engine.load_state(TensorReader(loaded.tensors), with_optimizer=True)
    _log.info("going on from %s", loaded.path)
    return Resumed(step=loaded.step, state=loaded.state["loop"], num_damaged=found.num_damaged)


def save_state(
    engine: Engine, folder: Path, *, step: int, identity: Mapping[str, Any], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the engine's whole state and the loop's `state` as checkpoint `step`; return its path on every rank."""
    tensors = engine.gather_state(with_optimizer=True)
    if tensors is not None:
        content = {"identity": dict(identity), "loop": dict(state)}
        checkpoint.save(folder, step, tensors=tensors, state=content, keep=keep)
    engine.topology.barrier()
    return folder / f"step_{step:08d}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Return one line "field: before -> now" for each leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, prefix=f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def _check_identity(loaded: checkpoint.Checkpoint, identity: Mapping[str, Any]) -> None:
    as_written = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    changed = differences(loaded.state["identity"], as_written)
    if changed:
        raise CheckpointError(
            f"{loaded.path}: was written by a run with another configuration ({'; '.join(changed)}); "
            "change it back, give another run folder, or delete the folder of this stage to start it again"
        )
