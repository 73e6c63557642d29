"""Kills a whole recipe again and again, in each of its stages, and compares all that it writes with an undisturbed run.

A kill meets the command `moetrain run`, whose stage must then end by itself, or the processes of the stage, after which
the command must end by itself, or all of them, as when a machine fails. The next attempt is the same command: it leaves
out the stages that are done and resumes the one that was killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.errors import ConfigError
from moetrain.files import sha256_of
from moetrain.runtime import ENDED, die_with_parent, process_state, python_stream
from moetrain.stage_files import CONFIG, DONE, MACHINE, MADE_BY, METRICS, STARTED, SUMMARY, TIMES
from moetrain.verify import fault_runs
from moetrain.verify.table import Row

_LATEST_SHARE = 0.7
"""Latest kill in a stage, as a share of the time that the stage takes undisturbed."""
_POLL_S = 0.02
_ALL_ENDED_S = 60.0
_VICTIMS = ("command", "stage", "all")
_MEASURED = {CONFIG, DONE, MADE_BY, MACHINE, STARTED, SUMMARY, TIMES}
"""Files of a stage that contain times, paths and ids; `report.html` draws these too."""


@dataclass(kw_only=True)
class _Run:
    """The runs of one recipe in `folder`/`name`. seconds: time of each stage of the undisturbed run."""

    recipe: str
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    landed: dict[str, int] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    attempts: int = 0

    def stages(self, name: str) -> Path:
        """Return the folder with the stages of the run `name`."""
        return self.folder / name / "recipe"

    def start(self, name: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start an attempt; return its process and its log."""
        words = ["run", f"recipe={self.recipe}", f"folder={self.folder / name}", "name=recipe", "wandb.mode=disabled"]
        log = self.folder / f"{name}.attempt_{self.attempts:03d}.log"
        self.attempts += 1
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "moetrain.cli", *words],
                env=fault_runs.base_environment(),
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return process, log


