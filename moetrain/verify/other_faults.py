"""Faults other than kills and damaged files: a full disk, a batch with NaN, a rank that hangs, an elastic restart.

Each fault disturbs its own run. The run then resumes and is compared with the undisturbed run of its setup (`whole`).
"""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace

from moetrain.log import read_metrics
from moetrain.stage_files import METRICS
from moetrain.verify import fault_runs
from moetrain.verify.fault_runs import ROWS_PER_STEP, Attempt, FaultSetup, begin
from moetrain.verify.injection import Plan
from moetrain.verify.table import Row

_NAN_STEP = 3  # from 0; messages count from 1
_HANG_TIMEOUT_S = 30  # on a busy machine one rank may start this much later than the other
_FULL_DISK = """
set -u
mount -t tmpfs -o size="$1"k tmpfs "$2" || exit 90
shift 2
"$@"; echo "exit code $?"
ls -d "$STAGE"/checkpoints/step_* 2>/dev/null | wc -l
ls -d "$STAGE"/checkpoints/.step_*.tmp 2>/dev/null | wc -l
mount -o remount,size=200m tmpfs "$DISK" || exit 91
"$@"; echo "exit code $?"
cp -r "$DISK"/. "$COPY"
"""


def num_differences(setup: FaultSetup, name: str) -> int:
    """Return the number of metrics lines and last-checkpoint files that differ from the run `whole`; 0 if identical."""
    found = fault_runs.difference(setup.stage(name), whole=setup.stage("whole"))
    return found.num_lines + len(found.files)


def full_disk_row(setup: FaultSetup) -> Row:
    """Let a small disk fill up during a save, then enlarge the disk and start the run again.

    Uses a tmpfs in a separate mount namespace if `unshare` is permitted. Otherwise it limits the file size
    (RLIMIT_FSIZE), so that the first save fails.
    """
    name = "full_disk"
    size = sum(path.stat().st_size for path in fault_runs.checkpoints(setup.stage("whole"))[-1].iterdir())
    copy = setup.folder / name
    copy.mkdir()
    can_mount = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not can_mount or shutil.which("unshare") is None:
        return _limited_files(setup, name, size=size)
    disk = setup.folder / "disk"
    disk.mkdir()
    on_disk = replace(setup, folder=disk)
    environment = fault_runs.environment_of(Plan(folder=str(copy)))
    environment |= {"DISK": str(disk), "COPY": str(setup.folder), "STAGE": str(on_disk.stage(name))}
    # Space for one and a half checkpoints, plus the tokenizer and other small files.
    kilobytes = int(1.5 * size) // 1024 + 256
    script = ["unshare", "-rm", "sh", "-c", _FULL_DISK, "sh", str(kilobytes), str(disk), *on_disk.command(name)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=600)
    (copy / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    counts = [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()]
    one_line = [line for line in done.stderr.splitlines() if "No space left" in line and line.startswith("moetrain: ")]
    is_clear = codes[:1] == ["exit code 1"] and len(one_line) == 1 and counts[:1] not in ([], ["0"])
    wrong = (not is_clear) + (codes[1:] != ["exit code 0"])
    wrong += num_differences(setup, name) if codes[1:] == ["exit code 0"] else 0
    note = f"tmpfs of {kilobytes} KB: {', then '.join(codes)}; {one_line[0][:90] if one_line else 'no clear line'}"
    return Row(name="full disk: what went wrong", value=wrong, bound=0, note=note)


def _limited_files(setup: FaultSetup, name: str, *, size: int) -> Row:
    environment = fault_runs.environment_of(Plan(folder=str(setup.folder / name)))
    limited = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(size // 4 // 512), *setup.command(name)]
    first = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False, timeout=600)
    again = subprocess.run(setup.command(name), env=environment, capture_output=True, check=False, timeout=600)
    is_clear = first.returncode == 1 and "was not written" in first.stderr and "Traceback" not in first.stderr
    wrong = (not is_clear) + (again.returncode != 0) + (num_differences(setup, name) if again.returncode == 0 else 0)
    note = f"RLIMIT_FSIZE (no mount namespace here): exit code {first.returncode}, then {again.returncode}"
    return Row(name="full disk: what went wrong", value=wrong, bound=0, note=note)


def nonfinite_rows(setup: FaultSetup) -> list[Row]:
    """Put NaN into one batch. `on_nonfinite=stop` must stop with one line and resume to identical bits without the NaN;
    `on_nonfinite=skip` must count the skipped step.
    """
    spoilt = {"nan_row": _NAN_STEP * ROWS_PER_STEP}
    stopped = begin(setup, "nan_stop", plan=spoilt)
    code = stopped.wait()
    is_clear = code != 0 and f"step {_NAN_STEP + 1}: the loss is nan" in stopped.output()
    again = begin(setup, "nan_stop", plan={}).wait()
    skipping = begin(setup, "nan_skip", plan=spoilt, more=["train.on_nonfinite=skip"]).wait()
    rows = [row for row in read_metrics(setup.stage("nan_skip") / METRICS) if "skipped_steps" in row]
    counted = [row["skipped_steps"] for row in rows]
    is_counted = skipping == 0 and counted[-1:] == [1.0] and sum("loss" not in row for row in rows) == 1
    return [
        Row(
            name="NaN in one rank's batch, stop: what went wrong",
            value=(not is_clear) + (again != 0) + num_differences(setup, "nan_stop"),
            bound=0,
            note=f"exit code {code} at step {_NAN_STEP + 1}; resumed without the NaN, exit code {again}",
        ),
        Row(
            name="NaN in one rank's batch, skip: what went wrong",
            value=int(not is_counted),
            bound=0,
            note=f"exit code {skipping}, skipped_steps {counted[-1] if counted else 'missing'} of {len(counted)}",
        ),
    ]


def hang_rows(setup: FaultSetup) -> list[Row]:
    """Stop a rank before a collective. The other ranks must name it and the step, and the next start must resume."""
    plan = {"moment": "collective", "number": 40, "rank": setup.ranks - 1}
    attempt = begin(setup, "hung", plan=plan, more=[f"parallel.timeout_s={_HANG_TIMEOUT_S}"])
    code = attempt.wait()
    lines = [line for line in attempt.output().splitlines() if f"did not arrive: rank {setup.ranks - 1}" in line]
    is_named = code != 0 and bool(lines) and "step " in lines[0]
    again = begin(setup, "hung", plan={}).wait()
    return [
        Row(
            name="a rank that hangs: what went wrong",
            value=(not is_named) + (again != 0) + num_differences(setup, "hung"),
            bound=0,
            note=f"exit code {code}: {lines[0][:110] if lines else 'no rank was named'}",
        )
    ]


def elastic_rows(setup: FaultSetup) -> list[Row]:
    """Kill one rank under torchrun's --max-restarts. torchrun must restart it, and the result must be bit-identical."""
    attempt = begin(setup, "elastic", plan={"moment": "collective", "number": 60, "rank": 0}, restarts=2)
    _kill_at_gate(attempt)
    code = attempt.wait()
    return [
        Row(
            name="elastic restart: what went wrong",
            value=(code != 0) + num_differences(setup, "elastic"),
            bound=0,
            note=f"rank 0 killed once under --max-restarts 2; the launcher ended with {code}",
        )
    ]


def _kill_at_gate(attempt: Attempt) -> None:
    while not attempt.is_over() and not attempt.gate(0):
        time.sleep(0.01)
    if not attempt.is_over():
        os.kill(attempt.pid(0), signal.SIGKILL)
