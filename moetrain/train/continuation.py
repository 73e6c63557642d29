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
from typing import TYPE_CHECKING, Any

from moetrain.checkpoint.identity import as_stored, differences
from moetrain.errors import CheckpointError
from moetrain.optim.config import OptimConfig
from moetrain.optim.schedule import learning_rate
from moetrain.train.config import Continuation, TrainConfig

if TYPE_CHECKING:
    from moetrain.checkpoint.origin import Origin  # loads torch, which a check of configs does without

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
    origin: "Origin | None", *, counted: str, optim: OptimConfig, train: TrainConfig, seed: int
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
        raise CheckpointError(other_command(origin.path))
    if problem := settings_problem(
        identity["optim"]["name"], identity["seed"], path=loaded.path, optim=optim, seed=seed
    ) or length_problem(loaded.step, path=loaded.path, train=train):
        raise CheckpointError(problem)
    is_part = train.continue_as is Continuation.part
    return StartPoint(
        step=loaded.step,
        first_step=loaded.step if is_part else 0,
        last_rate=loop["learning_rate"],
        loop=loop,
        data=loaded.state["data"],
        path=loaded.path,
    )


def other_command(path: object) -> str:
    """Return the error message for `continue_from` if `path` is a stage of another command."""
    return (
        f"continue_from is {path}, a stage of another command: RL can continue only RL, and a stage that reads "
        "documents only such a stage. Start from its weights with init_from"
    )


def settings_problem(optimizer: str, run_seed: int, *, path: object, optim: OptimConfig, seed: int) -> str | None:
    """Return what forbids to continue the run of `path`, with that optimizer and seed, with these settings, or None."""
    for name, before, now in (("optim.name", optimizer, optim.name), ("run.seed", run_seed, seed)):
        if before != now:
            return f"{name} is {now}, but the run of {path} has {before}: set {name}={before}"
    return None


def length_problem(steps: int, *, path: object, train: TrainConfig) -> str | None:
    """Return what forbids to continue a run that has taken `steps` steps with the steps of `train`, or None."""
    if train.continue_as is not Continuation.whole or train.steps > steps:
        return None
    return (
        f"train.steps is {train.steps}, but {path} has taken {steps} steps already: give more "
        "(train.continue_as=whole counts steps from the beginning of the run)"
    )


def sources_problem(read: Mapping[str, Any], data: Mapping[str, Any], *, path: object) -> str | None:
    """Return what the section `data` changes besides the mix of the run of `path`, whose section is `read`, or None.

    Weights and `mix` may change, and sources may be added; the rows of an existing source may not change.
    """
    before, now = _without_mix(read), _without_mix(data)
    if now["tokenizer"].get("vocab_size") is None:  # its tokenizer is that of the run
        before["tokenizer"] = {key: value for key, value in before["tokenizer"].items() if key != "vocab_size"}
    changed = differences(before, _common_keys(now, before))
    if not changed:
        return None
    return (
        f"{path}: it read other rows than this config ({'; '.join(f'data.{line}' for line in changed)}). Change the "
        "config back (to stop reading a source, keep its settings and give it weight 0), or start from the weights "
        "with init_from"
    )


def check_same_sources(origin: "Origin", data: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the section `data` changes more than the mix of the run that is continued."""
    assert origin.checkpoint is not None
    read = origin.checkpoint.state["identity"]["data"]
    if problem := sources_problem(read, as_stored(data), path=origin.path):
        raise CheckpointError(problem)


def _without_mix(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section `data` without how much of each source is read, and without whether its tokenizer was new."""
    sources = {
        name: {key: value for key, value in source.items() if key != "weight"}
        for name, source in data["sources"].items()
    }
    tokenizer = {key: value for key, value in data.get("tokenizer", {}).items() if key != "retrain"}
    return {**{key: value for key, value in data.items() if key != "mix"}, "sources": sources, "tokenizer": tokenizer}


def _common_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return `now` without the keys that `before` does not have, at every depth."""
    return {
        name: _common_keys(value, before[name])
        if isinstance(value, Mapping) and isinstance(before[name], Mapping)
        else value
        for name, value in now.items()
        if name in before
    }
