"""Starts, kills and compares runs of the real `pretrain` command for `verify faults`. Uses only processes and files.

An *attempt* is one process, or one launcher with its ranks, from its start to its end, whether it is killed or not.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetrain.log import read_metrics
from moetrain.runtime import ENDED, die_with_parent, process_state
from moetrain.stage_files import METRICS
from moetrain.verify.injection import VARIABLE, Plan
from moetrain.verify.table import Row

ROWS_PER_STEP = 4
CHECKPOINT_EVERY = 2
LIFE_LIMIT_S = 300.0
"""Time limit of an attempt in seconds; an attempt that takes longer counts as hung and is killed."""
_POLL_S = 0.002
_SHUTDOWN_S = 5


@dataclass(frozen=True, kw_only=True)
class FaultSetup:
    """How a group of runs is started: ranks, steps, model and additional overrides. `folder` contains the runs.

    stage_name: pretrain, or a stage that begins with `weights`. more: overrides of that stage.
    """

    folder: Path
    ranks: int
    steps: int
    model: str
    overrides: tuple[str, ...] = ()
    stage_name: str = "pretrain"
    weights: Path | None = None
    more: tuple[str, ...] = ()

    def stage(self, name: str) -> Path:
        """Return the stage folder of the run `name`."""
        return self.folder / name / self.stage_name

    def command(self, name: str, *, more: Sequence[str] = (), restarts: int = 0) -> list[str]:
        """Return the command line that starts or resumes the run `name`.

        more: additional overrides. restarts: torchrun's --max-restarts.
        """
        words = [self.stage_name, f"model={self.model}", f"run.folder={self.folder}", f"run.name={name}"]
        words += ["run.wandb.mode=disabled", "plugins=[moetrain.verify.injection]", f"train.steps={self.steps}"]
        words += [f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.keep_checkpoints=3"]
        words += [f"parallel.expert={self.ranks}"]
        if self.weights is not None:
            words.append(f"init_from={self.weights}")
        else:
            words += ["data=test", "data.seq_len=64", "~data.sources.dialogues", "train.validate_every=0"]
            words.append(f"train.rows_per_step={ROWS_PER_STEP}")
            words.append(f"train.rows_per_micro_batch={ROWS_PER_STEP // self.ranks}")
        words += [*self.overrides, *self.more, *more]
        launcher = [sys.executable, "-m"]
        if self.ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
            launcher += ["--max-restarts", str(restarts), "--shutdown-timeout", str(_SHUTDOWN_S), "-m"]
        return [*launcher, "moetrain.cli", *words]


@dataclass(kw_only=True)
class Attempt:
    """A started attempt. `report_folder` is the folder to which its ranks report."""

    process: subprocess.Popen[bytes]
    report_folder: Path
    log: Path
    started: float

    def is_over(self) -> bool:
        """Return whether the process has ended. Kills an attempt that is over its time limit."""
        if time.monotonic() - self.started > LIFE_LIMIT_S:
            self.kill_all()
        return self.process.poll() is not None

    def gate(self, rank: int) -> str:
        """Return what `rank` wrote when it stopped at its chosen moment, or an empty string before that."""
        path = self.report_folder / f"gate_{rank}"
        return (
            path.read_text(encoding="utf-8").strip() if path.exists() and process_state(self.pid(rank)) == "T" else ""
        )

    def place(self, rank: int) -> str:
        """Return "in <collective>" or "out <collective>": the collective that `rank` last entered or left."""
        path = self.report_folder / f"place_{rank}"
        return " ".join(path.read_text(encoding="utf-8").split()) if path.exists() else ""

    def pid(self, rank: int) -> int:
        """Return the process id of `rank`, or 0 if it has not reported yet."""
        path = self.report_folder / f"pid_{rank}"
        return int(path.read_text(encoding="utf-8") or 0) if path.exists() else 0

    def kill(self, rank: int, *, ranks: int) -> None:
        """Send SIGKILL to one rank, and resume stopped ranks so that they notice its death."""
        os.kill(self.pid(rank), signal.SIGKILL)
        for other in range(ranks):
            if other != rank and process_state(self.pid(other)) == "T":
                os.kill(self.pid(other), signal.SIGCONT)

    def kill_all(self) -> None:
        """Send SIGKILL to the launcher and all ranks, as when a machine fails."""
        ranks = [int(path.read_text(encoding="utf-8") or 0) for path in self.report_folder.glob("pid_*")]
        for pid in [self.process.pid, *ranks]:
            if process_state(pid) not in ENDED:
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the process and all its ranks have ended; return the exit code."""
        while not self.is_over():
            time.sleep(_POLL_S)
        deadline = time.monotonic() + 60
        while any(process_state(int(p.read_text() or 0)) not in ENDED for p in self.report_folder.glob("pid_*")):
            if time.monotonic() > deadline:
                self.kill_all()
            time.sleep(_POLL_S)
        return self.process.wait()

    def output(self) -> str:
        """Return the output of the process and its ranks."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def begin(
    setup: FaultSetup, name: str, *, plan: dict[str, Any], more: Sequence[str] = (), restarts: int = 0
) -> Attempt:
    """Start an attempt of the run `name`. plan: fields of `Plan` except its folder."""
    number = len(list(setup.folder.glob(f"{name}.attempt_*")))
    report_folder = setup.folder / f"{name}.attempt_{number:03d}"
    report_folder.mkdir(parents=True)
    command = setup.command(name, more=more, restarts=restarts)
    environment = environment_of(Plan(folder=str(report_folder), **plan))
    with (report_folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent
        )
    return Attempt(process=process, report_folder=report_folder, log=report_folder / "log", started=time.monotonic())


def environment_of(plan: Plan) -> dict[str, str]:
    """Return the environment variables of an attempt, with `plan` as JSON."""
    return base_environment() | {"OMP_NUM_THREADS": "1", VARIABLE: json.dumps(asdict(plan))}


def base_environment() -> dict[str, str]:
    """Return this process's environment variables without those of a launcher; Python finds this package."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launchers} | {"PYTHONPATH": path}


