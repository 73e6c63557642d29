"""What the commands of all stages share: the stage's folder and its metrics."""

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrain.commands import SCHEMAS
from moetrain.compose import read_yaml, save_config, to_mapping
from moetrain.config import StageRun
from moetrain.errors import ConfigError, MoetrainError
from moetrain.files import write_json
from moetrain.log import Fanout, JsonlMetrics, Metrics, WandbMetrics, WandbMode, wandb_mode
from moetrain.run.provenance import MADE_BY, provenance

INTERRUPTED = 128 + signal.SIGTERM
"""Exit code of a stage that saved and stopped on a signal; the same command goes on."""
CONFIG = "config.yaml"
"""The config of a stage, in its folder."""
_RESULTS = ("checkpoints/step_*", "model/*", "summary.json", "eval.json", "verify.json", "report.html")
"""What a stage leaves that was made with its config."""


def rank() -> int:
    """Return this process's number among the ranks that a launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def check_folder(run: StageRun) -> None:
    """Raise the user's error when the stage's folder cannot be written, or holds what another command wrote."""
    check_writable(run.run.path)
    try:
        earlier = read_yaml(run.run.path / CONFIG)
    except ConfigError:
        return  # torn by a machine that stopped: it is written again
    schema = to_mapping(run)
    if foreign := sorted(name for name in earlier if name not in schema):
        raise ConfigError(
            f"{run.run.path} is the folder of another command ({CONFIG} there has {', '.join(foreign)}): "
            "give another run.stage or run.name"
        )


def has_results(folder: Path) -> bool:
    """Return whether a stage has left anything there that was made with its config."""
    return any(next(folder.glob(pattern), None) for pattern in _RESULTS)


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` when `folder` cannot be made or written in; nothing is made."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        wrong = "" if there.is_dir() else f"{there} is a file"
        wrong = wrong or ("" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable")
    except OSError as error:
        wrong = error.strerror or str(error)
    if wrong:
        raise _unusable(folder, wrong)


def _unusable(folder: Path, wrong: str) -> ConfigError:
    return ConfigError(f"the run's folder {str(folder)[:200]} cannot be written: {wrong}; give another folder or name")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; `ConfigError` when another process holds it. It falls when the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("a+")
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by process {file.read().strip() or '?'}: wait for it, or give another run name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def stage_folder(run: StageRun) -> Iterator[Path]:
    """Yield the stage's folder; rank 0 locks it and writes `config.yaml` there.

    Where there are results, the config that they were made with stays until this run has ended well: one that is
    refused leaves the folder as it was. A new folder is taken away again when the user's input turns out to be bad
    before there is a checkpoint.
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
        if is_new and error.exit_code == ConfigError.exit_code and not (folder / "checkpoints").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in (folder.parent, folder.parent.parent):
                with suppress(OSError):  # it holds something else
                    parent.rmdir()
        raise


@contextmanager
def stage_metrics(run: StageRun) -> Iterator[Metrics]:
    """Yield where rank 0 writes its metrics: metrics.jsonl and W&B; other ranks get one that writes nowhere."""
    sinks: list[Metrics] = []
    first: dict[str, float] = {}
    if rank() == 0:
        mode = wandb_mode(run.run.wandb.mode)
        sinks.append(JsonlMetrics(run.run.path / "metrics.jsonl"))
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
