"""Runs the stages of a recipe, one after the other; those that are done and unchanged are skipped.

Every stage is composed and checked before the first one starts. Each runs in a process of its own, `python -m
moetrain.cli <command> --config <stage folder>/config.yaml`: memory, process groups and DeepSpeed's state end with the
stage, a killed stage takes nothing else along, and the same line starts it by hand.

A stage's key is a hash of its config, of the package's source, of the files that its config names, and of the keys of
the stages that it takes. `started.json` has the key a stage began with: a stopped stage with the same key goes on, one
with another key is moved aside and begins anew. `done.json`, written last, says that it is done.
"""

import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

from moetrain.compose import compose, save_config, suggestion, to_mapping
from moetrain.config import RecipeRun, TrainingRun
from moetrain.errors import ConfigError
from moetrain.files import read_json_or_empty, write_json
from moetrain.run import recipe
from moetrain.run.inputs import check_inputs, check_names, check_records, check_weights
from moetrain.run.stage import check_writable, has_results, lock
from moetrain.runtime import die_with_parent

_log = logging.getLogger(__name__)

_STARTED, _DONE = "started.json", "done.json"
_NO_MATTER = ("run.folder", "run.name", "run.wandb.project", "run.wandb.mode", "dry_run")
"""Keys of a config that change no result."""


@dataclass(kw_only=True)
class Prepared:
    """A recipe whose stages are composed and checked."""

    run: RecipeRun
    folder: Path
    stages: list[recipe.Stage]


@dataclass(kw_only=True)
class Row:
    """A line of the table at the end."""

    stage: str
    status: str
    seconds: float


@dataclass(kw_only=True)
class Ran:
    """What a run did: a row a stage that it came to, how many stages were unchanged, and its exit code."""

    rows: list[Row]
    num_unchanged: int
    code: int


def run_stages(prepared: Prepared) -> Ran:
    """Run the stages that are not done, in order, until one fails."""
    keys = stage_keys(prepared)
    rows: list[Row] = []
    with lock(prepared.folder):
        begin = _first_to_run(prepared, keys)
        for stage in prepared.stages[begin:]:
            (prepared.folder / stage.name / _DONE).unlink(missing_ok=True)
        code = 0
        for number, stage in enumerate(prepared.stages):
            if number < begin:
                done = read_json_or_empty(prepared.folder / stage.name / _DONE)
                row = Row(stage=stage.name, status="unchanged", seconds=done["seconds"])
            else:
                code, seconds = _run_stage(prepared, stage, key=keys[stage.name])
                row = Row(stage=stage.name, status="done" if code == 0 else f"exit code {code}", seconds=seconds)
            rows.append(row)
            if code:
                break
    return Ran(rows=rows, num_unchanged=begin, code=code)


def prepare(words: Sequence[str]) -> Prepared:
    """Compose and check a run and all of its stages."""
    own, of_stages = recipe.split_overrides(words)
    for word in own:
        key = word.split("=")[0].lstrip("+~")
        if word.startswith("-"):
            raise ConfigError(f"{word}: there is no such option here; write key=value")
        if key in get_type_hints(TrainingRun) and key not in get_type_hints(RecipeRun):
            raise ConfigError(f"{word}: that is said to a stage, <stage>.{word}, such as pretrain.{word}")
    run: RecipeRun = compose("run", own)
    loaded = recipe.load(run.recipe)
    stages = recipe.compose_stages(loaded, run, overrides=of_stages)
    names = [stage.name for stage in stages]
    if run.again_from is not None and run.again_from not in names:
        raise ConfigError(f"again_from is {run.again_from!r}: {suggestion(run.again_from, names)}")
    folder = Path(run.folder) / (run.name or loaded.name)
    check_writable(folder)
    made = [Path(folder / stage.name).expanduser() for stage in stages]
    for number, stage in enumerate(stages):
        check_inputs(stage.config, made=made[:number], world_size=stage.processes)
    for number, stage in enumerate(stages):
        check_names(stage.config)
        check_records(stage.config)
        check_weights(stage.config, made=made[:number])
    return Prepared(run=run, folder=folder, stages=stages)