def pause() -> None:
    """Wait for a moment, between two looks at a process."""
    time.sleep(_POLL_S)


def num_lines(stage: Path) -> int:
    """Return the number of lines in metrics.jsonl."""
    path = stage / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(stage: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted((stage / "checkpoints").glob("step_*"))


def partial_files(stage: Path) -> list[str]:
    """Return the files in partially written checkpoints, as "folder/file"."""
    found = stage.glob("checkpoints/.step_????????.tmp/*")  # checkpoints that are being deleted have other names
    return sorted(str(path.relative_to(stage / "checkpoints")) for path in found)


def numbers(stage: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what may differ: times, damaged checkpoints, counts of generation."""
    lines = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "checkpoint/", "generation/"))}
        for row in read_metrics(stage / METRICS)
    ]
    return [line for line in lines if len(line) > 1]


def final_state(stage: Path) -> dict[str, str]:
    """Return sha256 of each file of the last checkpoint; state.json is hashed without its measured seconds."""
    digests: dict[str, str] = {}
    for path in sorted(path for newest in checkpoints(stage)[-1:] for path in newest.iterdir()):
        content = path.read_bytes()
        if path.name == "state.json":
            content = json.dumps(_without_seconds(json.loads(content)), sort_keys=True).encode()
        if path.name != "index.json":  # it contains the digest of state.json, which includes measured seconds
            digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests


@dataclass(kw_only=True)
class Difference:
    """Difference of two runs: the number of differing metrics lines, and the differing files of the last checkpoint."""

    num_lines: int
    files: list[str]


def difference(stage: Path, *, whole: Path) -> Difference:
    """Compare a run with the undisturbed run `whole`. A run without a checkpoint differs in all lines and files."""
    ours, theirs = numbers(stage) if checkpoints(stage) else [], numbers(whole)
    num_lines = sum(one != two for one, two in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    files, expected = final_state(stage), final_state(whole)
    return Difference(
        num_lines=num_lines,
        files=[name for name in sorted({*files, *expected}) if files.get(name) != expected.get(name)],
    )


def comparison_rows(title: str, *, whole: Path, other: Path) -> list[Row]:
    """Return rows that compare two runs bit by bit: their metrics, and the files of their last checkpoints."""
    if not checkpoints(other) or not checkpoints(whole):
        return [Row(name=f"{title}: no checkpoint to compare", value=1, bound=0)]
    found = difference(other, whole=whole)
    attempts = len(list(other.parent.parent.glob(f"{other.parent.name}.attempt_*")))
    return [
        Row(
            name=f"{title}: metrics lines that differ",
            value=found.num_lines,
            bound=0,
            note=f"of {len(numbers(whole))}, undisturbed against {attempts} attempts",
        ),
        Row(
            name=f"{title}: files of the last checkpoint that differ",
            value=len(found.files),
            bound=0,
            note=f"of {len(final_state(whole))} in {checkpoints(whole)[-1].name}",
        ),
    ]


def _without_seconds(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_seconds(item) for name, item in value.items() if name != "seconds"}
