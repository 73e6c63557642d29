"""What the commands of all stages share: plugins, input that must be there, the stage's folder and its metrics."""

import fcntl
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from moetrain.compose import save_config, to_mapping
from moetrain.config import ReadingRun, StageRun
from moetrain.data.config import SourceKind
from moetrain.data.sources import local_files
from moetrain.errors import CheckpointError, ConfigError, MoetrainError
from moetrain.log import Fanout, JsonlMetrics, Metrics, WandbMetrics, WandbMode

INTERRUPTED = 128 + signal.SIGTERM
"""Exit code of a stage that saved and stopped on a signal; the same command goes on."""
LOCAL_KINDS = (SourceKind.jsonl, SourceKind.parquet, SourceKind.text)
"""Kinds of sources that are files."""
PLUGINS = "moetrain.plugins"
"""Group of entry points through which an installed package offers tasks, tools or formats."""


def rank() -> int:
    """Return this process's number among the ranks that a launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def check_inputs(run: StageRun) -> None:
    """Raise the user's error when what the config names is not there; ranks and files come after this."""
    if run.init_from is not None and not Path(run.init_from).expanduser().exists():
        raise CheckpointError(f"init_from is {run.init_from}: there is no such folder")
    for plugin in run.plugins:
        _spec(plugin)
    if isinstance(run, ReadingRun):
        for source in run.data.sources.values():
            if source.kind in LOCAL_KINDS:
                local_files(source)


def load_plugins(plugins: Sequence[str]) -> list[ModuleType]:
    """Import the plugins that are named, and those of installed packages (entry points); return the modules."""
    modules = [entry.load() for entry in sorted(entry_points(group=PLUGINS), key=lambda entry: entry.name)]
    for plugin in plugins:
        spec = _spec(plugin)
        if spec.name in sys.modules:
            modules.append(sys.modules[spec.name])
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        assert spec.loader is not None
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a plugin's own code
            del sys.modules[spec.name]
            raise ConfigError(
                f"plugins: {plugin} fails when it is imported: {type(error).__name__}: {error}"
            ) from error
        modules.append(module)
    return modules


def _spec(plugin: str) -> importlib.machinery.ModuleSpec:
    """Return where a plugin is: the path of a .py file, or a module on the path or in the current folder."""
    if plugin.endswith(".py"):
        path = Path(plugin).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    else:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            spec = importlib.util.find_spec(plugin)
        except ModuleNotFoundError:
            spec = None
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: there is no {plugin}; give a module that Python finds, or the path of a .py file")
    return spec


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; `ConfigError` when another process holds it. It falls when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
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

    A new folder is taken away again when the user's input turns out to be bad before there is a checkpoint.
    """
    folder = run.run.path
    if rank() > 0:
        yield folder
        return
    is_new = not folder.exists()
    try:
        with lock(folder):
            scratch = folder / ".config.yaml.tmp"
            save_config(run, scratch)
            os.replace(scratch, folder / "config.yaml")
            yield folder
    except MoetrainError as error:
        if is_new and error.exit_code == ConfigError.exit_code and not (folder / "checkpoints").exists():
            shutil.rmtree(folder)
            for parent in (folder.parent, folder.parent.parent):
                with suppress(OSError):  # it holds something else
                    parent.rmdir()
        raise


@contextmanager
def stage_metrics(run: StageRun) -> Iterator[Metrics]:
    """Yield where rank 0 writes its metrics: metrics.jsonl and W&B; other ranks get one that writes nowhere."""
    sinks: list[Metrics] = []
    if rank() == 0:
        folder, wandb = run.run.path, run.run.wandb
        sinks.append(JsonlMetrics(folder / "metrics.jsonl"))
        if wandb.mode is not WandbMode.disabled:
            name = f"{run.run.name}/{run.run.stage}"
            sinks.append(
                WandbMetrics(folder, project=wandb.project, name=name, mode=wandb.mode, config=to_mapping(run))
            )
    metrics = Fanout(sinks)
    try:
        yield metrics
    finally:
        metrics.close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
