"""Runs the stages of a recipe in order, and skips those that are done and unchanged.

All stages are composed and checked before the first one starts. Each stage runs in its own process, `python -m
moetrain.cli <command> --config <stage folder>/config.yaml`. So memory, process groups and DeepSpeed's state are freed
at the end of the stage, a killed stage does not kill the run, and the same command starts the stage by hand.

`started.json` contains the record with which a stage started (`run.record`). `done.json` is written last and marks the
stage as done. A stage that started with other values is refused and runs again only on the user's request, because its
results may be weeks of training.
"""

import logging
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

from moetrain.commands.recipe import OnChange, RecipeRun
from moetrain.commands.training import TrainingRun
from moetrain.compose import compose, read_yaml, save_config, to_mapping
from moetrain.config_keys import suggestion
from moetrain.errors import ConfigError, MoetrainError
from moetrain.files import previous_name, read_json_or_empty, remove_folder, user_path, write_json
from moetrain.log import duration
from moetrain.run import recipe
from moetrain.run.inputs import check_inputs, check_names, check_records, check_weights
from moetrain.run.record import Record, changes, flattened, record_of, stored_record
from moetrain.run.stage import check_writable, has_results, lock
from moetrain.run.version import made_by
from moetrain.runtime import die_with_parent
from moetrain.stage_files import CONFIG, DONE, STARTED

_log = logging.getLogger(__name__)

_CONTINUABLE = ("train.steps:", "optim.", "data.mix")
"""Changes with which a stage that trained can be continued in another stage."""
_CHANGES_NO_RESULT = (
    *("run.threads:", "train.log_every:", "train.checkpoint_every:", "train.keep_checkpoints:", "train.keep_every:"),
    *("train.rows_per_micro_batch:", "rl.tokens_per_micro_batch:", "parallel."),
    *("rollout.num_slots:", "rollout.cache_megabytes:", "rollout.speculation:", "prepare.workers:"),
)
"""Changes with which a stopped stage resumes: they change its numbers by rounding at most, or, with rl.max_staleness,
the order in which groups are complete."""
_CONTINUE_ADVICE = (
    "; to continue training with the new values and the same optimizer state, leave this stage unchanged and add one "
    "with continue_from=${{stage:{name}}} and train.continue_as=part or whole"
)


@dataclass(kw_only=True)
class Prepared:
    """A recipe whose stages are composed and checked."""

    run: RecipeRun
    folder: Path
    stages: list[recipe.Stage]


@dataclass(kw_only=True)
class Row:
    """A line of the final table."""

    stage: str
    status: str
    seconds: float


@dataclass(kw_only=True)
class RunResult:
    """Result of a run: one row per stage that it reached, the number of unchanged stages, and the exit code.

    is_restored: whether the last stage failed before it had results, and its earlier ones were moved back.
    """

    rows: list[Row]
    num_unchanged: int
    code: int
    is_restored: bool


def run_stages(prepared: Prepared) -> RunResult:
    """Run the stages that are not done, in order, until one fails.

    Raises `ConfigError`, before it runs or moves anything, if a stage was started with another config or other inputs.
    """
    rows: list[Row] = []
    code, is_restored = 0, False
    start = time.monotonic()
    with lock(prepared.folder):
        begin, moved = _move_outdated(prepared)
        for number, stage in enumerate(prepared.stages):
            seconds = seconds_of_done(prepared.folder / stage.name)
            if number < begin and seconds is not None:
                rows.append(Row(stage=stage.name, status="unchanged", seconds=seconds))
                continue
            place = f"stage {number + 1} of {len(prepared.stages)}, {stage.name}"
            _log.info(
                "%s: starts in %s; time left: %s", place, prepared.folder / stage.name, _time_left(prepared, number)
            )
            try:
                code, seconds = _run_stage(prepared, stage)
            except MoetrainError:
                _restore_moved(prepared, moved, refused=stage)
                raise
            rows.append(Row(stage=stage.name, status="done" if code == 0 else f"exit code {code}", seconds=seconds))
            how = "is done" if code == 0 else f"ended with exit code {code}"
            left = _time_left(prepared, number + 1 if code == 0 else number)
            _log.info("%s: %s after %s in all; time left: %s", place, how, duration(time.monotonic() - start), left)
            if code:
                is_restored = _restore_moved(prepared, moved, refused=stage)
                break
    num_unchanged = sum(row.status == "unchanged" for row in rows)
    return RunResult(rows=rows, num_unchanged=num_unchanged, code=code, is_restored=is_restored)


