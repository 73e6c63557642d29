"""`moetrain verify gpu`: runs each part in a process of its own, within its time, and collects the rows.

The comparisons are in `gpu_operations` and `gpu_models`, which `gpu_worker` runs; the other parts are commands of
moetrain, whose exit code is the measured value.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.commands.verify import GpuPart, VerifyGpuRun
from moetrain.errors import ConfigError
from moetrain.runtime import die_with_parent
from moetrain.verify.table import Row

_ROW = ("value", "bound", "note")
COMMANDS: Mapping[GpuPart, Sequence[str]] = {
    GpuPart.recipe: ["run", "recipe=k2_nano_test", "num_processes=1"],
    GpuPart.bench_train: ["bench", "train", "peers=[]", "steps=4", "repetitions=3", "profile_steps=0"],
    GpuPart.bench_decode: [
        *("bench", "decode", "peers=[]", "repetitions=3"),
        "cases=[{batch:1,context:128},{batch:16,context:128},{batch:64,context:128},{batch:1,context:8192}]",
    ],
}
"""Words after `moetrain` of the parts that are commands."""
_RESULTS: Mapping[GpuPart, str] = {
    **dict.fromkeys(GpuPart, "rows.json"),
    GpuPart.recipe: "k2_nano_test/verify/verify.json",
    GpuPart.bench_train: "default/bench_train/bench.json",
    GpuPart.bench_decode: "default/bench_decode/bench.json",
}
"""The file that a part writes, in its folder."""


def check_gpu() -> None:
    """Raise ConfigError if torch finds no GPU."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise ConfigError(f"verify gpu requires a GPU, and torch {torch.__version__} is built without CUDA")
    raise ConfigError(f"verify gpu requires a GPU, and torch {torch.__version__} finds none: check nvidia-smi")


def describe_gpu() -> dict[str, Any]:
    """Return what the rows were measured on and with."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if has_triton else None,
    }


def verify_gpu(run: VerifyGpuRun, *, folder: Path) -> Iterator[Row]:
    """Yield the rows of each part once it has ended. folder: the log and the JSON file of each part are written there.

    Recipes and weights are written to a folder that is deleted afterwards, so that no earlier result can be taken for
    one of this run.
    """
    deadline = time.monotonic() + run.total_seconds
    for part in run.parts:
        left = deadline - time.monotonic()
        if left <= 0:
            yield _failed(part, f"did not start: {run.total_seconds} s (total_seconds) were over")
            continue
        with tempfile.TemporaryDirectory(prefix=f"{part}_", dir=folder) as scratch:
            yield from _run_part(part, Path(scratch), folder=folder, seconds=min(run.part_seconds, left))


def _run_part(part: GpuPart, scratch: Path, *, folder: Path, seconds: float) -> Iterator[Row]:
    log, result = folder / f"{part}.log", folder / f"{part}.json"
    result.unlink(missing_ok=True)
    ended = run_limited(_words(part, scratch), log=log, seconds=seconds)
    written = scratch / _RESULTS[part]
    if written.is_file():
        shutil.copy(written, result)
    found: list[Row] = []
    if part not in COMMANDS and written.is_file():
        rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
        found = [Row(name=f"{part}: {row['name']}", **{key: row[key] for key in _ROW}) for row in rows]
    yield from found  # also those before a failure
    if ended.problem is not None:
        yield _failed(part, f"{ended.problem}; see {log}")
    elif part in COMMANDS:
        note = f"{_speeds(part, written)}{ended.seconds:.0f} s"
        yield Row(name=f"{part}: exit code", value=0, bound=0, note=note)
    elif not found:
        yield _failed(part, f"compared nothing; see {log}")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended. problem: None if it succeeded."""

    seconds: float
    problem: str | None


def run_limited(words: Sequence[str], *, log: Path, seconds: float) -> Ended:
    """Run a command line in a session of its own; end it with all that it started after `seconds`."""
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    problem = None
    try:
        code = process.wait(timeout=seconds)
        if code != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            problem = f"exit code {code}: {lines[-1] if lines else 'no output'}"
    except subprocess.TimeoutExpired:
        problem = f"took longer than {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a process left running
        process.wait()
    return Ended(seconds=time.monotonic() - start, problem=problem)


def _words(part: GpuPart, scratch: Path) -> list[str]:
    """Return the command line of a part, which writes to `scratch`."""
    if part not in COMMANDS:
        return [sys.executable, "-m", "moetrain.verify.gpu_worker", part, str(scratch / _RESULTS[part])]
    place = [f"folder={scratch}"] if part is GpuPart.recipe else [f"run.folder={scratch}"]
    return [sys.executable, "-m", "moetrain.cli", *COMMANDS[part], *place]


def _failed(part: GpuPart, problem: str) -> Row:
    return Row(name=f"{part}: failed", value=1, bound=0, note=problem)


def _speeds(part: GpuPart, written: Path) -> str:
    """Return the speeds of a benchmark that has succeeded, followed by a separator; nothing for other parts."""
    if part is GpuPart.recipe:
        return ""
    report = json.loads(written.read_text(encoding="utf-8"))
    if part is GpuPart.bench_train:
        speeds = [f"{row['tokens_per_s']['median']:,.0f} tokens/s ({row['name']})" for row in report["rows"]]
    else:
        speeds = [
            f"{case['rows'][0]['tokens_per_s']['median']:,.0f} tokens/s ({case['batch']} x {case['context']})"
            for case in report["cases"]
        ]
    return f"{', '.join(speeds)}; "
