"""Continuing a run in a new stage: with the optimizer's state, the counters and the place in the data that it had.

`continue_from` names the stage or checkpoint, and `train.continue_as` says what the new stage's config describes:

- `part`: the steps that are added. Warmup, decay, ramp, mixes and the last share of the balance bias run over them, and
  the warmup starts at the learning rate of the last step that was taken.
- `whole`: the whole run from its step 0, as if it had been started with this config. The steps that were taken must
  have read the rows that it gives them.

The steps of the run are numbered through, in metrics, checkpoints and random streams. The stage that is continued is
only read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.identity import as_kept
from moetrain.checkpoint.origin import Origin
from moetrain.checkpoint.resume import differences
from moetrain.errors import CheckpointError
from moetrain.optim.config import OptimConfig
from moetrain.optim.schedule import learning_rate
from moetrain.train.config import Continuation, TrainConfig

ROWS_READ, TASKS_USED = "rows_read", "tasks_used"
"""How the place in the data is counted: by stages that read documents, and by RL."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where the steps of a stage begin; the default is a run that begins.

    step: steps of the run that were taken before. first_step: the step of the run that is step 0 of the config.
    last_rate: learning rate of the last step that was taken. loop, data: counters and place in the data at `step`, as
    state.json keeps them. path: the checkpoint that is continued.
    """

    step: int = 0
    first_step: int = 0
    last_rate: float | None = None
    loop: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def is_part(self) -> bool:
        """Return whether the config describes the added steps alone."""
        return self.first_step > 0

    def rate(self, step: int, *, optim: OptimConfig, steps: int) -> float:
        """Return the learning rate of step `step` of the run, under the schedule of a config with `steps` steps."""
        schedule = optim.schedule
        if self.is_part and self.last_rate is not None:
            # A rate below the last one needs no warmup: it holds at once.
            schedule = replace(schedule, initial_ratio=min(1.0, self.last_rate / optim.lr))
        return learning_rate(step - self.first_step, steps, lr=optim.lr, schedule=schedule)

    def check_place(self, position: Callable[[int], Mapping[str, Any]]) -> None:
        """Raise `CheckpointError` when the steps before read other data than `position` gives them: see `Training`."""
        changed = differences(self.data, _known(position(self.step), self.data))
        if changed:
            cure = "" if self.is_part else ", or give train.continue_as=part"
            raise CheckpointError(
                f"{self.path}: its steps read other data than this config gives them ({'; '.join(changed)}): data "
                f"would be read twice or never. Change it back{cure}"
            )

    def record(self) -> dict[str, Any]:
        """Return what `summary.json` says of the steps before; nothing for a run that begins."""
        if self.path is None:
            return {}
        as_kept = Continuation.part if self.is_part else Continuation.whole
        told = {"from": str(self.path), "as": as_kept, "steps": self.step, **self.loop["totals"]}
        return {"continued": told}


def beginning_of(
    origin: Origin | None, *, counted: str, optim: OptimConfig, train: TrainConfig, seed: int
) -> Beginning:
    """Return where a stage with these sections begins; `counted` is how it counts its place in the data.

    Raises `CheckpointError` when it is to continue `origin` (`train.continue_as`) and cannot: those are weights without
    a run, or a run of another kind, optimizer, seed or length.
    """
    if train.continue_as is None or origin is None:
        return Beginning()
    loaded = origin.checkpoint
    if loaded is None:
        raise CheckpointError(
            f"continue_from is {origin.path}: those are weights without the state of a run; give the folder of a stage "
            "that trained or one of its checkpoints, or start from the weights with init_from"
        )
    loop, identity = loaded.state["loop"], loaded.state["identity"]
    if "learning_rate" not in loop:
        raise CheckpointError(
            f"{loaded.path}: was written by an older version, which did not keep what continuing needs; "
            "start from its weights with init_from"
        )
    if counted not in loaded.state["data"]:
        raise CheckpointError(
            f"continue_from is {origin.path}: that is a stage of another command; RL continues RL, and what reads "
            "documents what read them. Start from its weights with init_from"
        )
    for name, before, now in (
        ("optim.name", identity["optim"]["name"], optim.name),
        ("run.seed", identity["seed"], seed),
    ):
        if before != now:
            raise CheckpointError(f"{name} is {now}: the run that {loaded.path} continues has {before}; give that")
    is_part = train.continue_as is Continuation.part
    if not is_part and train.steps <= loaded.step:
        raise CheckpointError(
            f"train.steps is {train.steps}, and {loaded.path} has taken {loaded.step} steps: give more "
            "(train.continue_as=whole counts them from the beginning of the run)"
        )
    return Beginning(
        step=loaded.step,
        first_step=loaded.step if is_part else 0,
        last_rate=loop["learning_rate"],
        loop=loop,
        data=loaded.state["data"],
        path=loaded.path,
    )


def check_same_sources(origin: Origin, data: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` when a section `data` changes more than the mix of a run that is to be continued.

    Weights and `mix` may change, and sources may be added; what the rows of a source are may not.
    """
    assert origin.checkpoint is not None
    identity = origin.checkpoint.state["identity"]
    before = _without_mix(identity["data"])
    changed = differences(before, _known(_without_mix(as_kept(data)), before))
    if changed:
        raise CheckpointError(
            f"{origin.path}: its rows are not those of this config ({'; '.join(f'data.{line}' for line in changed)}); "
            "change it back (a source that is no longer read keeps its settings with weight 0), or start from the "
            "weights with init_from"
        )


def _without_mix(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `data` without what says how much of each source is read."""
    sources = {
        name: {key: value for key, value in source.items() if key != "weight"}
        for name, source in data["sources"].items()
    }
    return {**{key: value for key, value in data.items() if key != "mix"}, "sources": sources}


def _known(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return `now` without the keys that `before` does not have, at every depth."""
    return {
        name: _known(value, before[name]) if isinstance(value, Mapping) and isinstance(before[name], Mapping) else value
        for name, value in now.items()
        if name in before
    }