def prepare(words: Sequence[str]) -> Prepared:
    """Compose and check a run and all of its stages."""
    run_overrides, stage_overrides = recipe.split_overrides(words)
    for word in run_overrides:
        key = word.split("=")[0].lstrip("+~")
        if word.startswith("-"):
            raise ConfigError(f"{word}: unknown option; write key=value")
        if key in get_type_hints(TrainingRun) and key not in get_type_hints(RecipeRun):
            raise ConfigError(f"{word}: this is a key of a stage; give <stage>.{word}, such as pretrain.{word}")
    run: RecipeRun = compose("run", run_overrides)
    loaded = recipe.load(run.recipe)
    stages = recipe.compose_stages(loaded, run, overrides=stage_overrides)
    names = [stage.name for stage in stages]
    if run.again_from is not None and run.again_from not in names:
        raise ConfigError(f"again_from is {run.again_from!r}: {suggestion(run.again_from, names)}")
    folder = Path(run.folder) / (run.name or loaded.name)
    check_writable(folder)
    planned = [user_path(folder / stage.name) for stage in stages]
    for number, stage in enumerate(stages):
        check_inputs(stage.config, planned=planned[:number], world_size=stage.processes)
    for number, stage in enumerate(stages):
        check_names(stage.config)
        check_records(stage.config)
        check_weights(stage.config, planned=planned[:number])
    return Prepared(run=run, folder=folder, stages=stages)


def _time_left(prepared: Prepared, first: int) -> str:
    """Return the time that the stages from `first` on take, or `unknown`.

    A stage takes what it took the last time, in proportion to the number of its steps. If it has never finished, it
    takes what the recipe states, scaled by what the other stages took here.
    """
    took = {stage.name: _expected_seconds(prepared.folder / stage.name, stage.config) for stage in prepared.stages}
    both = [(took[stage.name] or 0.0, stage.seconds) for stage in prepared.stages if took[stage.name] and stage.seconds]
    scale = sum(here for here, _ in both) / sum(stated for _, stated in both) if both else 1.0
    seconds = 0.0
    for stage in prepared.stages[first:]:
        expected = took[stage.name]
        if expected is None and stage.seconds is not None:
            expected = scale * stage.seconds
        if expected is None:
            return "unknown"
        seconds += expected
    return f"about {duration(seconds)}"


def _expected_seconds(folder: Path, config: Any) -> float | None:
    """Return how long a stage takes by when it last finished in this run, moved aside or not; None if it never did."""
    paths = [folder / DONE, *folder.parent.glob(f"{folder.name}.previous*/{DONE}")]
    newest = max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)
    seconds = None if newest is None else seconds_of_done(newest.parent)
    if seconds is None or newest is None or not isinstance(config, TrainingRun):
        return seconds
    with suppress(ConfigError):  # without its config, the number of its steps is not known
        before = flattened(read_yaml(newest.with_name(CONFIG))).get("train.steps")
        return seconds * config.train.steps / before if isinstance(before, int) and before > 0 else seconds
    return seconds


def seconds_of_done(folder: Path) -> float | None:
    """Return how long a stage took that is done; None if it is not done, or its `done.json` is damaged."""
    seconds = read_json_or_empty(folder / DONE).get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _move_outdated(prepared: Prepared) -> tuple[int, dict[str, Path]]:
    """Return (index of the first stage to run again, new paths of the folders that were moved aside, by stage)."""
    begin = len(prepared.stages)
    anew: set[str] = set()  # stages that will have another identity
    for number, stage in enumerate(prepared.stages):
        if stage.name == prepared.run.again_from:
            begin = number
            break
        folder = prepared.folder / stage.name
        is_done = seconds_of_done(folder) is not None
        if not has_results(folder):
            if not _identity(folder) or _changes(prepared, stage):
                anew.add(stage.name)
            continue
        if not is_done and not _identity(folder):
            anew.add(stage.name)
        differences = _changes(prepared, stage)
        differences += [f"its input stage {name} runs again" for name in stage.inputs if name in anew]
        _log_other_version(folder, stage.name)
        if not differences or (prepared.run.on_change is OnChange.keep and is_done):
            continue
        if not is_done and all(line.startswith(_CHANGES_NO_RESULT) for line in differences):
            _log.info("stage %s resumes with %s", stage.name, "; ".join(differences))
            continue
        if prepared.run.on_change is not OnChange.rerun:
            raise _refusal(prepared, stage, differences)
        _log.info("stage %s runs again (%s)", stage.name, "; ".join(differences))
        begin = number
        break
    moved = {}
    outdated = [stage for stage in prepared.stages[begin:] if (prepared.folder / stage.name).exists()]
    with ExitStack() as stack:
        for stage in outdated:  # none is moved if another process works in one
            stack.enter_context(lock(prepared.folder / stage.name))
        for stage in outdated:
            new_path = move_aside(prepared.folder / stage.name)
            if new_path is not None:
                moved[stage.name] = new_path
    return begin, moved


def _changes(prepared: Prepared, stage: recipe.Stage) -> list[str]:
    """Return the differences to the record with which a stage started; empty if it has not started."""
    folder = prepared.folder / stage.name
    before = stored_record(folder)
    if before is None or not before.config:
        return [f"{CONFIG} and {STARTED} are missing or damaged"] if has_results(folder) else []
    return changes(before, _record(prepared, stage), defaults=lambda: flattened(to_mapping(compose(stage.command, []))))