def recipe_rows(folder: Path, *, recipe: str, kills: int, seed: int, advance: Callable[[str], None]) -> list[Row]:
    """Return the rows of a recipe that is killed `kills` times, spread over its stages by the time that they take.

    Raises `ConfigError` if the undisturbed run fails.
    """
    run = _Run(recipe=recipe, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    _undisturbed(run)
    stream = python_stream(seed, "verify.faults.recipe")
    plan = _planned(run.seconds, kills)
    for number, stage in enumerate(plan):
        after_s = run.seconds[stage] * stream.uniform(0.0, _LATEST_SHARE)
        _killed(run, stage, after_s=after_s, victim=_VICTIMS[number % len(_VICTIMS)])
        advance(f"{recipe} killed in {stage}")
    process, log = run.start("killed")
    if process.wait() != 0:
        run.unexpected.append(f"{log}: exit code {process.returncode}")
    return _rows(run, kills=kills)


def _undisturbed(run: _Run) -> None:
    """Run the recipe to its end, and measure the time of each stage."""
    process, log = run.start("whole")
    began: dict[str, float] = {}
    while process.poll() is None:
        stage = _stage_of(process.pid, run.stages("whole"))
        if stage:
            now = time.monotonic()
            run.seconds[stage] = now - began.setdefault(stage, now)
        time.sleep(_POLL_S)
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        raise ConfigError(f"the undisturbed run of the recipe failed: {lines[-1]} (log: {log})")


def _planned(seconds: dict[str, float], kills: int) -> list[str]:
    """Return the stage of each kill, in the order of the stages: one each, and more in those that take more time."""
    counts = dict.fromkeys(seconds, 0)
    for _ in range(kills):
        counts[
            min(seconds, key=lambda stage: (counts[stage] > 0, (1 + counts[stage]) / max(seconds[stage], _POLL_S)))
        ] += 1
    return [stage for stage, count in counts.items() for _ in range(count)]


def _killed(run: _Run, stage: str, *, after_s: float, victim: str) -> None:
    """Start an attempt and kill `victim` when `stage` has run for `after_s`, or when a later stage runs."""
    process, log = run.start("killed")
    names, began, current = list(run.seconds), None, ""
    while process.poll() is None:
        current = _stage_of(process.pid, run.stages("killed")) or current
        if current == stage and began is None:
            began = time.monotonic()
        is_later = current in names and names.index(current) > names.index(stage)
        if is_later or (began is not None and time.monotonic() - began >= after_s):
            break
        time.sleep(_POLL_S)
    children = _descendants(process.pid)
    if process.poll() is not None:
        run.unexpected.append(f"{log}: ended with {process.returncode} before it was killed in {stage}")
        return
    for pid in {"command": [process.pid], "stage": children, "all": [process.pid, *children]}[victim]:
        with suppress(ProcessLookupError):  # children may end with the command
            os.kill(pid, signal.SIGKILL)
    run.landed[current] = run.landed.get(current, 0) + 1
    deadline = time.monotonic() + _ALL_ENDED_S
    while process.poll() is None or any(_is_running(pid) for pid in children):
        if time.monotonic() > deadline:
            run.unexpected.append(f"{log}: processes are left {_ALL_ENDED_S:.0f} s after a kill of: {victim}")
            return
        time.sleep(_POLL_S)
    if process.returncode == 0:
        run.unexpected.append(f"{log}: exit code 0 after a kill of: {victim}")


def _rows(run: _Run, *, kills: int) -> list[Row]:
    where = ", ".join(f"{stage} {count}" for stage, count in run.landed.items())
    rows = [
        Row(
            name="recipe: kills that did not land",
            value=kills - sum(run.landed.values()),
            bound=0,
            note=f"{run.recipe}; landed in {where}",
        ),
        Row(
            name="recipe: attempts that ended unexpectedly",
            value=len(run.unexpected),
            bound=0,
            note="; ".join(run.unexpected[:3]),
        ),
    ]
    return [*rows, *comparison_rows(run.stages("whole"), run.stages("killed"))]


def comparison_rows(whole: Path, killed: Path) -> list[Row]:
    """Return rows that compare the stages of two runs of a recipe: their metrics, and their other files byte by byte.

    What holds measured times, paths or ids is left out.
    """
    stages = sorted(path.name for path in whole.iterdir() if path.is_dir())
    num_lines = num_differing = 0
    differing: list[str] = []
    compared = 0
    for stage in stages:
        ours, theirs = [
            fault_runs.numbers(folder) if (folder / METRICS).is_file() else []
            for folder in (killed / stage, whole / stage)
        ]
        num_lines += max(len(ours), len(theirs))
        num_differing += sum(one != two for one, two in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
        found, expected = _digests(killed / stage), _digests(whole / stage)
        compared += len(expected)
        differing += [
            f"{stage}/{name}" for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)
        ]
    return [
        Row(
            name="recipe: metrics lines that differ",
            value=num_differing,
            bound=0,
            note=f"of {num_lines} in {len(stages)} stages",
        ),
        Row(
            name="recipe: files that differ",
            value=len(differing),
            bound=0,
            note="; ".join(differing[:3]) or f"of {compared}: checkpoints, exports, evaluations, trajectories, report",
        ),
    ]


def _digests(stage: Path) -> dict[str, str]:
    """Return the sha256 of the files of a stage by name: its last checkpoint, and all files without measured times."""
    digests = {f"checkpoints/{name}": digest for name, digest in fault_runs.final_state(stage).items()}
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        name = path.relative_to(stage)
        is_other = name.name in _MEASURED or name.name.startswith(".") or name.suffix == ".html"
        if is_other or name.parts[0] in ("checkpoints", "wandb") or name.name == METRICS:
            continue
        digests[name.as_posix()] = sha256_of(path)
    return digests


def _stage_of(pid: int, stages: Path) -> str:
    """Return the name of the stage whose processes the command `pid` has started, or an empty string."""
    for child in _descendants(pid):
        for word in _words(child):
            path = Path(word)
            if path.name == CONFIG and path.parent.parent == stages:
                return path.parent.name
    return ""


def _descendants(pid: int) -> list[int]:
    """Return the ids of all processes that `pid` and its children have started, from /proc."""
    found: list[int] = []
    for tasks in sorted(Path(f"/proc/{pid}/task").glob("*/children")):
        try:
            children = [int(word) for word in tasks.read_text().split()]
        except OSError:  # the process ended
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _is_running(pid: int) -> bool:
    return process_state(pid) not in ENDED
