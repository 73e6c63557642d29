"""From a checkpoint folder to where a run stands, for every training stage; `checkpoint.saver` is the way there.

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

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.identity import as_kept, upgraded
from moetrain.errors import CheckpointError
from moetrain.parallel.protocol import Engine
from moetrain.parallel.topology import Topology

_log = logging.getLogger(__name__)

RANDOM_RULE = (
    "every draw is a function of (seed, name of the stream, step, sample): moetrain.runtime.seed_of; "
    "no generator has a state beyond seed and step"
)


@dataclass(kw_only=True)
class Resumed:
    """Where a run stands. step: steps that are done. state: the loop's counters, as `saved_state` took them.
    num_damaged: checkpoints that were passed over because they were damaged."""

    step: int
    state: dict[str, Any]
    num_damaged: int


def resume(engine: Engine, folder: Path, *, identity: Mapping[str, Any]) -> Resumed:
    """Load the newest good checkpoint of `folder` into the engine, if there is one, and return where the run stands.

    Raises `CheckpointError` when all checkpoints are damaged, or when they are of a run with another identity.
    """
    topology = engine.topology
    if topology.is_main:
        checkpoint.remove_leftovers(folder)
    # One list for all ranks: each check is a collective, and hosts may see a change of a shared folder late.
    present = topology.broadcast_object(checkpoint.steps(folder) if topology.is_main else [])
    found = checkpoint.latest(folder, present=present, damage=lambda path: _damage_on_any_rank(path, topology))
    if found.path is None:
        return Resumed(step=0, state={}, num_damaged=0)
    loaded = checkpoint.open_checkpoint(found.path)
    check_identity(loaded, identity)
    engine.load_state(loaded.tensors, with_optimizer=True)
    _log.info("going on from %s", loaded.path)
    return Resumed(step=loaded.step, state=loaded.state["loop"], num_damaged=found.num_damaged)


def saved_state(identity: Mapping[str, Any], *, loop: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what state.json keeps of a run: identity, the loop's counters, position in the data, random streams."""
    return {
        "identity": dict(identity),
        "loop": dict(loop),
        "data": dict(data),
        "random": {"seed": identity.get("seed"), "rule": RANDOM_RULE},
    }


def _damage_on_any_rank(path: Path, topology: Topology) -> str | None:
    """Return a checkpoint's damage, the same on every rank; each checks its share of the files. Collective."""
    failure: str | None = None
    try:
        opened = checkpoint.open_checkpoint(path)
        checkpoint.check_files(opened, part=topology.rank, num_parts=topology.world_size)
    except CheckpointError as error:
        failure = str(error)
    failures = topology.gather_objects(failure)
    return topology.broadcast_object(next((text for text in failures or () if text is not None), None))


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


def check_identity(loaded: checkpoint.Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` when a checkpoint is of a run with another identity; it names each field."""
    as_written = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    changed = differences(as_kept(upgraded(loaded.state["identity"])), as_written)  # older ones hold more
    if changed:
        raise CheckpointError(
            f"{loaded.path}: was written by a run with another configuration ({'; '.join(changed)}); "
            "change it back, give another run.stage (with continue_from, the run continues there with more steps or "
            "another rate), or delete the folder of this stage to start it again"
        )
