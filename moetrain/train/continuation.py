"""Continuing a run in a new stage, with its optimizer state, counters and data position.

`continue_from` names the stage or checkpoint, and `train.continue_as` defines what the new stage's config describes:

- `part`: only the added steps. Warmup, decay, ramp, mixes and `bias_still_share` apply to them, and the warmup starts
  at the learning rate of the last step taken.
- `whole`: the entire run from step 0, as if it had been started with this config. The steps already taken must have
  read the rows that this config gives them.

Step numbers continue in metrics, checkpoints and random streams. The continued stage's folder is only read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.identity import as_stored, differences
from moetrain.checkpoint.origin import Origin
from moetrain.errors import CheckpointError
from moetrain.optim.config import OptimConfig
from moetrain.optim.schedule import learning_rate
from moetrain.train.config import Continuation, TrainConfig

ROWS_READ, TASKS_USED = "rows_read", "tasks_used"
"""Keys of the data position in a checkpoint: rows read, by stages that read documents, and tasks used, by RL."""


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """Where the steps of a stage begin; the default is a new run.

    step: number of steps of the run taken before this stage. first_step: the step of the run that is step 0 of the
    config. last_rate: learning rate of the last step taken. loop, data: counters and data position at `step`, as stored
    in state.json. path: the checkpoint that is continued.
    """

    step: int = 0
    first_step: int = 0
    last_rate: float | None = None
    loop: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def is_part(self) -> bool:
        """Return whether the config describes only the added steps."""
        return self.first_step > 0

    def rate(self, step: int, *, optim: OptimConfig, steps: int) -> float:
        """Return the learning rate of step `step` of the run; the config of the schedule has `steps` steps."""
        schedule = optim.schedule
        if self.is_part and self.last_rate is not None:
            # A peak below the last rate needs no warmup.
            schedule = replace(schedule, initial_ratio=min(1.0, self.last_rate / optim.lr))
        return learning_rate(step - self.first_step, steps, lr=optim.lr, schedule=schedule)

    def check_place(self, position: Callable[[int], Mapping[str, Any]]) -> None:
        """Raise `CheckpointError` if the steps taken so far read other data than `position` gives for them; see
        `Training`.
        """
        changed = differences(self.data, _common_keys(position(self.step), self.data))
        if changed:
            cure = "" if self.is_part else ", or give train.continue_as=part"
            raise CheckpointError(
                f"{self.path}: its steps read other data than this config describes ({'; '.join(changed)}), so some "
                f"data would be read twice or never. Change the config back{cure}"
            )

    def record(self) -> dict[str, Any]:
        """Return the entry of `summary.json` about the steps taken before this stage; empty for a new run."""
        if self.path is None:
            return {}
        as_stored = Continuation.part if self.is_part else Continuation.whole
        values = {"from": str(self.path), "as": as_stored, "steps": self.step, **self.loop["totals"]}
        return {"continued": values}


def start_point_of(
    origin: Origin | None, *, counted: str, optim: OptimConfig, train: TrainConfig, seed: int
) -> StartPoint:
    """Return where a stage with these config sections begins; `counted` is the key of its data position.

    Raises `CheckpointError` if `train.continue_as` is set and `origin` cannot be continued: it is weights without the
    state of a run, or a run with another data position, optimizer, seed or length.
    """
    if train.continue_as is None or origin is None:
        return StartPoint()
    loaded = origin.checkpoint
    if loaded is None:
        raise CheckpointError(
            f"continue_from is {origin.path}, which has weights but no training state: give the folder of a training "
            "stage or one of its checkpoints, or start from the weights with init_from"
        )
    loop, identity = loaded.state["loop"], loaded.state["identity"]
    if "learning_rate" not in loop:
        raise CheckpointError(
            f"{loaded.path}: was written by an older version, which did not store what continuing requires; "
            "start from its weights with init_from"
        )
    if counted not in loaded.state["data"]:
        raise CheckpointError(
            f"continue_from is {origin.path}, a stage of another command: RL can continue only RL, and a stage that "
            "reads documents only such a stage. Start from its weights with init_from"
        )
    for name, before, now in (
        ("optim.name", identity["optim"]["name"], optim.name),
        ("run.seed", identity["seed"], seed),
    ):
        if before != now:
            raise CheckpointError(f"{name} is {now}, but the run of {loaded.path} has {before}: set {name}={before}")
    is_part = train.continue_as is Continuation.part
    if not is_part and train.steps <= loaded.step:
        raise CheckpointError(
            f"train.steps is {train.steps}, but {loaded.path} has taken {loaded.step} steps already: give more "
            "(train.continue_as=whole counts steps from the beginning of the run)"
        )
    return StartPoint(
        step=loaded.step,
        first_step=loaded.step if is_part else 0,
        last_rate=loop["learning_rate"],
        loop=loop,
        data=loaded.state["data"],
        path=loaded.path,
    )


def check_same_sources(origin: Origin, data: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the section `data` changes more than the mix of the run that is continued.

    Weights and `mix` may change, and sources may be added; the rows of an existing source may not change.
    """
    assert origin.checkpoint is not None
    identity = origin.checkpoint.state["identity"]
    before = _without_mix(identity["data"])
    changed = differences(before, _common_keys(_without_mix(as_stored(data)), before))
    if changed:
        raise CheckpointError(
            f"{origin.path}: it read other rows than this config ({'; '.join(f'data.{line}' for line in changed)}). "
            "Change the config back (to stop reading a source, keep its settings and give it weight 0), or start from "
            "the weights with init_from"
        )


def _without_mix(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `data` without the settings of how much of each source is read."""
    sources = {
        name: {key: value for key, value in source.items() if key != "weight"}
        for name, source in data["sources"].items()
    }
    return {**{key: value for key, value in data.items() if key != "mix"}, "sources": sources}


def _common_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return `now` without the keys that `before` does not have, at every depth."""
    return {
        name: _common_keys(value, before[name])
        if isinstance(value, Mapping) and isinstance(before[name], Mapping)
        else value
        for name, value in now.items()
        if name in before
    }
