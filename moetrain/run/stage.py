"""Folder, lock and metrics of a stage, shared by all stage commands."""

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrain.commands.schemas import SCHEMAS
from moetrain.commands.stage import StageRun
from moetrain.compose import read_yaml, save_config, to_mapping
from moetrain.errors import ConfigError, MoetrainError
from moetrain.files import write_json
from moetrain.log import Fanout, JsonlMetrics, Metrics, WandbMetrics, WandbMode, wandb_mode
from moetrain.run.provenance import provenance
from moetrain.runtime import rank
from moetrain.stage_files import CONFIG, MACHINE, MADE_BY, METRICS, STARTED, TRACES

INTERRUPTED = 128 + signal.SIGTERM
"""Exit code of a stage that saved and stopped on a signal; the same command resumes it."""
_COLLECTED = ("finished_modes.json", "collection/*")
"""Patterns of what an evaluation or a collection has finished before it ends."""
_RESULTS = (
    *("checkpoints/step_*", "model/*", "*/index.json", "[!.]*.json", "[!.]*.html"),
    *(*_COLLECTED, f"{TRACES}*/*", "*/.work/*.json"),  # of an evaluation, a collection or a preparation that stopped
    "[!.]*.previous*",
)
"""Patterns of result files in a stage folder, which belong to its config."""
_NO_RESULTS = (STARTED, MADE_BY, MACHINE)
"""Files that a stage has before it has results."""

_WORK = ("checkpoints", "*/.work/*.json", "*/index.json", *_COLLECTED)
"""Patterns of what a stage that failed on the user's input keeps: work that would take long to do again."""


def check_folder(run: StageRun) -> None:
    """Raise `ConfigError` if the stage folder is not writable or belongs to another command."""
    check_writable(run.run.path)
    try:
        earlier = read_yaml(run.run.path / CONFIG)
    except ConfigError:
        return  # incomplete after a machine failure; it is written again
    schema = to_mapping(run)
    # Older versions wrote null for fields that a command did not use.
    if foreign := sorted(name for name, value in earlier.items() if name not in schema and value is not None):
        raise ConfigError(
            f"{run.run.path} is the folder of another command ({CONFIG} there has {', '.join(foreign)}): "
            "give another run.stage or run.name"
        )


def has_results(folder: Path) -> bool:
    """Return whether a stage folder contains results."""
    return any(path.name not in _NO_RESULTS for pattern in _RESULTS for path in folder.glob(pattern))


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` if `folder` cannot be created or is not writable. Creates nothing."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        problem = "" if there.is_dir() else f"{there} is a file"
        problem = problem or ("" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable")
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise _unusable(folder, problem)


def _unusable(folder: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"the run's folder {str(folder)[:200]} cannot be written: {problem}; give another folder or name"
    )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder until the process ends at the latest. `ConfigError` if another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("a+b", buffering=0)
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "?"
            raise ConfigError(f"{folder} is in use by process {owner}: wait for it, or give another run name") from None
        with suppress(OSError):  # a full disk: the number of the process is for messages only
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


@contextmanager
def stage_folder(run: StageRun) -> Iterator[Path]:
    """Yield the stage folder; rank 0 locks it and writes `config.yaml` there.

    If the folder contains results, their config.yaml is replaced only after this run succeeds, so a run that is refused
    leaves the folder unchanged. A new folder is removed if the user's input is rejected before the first checkpoint.
    """
    folder = run.run.path
    if rank() > 0:
        yield folder
        return
    is_new = not folder.exists()
    scratch = folder / f".{CONFIG}.tmp"
    try:
        with lock(folder):
            keeps = has_results(folder)
            save_config(run, scratch)
            try:
                if not keeps:
                    os.replace(scratch, folder / CONFIG)
                started = time.time()
                yield folder
                write_json(folder / MADE_BY, provenance(started=started))
                if keeps:
                    os.replace(scratch, folder / CONFIG)
            finally:
                scratch.unlink(missing_ok=True)
    except MoetrainError as error:
        has_work = any(next(folder.glob(pattern), None) for pattern in _WORK)
        if is_new and error.exit_code == ConfigError.exit_code and not has_work:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in (folder.parent, folder.parent.parent):
                with suppress(OSError):  # the folder is not empty
                    parent.rmdir()
        raise


@contextmanager
def stage_metrics(run: StageRun) -> Iterator[Metrics]:
    """Yield the metrics writer: metrics.jsonl and W&B on rank 0, a writer without destinations on other ranks."""
    sinks: list[Metrics] = []
    first: dict[str, float] = {}
    if rank() == 0:
        mode = wandb_mode(run.run.wandb.mode)
        sinks.append(JsonlMetrics(run.run.path / METRICS))
        if mode is not WandbMode.disabled:
            command = next(command for command, schema in SCHEMAS.items() if schema is type(run))
            wandb = WandbMetrics(
                run.run.path,
                project=run.run.wandb.project,
                name=f"{run.run.name}/{run.run.stage}",
                mode=mode,
                config=to_mapping(run),
                group=run.run.name,
                job_type=command,
                tags=["moetrain", command],
            )
            sinks.append(wandb)
            first = {"wandb/fell_back": 1.0} if wandb.fell_back else {}
    metrics = Fanout(sinks, first=first)
    try:
        yield metrics
    finally:
        metrics.close()
