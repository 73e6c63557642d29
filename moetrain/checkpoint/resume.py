"""Resuming a training stage from its checkpoint folder; `checkpoint.saver` writes the checkpoints.

The `identity` of a run is its configuration apart from layout, and the digests of its data. If the checkpoints in a
folder have another identity, resuming is refused with a list of the fields that differ, because the result would match
neither configuration.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.identity import as_stored, differences, upgraded
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
    """The state of a resumed run. step: number of steps done. state: the loop's counters, as stored by `saved_state`.
    num_damaged: number of damaged checkpoints that were skipped.
    """

    step: int
    state: dict[str, Any]
    num_damaged: int


def resume(engine: Engine, folder: Path, *, identity: Mapping[str, Any]) -> Resumed:
    """Load the newest good checkpoint of `folder`, if there is one, into the engine; return the state of the run.

    Raises `CheckpointError` if all checkpoints are damaged, or if they belong to a run with another identity.
    """
    topology = engine.topology
    if topology.is_main:
        checkpoint.remove_leftovers(folder)
    # All ranks use one list: each check is a collective, and a host may see changes of a shared folder late.
    present = topology.broadcast_object(checkpoint.steps(folder) if topology.is_main else [])
    found = checkpoint.latest(folder, present=present, damage=lambda path: _damage_on_any_rank(path, topology))
    if found.path is None:
        return Resumed(step=0, state={}, num_damaged=0)
    loaded = checkpoint.open_checkpoint(found.path)
    check_identity(loaded, identity)
    engine.load_state(loaded.tensors, with_optimizer=True)
    _log.info("resuming from %s", loaded.path)
    return Resumed(step=loaded.step, state=loaded.state["loop"], num_damaged=found.num_damaged)


def saved_state(identity: Mapping[str, Any], *, loop: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of state.json: identity, the loop's counters, data position and random streams."""
    return {
        "identity": dict(identity),
        "loop": dict(loop),
        "data": dict(data),
        "random": {"seed": identity.get("seed"), "rule": RANDOM_RULE},
    }


def _damage_on_any_rank(path: Path, topology: Topology) -> str | None:
    """Return the damage of a checkpoint, the same on every rank; each checks its share of the files. Collective."""
    failure: str | None = None
    try:
        opened = checkpoint.open_checkpoint(path)
        checkpoint.check_files(opened, part=topology.rank, num_parts=topology.world_size)
    except CheckpointError as error:
        failure = str(error)
    failures = topology.gather_objects(failure)
    return topology.broadcast_object(next((text for text in failures or () if text is not None), None))


def check_identity(loaded: checkpoint.Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` that lists the fields in which a checkpoint's identity differs from `identity`."""
    as_written = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    changed = differences(
        as_stored(upgraded(loaded.state["identity"])), as_written
    )  # older versions stored more fields
    if changed:
        raise CheckpointError(
            f"{loaded.path}: was written by a run with another configuration ({'; '.join(changed)}); "
            "change it back, give another run.stage (with continue_from, the run continues there with more steps or "
            "another rate), or delete the folder of this stage to start it again"
        )