def stage_keys(prepared: Prepared) -> dict[str, str]:
    """Return the key of each stage: equal keys, equal results."""
    code = code_digest()
    keys: dict[str, str] = {}
    for stage in prepared.stages:
        config = _without(to_mapping(stage.config), _NO_MATTER)
        inputs = {name: keys[name] for name in stage.inputs}
        files = {name: _fingerprint(Path(name)) for name in sorted(_files(config, prepared.folder))}
        # Where the run lies does not matter: its own folder is written as a word.
        text = json.dumps([stage.command, config, code, inputs, files], sort_keys=True)
        keys[stage.name] = hashlib.sha256(text.replace(str(prepared.folder), "<run>").encode()).hexdigest()
    return keys


def code_digest() -> str:
    """Return the sha256 over the sources of the package."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _first_to_run(prepared: Prepared, keys: Mapping[str, str]) -> int:
    """Return the number of the first stage that is not done and unchanged; it and those after it run."""
    for number, stage in enumerate(prepared.stages):
        done = read_json_or_empty(prepared.folder / stage.name / _DONE)
        is_done = done.get("key") == keys[stage.name] and "seconds" in done
        if stage.name == prepared.run.again_from:
            _move_aside(prepared, number)
            return number
        if not is_done:
            return number
    return len(prepared.stages)


def _run_stage(prepared: Prepared, stage: recipe.Stage, *, key: str) -> tuple[int, float]:
    """Run a stage in a process of its own; return its exit code and seconds."""
    folder = prepared.folder / stage.name
    check_inputs(stage.config, world_size=stage.processes)
    if folder.exists() and read_json_or_empty(folder / _STARTED).get("key") != key:
        _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    save_config(stage.config, config)
    write_json(folder / _STARTED, {"key": key})
    words = [*stage.command.split(), "--config", str(config)]
    python = [sys.executable, "-m"]
    launcher, code = python, 0
    start = time.monotonic()
    if stage.processes > 1:
        torchrun = f"torch.distributed.run --standalone --nproc-per-node {stage.processes} -m".split()
        launcher = ["env", f"OMP_NUM_THREADS={stage.config.run.threads or 1}", *python, *torchrun]
        # What only reading the weights can tell is one line here, not one a rank.
        code = _wait(["env", f"WORLD_SIZE={stage.processes}", *python, "moetrain.cli", "check", *words])
    if code == 0:
        command = [*launcher, "moetrain.cli", *words]
        _log.info("stage %s: %s", stage.name, " ".join(command))
        code = _wait(command)
    seconds = time.monotonic() - start
    if code == 0:
        write_json(folder / _DONE, {"key": key, "seconds": seconds, "inputs": stage.inputs})
    return code, seconds


def _wait(command: Sequence[str]) -> int:
    """Run a process that dies with this one, and that is sent on the signals this one is sent; return its exit code."""
    process = subprocess.Popen(command, preexec_fn=die_with_parent)

    def send_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, send_on) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _move_aside(prepared: Prepared, begin: int) -> None:
    for stage in prepared.stages[begin:]:
        if (prepared.folder / stage.name).exists():
            _set_aside(prepared.folder / stage.name)


def _set_aside(folder: Path) -> None:
    """Rename a stage's folder to `<stage>.previous`, in place of an earlier one; one without results just goes."""
    if not has_results(folder):
        shutil.rmtree(folder)
        return
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    _log.info("%s is of another config, code or input: it is now %s, and the stage begins anew", folder, previous)


def _files(value: Any, run_folder: Path, key: str = "") -> Iterator[str]:
    """Yield what a config names that is a file or folder outside of the run."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _files(item, run_folder, name)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item, run_folder, key)
    elif isinstance(value, str) and (key in ("path", "plugins") or "/" in value):
        path = Path(value).expanduser()
        if path.exists() and not path.resolve().is_relative_to(run_folder.resolve()):
            yield str(path)


def _fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Return (name, size, time of change) of a file, or of all files of a folder."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [(str(item), item.stat().st_size, item.stat().st_mtime_ns) for item in files]


def _without(mapping: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in mapping.items()
        if prefix + name not in keys
    }