def _record(prepared: Prepared, stage: recipe.Stage) -> Record:
    inputs = {name: _identity(prepared.folder / name) for name in stage.inputs}
    return record_of(
        to_mapping(stage.config),
        run_folder=prepared.folder,
        inputs={name: identity for name, identity in inputs.items() if identity},
    )


def _identity(folder: Path) -> str:
    """Return the id of this execution of a stage, or an empty string if none is recorded."""
    return str(read_json_or_empty(folder / STARTED).get("id", ""))


def _refusal(prepared: Prepared, stage: recipe.Stage, differences: Sequence[str]) -> ConfigError:
    name, folder = stage.name, prepared.folder / stage.name
    is_done = seconds_of_done(folder) is not None
    can_continue = isinstance(stage.config, TrainingRun) and any(line.startswith(_CONTINUABLE) for line in differences)
    state = "is done" if is_done else "has begun"
    kept_as = previous_name(folder).name
    keep = "on_change=keep takes the results as they are" if is_done else "the earlier configuration resumes it"
    return ConfigError(
        f"stage {name} {state} with another configuration: {'; '.join(differences)}. Its results stay as they are. "
        f"again_from={name} runs it and the stages after it again and keeps what is there as {kept_as}; "
        f"on_change=rerun does so from the first changed stage on; {keep}; name=NEW starts a separate run"
        f"{_CONTINUE_ADVICE.format(name=name) if can_continue else ''}"
    )


def _log_other_version(folder: Path, name: str) -> None:
    """Log which version made a stage if it is not this one. This does not cause the stage to run again."""
    started = read_json_or_empty(folder / STARTED)
    maker = started.get("made_by", "an older version") if started else made_by()
    if maker != made_by():
        _log.info(
            "stage %s was made by moetrain %s, this is %s; again_from=%s runs it again", name, maker, made_by(), name
        )


def _run_stage(prepared: Prepared, stage: recipe.Stage) -> tuple[int, float]:
    """Run a stage in its own process; return (exit code, seconds)."""
    folder = prepared.folder / stage.name
    stage.config = stage.composed()  # with the number of rows of its weights, which are on disk now
    check_inputs(stage.config, world_size=stage.processes)
    with lock(folder):
        if not has_results(folder) and _changes(prepared, stage):
            move_aside(folder)  # it contains only files of another config, and no results
    config = folder / CONFIG
    with lock(folder):  # the folder may be a new one
        save_config(stage.config, config)
        identity = _identity(folder) or uuid.uuid4().hex
        write_json(folder / STARTED, {"id": identity, "made_by": made_by(), **_record(prepared, stage).stored()})
    words = [*stage.command.split(), "--config", str(config)]
    python = [sys.executable, "-m"]
    launcher, code = python, 0
    start = time.monotonic()
    if stage.processes > 1:
        torchrun = f"moetrain.run.torchrun --standalone --nproc-per-node {stage.processes} -m".split()
        launcher = ["env", f"OMP_NUM_THREADS={stage.config.run.threads or 1}", *python, *torchrun]
        # A mistake that only reading the weights reveals is reported once here instead of once per rank.
        code = _wait(["env", f"WORLD_SIZE={stage.processes}", *python, "moetrain.cli", "check", *words])
    if code == 0:
        command = [*launcher, "moetrain.cli", *words]
        _log.info("stage %s: %s", stage.name, " ".join(command))
        code = _wait(command)
    seconds = time.monotonic() - start
    if code == 0:
        done = {"id": identity, "made_by": made_by(), "seconds": seconds, "inputs": stage.inputs}
        write_json(folder / DONE, done)
    return code, seconds


def _restore_moved(prepared: Prepared, moved: Mapping[str, Path], *, refused: recipe.Stage) -> bool:
    """Move folders back if the stage that should replace them refused its input and left no results.

    Also moves back the folders of the stages after it. Returns whether it did.
    """
    folder = prepared.folder / refused.name
    if refused.name not in moved or has_results(folder):
        return False
    names = [stage.name for stage in prepared.stages]
    for name in names[names.index(refused.name) :]:
        if name in moved:
            shutil.rmtree(prepared.folder / name, ignore_errors=True)  # it has no results
            moved[name].rename(prepared.folder / name)
            _log.info("%s was restored, because the stage that should replace it did not run", prepared.folder / name)
    return True


def _wait(command: Sequence[str]) -> int:
    """Run a process, forward signals to it, and return its exit code. It is killed if this process dies."""
    process = subprocess.Popen(command, preexec_fn=die_with_parent)

    def forward_signal(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, forward_signal) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def move_aside(folder: Path) -> Path | None:
    """Rename a stage folder to `<stage>.previous`, `<stage>.previous.2` and so on; return the new path.

    Existing `.previous` folders are not changed. A folder without results is deleted, and None is returned.
    """
    if not has_results(folder):
        remove_folder(folder)
        return None
    new_path = previous_name(folder)
    folder.rename(new_path)
    _log.info("%s was moved to %s; the stage starts from the beginning", folder, new_path)
    return new_path
