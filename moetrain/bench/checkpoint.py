"""`moetrain bench checkpoint`: rates compared with torch's distributed checkpoint, and what a save costs.

Both write the same tensors (weights and optimizer state) to the same disk and sync them. Before a read on Linux, the
files are dropped from the page cache. Ours hashes what it writes and checks every file before it reads; torch's checks
nothing.
"""

import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from moetrain.bench.batches import zipf_batch
from moetrain.bench.spread import spread, spread_text
from moetrain.checkpoint.read import load
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.write import Retention, save
from moetrain.commands.bench import BenchCheckpointRun
from moetrain.kernels.choice import find
from moetrain.kernels.config import Kernels
from moetrain.log import progress
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.parallel.state import gather_pieces
from moetrain.quant.config import QuantConfig
from moetrain.train.loss import language_model_objective
from moetrain.train.step import train_step

_OURS, _TORCH = "moetrain", "torch.distributed.checkpoint"


def bench_checkpoint(run: BenchCheckpointRun, *, folder: Path) -> dict[str, Any]:
    """Return the report of all measurements; see `BenchCheckpointRun`."""
    training = _Training(run)
    training.take(2)  # optimizer state exists, caches are warm
    tensors = gather_pieces(training.engine.pieces(with_optimizer=True), training.engine.topology)
    assert tensors is not None, "there is one rank"
    files = folder / "files"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns at each call that only one process runs
            rates = _rates(tensors, files, repetitions=run.repetitions)
        del tensors
        return {**rates, **_saves(run, training, files / "training")}
    finally:
        shutil.rmtree(files, ignore_errors=True)


def _rates(tensors: Mapping[str, torch.Tensor], folder: Path, *, repetitions: int) -> dict[str, Any]:
    """Return the seconds of every write and read, ours and torch's in turn."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    ours, theirs = folder / "ours", folder / "theirs"
    write: dict[str, Callable[[], Any]] = {
        _OURS: lambda: save(ours, 1, tensors=tensors, state={}, keep=1),
        _TORCH: lambda: save_distributed(dict(tensors), storage_writer=FileSystemWriter(theirs), no_dist=True),
    }
    read: dict[str, Callable[[], Any]] = {
        _OURS: lambda: _read_ours(ours, target),
        _TORCH: lambda: load_distributed(target, storage_reader=FileSystemReader(theirs), no_dist=True),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in (_OURS, _TORCH)}
    with progress(4 * repetitions, "checkpoint", completed=0) as advance:
        for _ in range(repetitions):
            for name in (_OURS, _TORCH):
                shutil.rmtree(ours if name == _OURS else theirs, ignore_errors=True)
                seconds[name]["write"].append(_timed(write[name]))
                advance(f"{name}: written")
            for name in (_OURS, _TORCH):
                _drop_from_cache(folder)
                for tensor in target.values():
                    tensor.zero_()
                seconds[name]["read"].append(_timed(read[name]))
                assert all(torch.equal(target[key], tensors[key]) for key in tensors), f"{name} reads what was written"
                advance(f"{name}: read")
    return {"bytes": num_bytes, "seconds": seconds}


def _read_ours(folder: Path, target: Mapping[str, torch.Tensor]) -> None:
    stored = load(next(folder.glob("step_*"))).tensors
    for name, tensor in target.items():
        tensor.copy_(stored[name])


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the content of files, so that they are read from the disk."""
    if sys.platform != "linux":
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _Training:
    """Training steps on random tokens, as a stage takes them."""

    def __init__(self, run: BenchCheckpointRun) -> None:
        self._run = run
        self._num_steps = 0
        library, _ = find(Kernels.auto)
        self.engine: Engine = build_engine(
            run.model,
            run.parallel,
            optim_config=run.optim,
            quant_config=QuantConfig(),
            compute_dtype=torch.bfloat16,
            seed=run.run.seed,
            library=library,
        )

    def take(self, steps: int, *, after_each: Callable[[], None] = lambda: None) -> None:
        """Take steps; `after_each` is called after each of them."""
        run = self._run
        for _ in range(steps):
            batch = zipf_batch(
                vocab_size=run.model.vocab_size,
                rows=run.rows,
                seq_len=run.seq_len,
                seed=run.run.seed,
                step=self._num_steps,
            )
            train_step(
                self.engine,
                lambda counts: language_model_objective(counts, balance=run.model.balance),
                micro_batches=[batch],
                learning_rate=run.optim.lr,
                balance=run.model.balance,
                step=self._num_steps,
            )
            self._num_steps += 1
            after_each()


def _saves(run: BenchCheckpointRun, training: _Training, folder: Path) -> dict[str, Any]:
    """Return the seconds of `run.steps` steps without a save, and with one that begins before the first of them."""
    plain, saving, waited = [], [], []
    with (
        Saver(training.engine.topology, folder, retention=Retention(newest=1)) as saver,
        progress(2 * run.turns, "training", completed=0) as advance,
    ):
        for turn in range(run.turns):
            plain.append(_timed(lambda: training.take(run.steps)))
            advance(f"{run.steps} steps: {plain[-1]:.1f} s")

            def with_save(turn: int = turn) -> None:
                saver.begin(training.engine, step=turn + 1, state={})
                training.take(run.steps, after_each=saver.poll)
                saver.finish()

            saving.append(_timed(with_save))
            waited.append(saver.take_waited_s())
            advance(f"with a save: {saving[-1]:.1f} s")
    return {"steps": run.steps, "plain_s": plain, "saving_s": saving, "waited_s": waited}


def render(report: Mapping[str, Any]) -> Iterable[Table]:
    """Return the tables for the terminal."""
    megabytes = report["bytes"] / 1e6
    table = Table("", "write, MB/s", "read and check, MB/s", title=f"checkpoint of {megabytes:,.0f} MB", box=None)
    for name, seconds in report["seconds"].items():
        cells = [spread_text(spread([megabytes / s for s in seconds[what]]), digits=0) for what in ("write", "read")]
        table.add_row(name, *cells)
    ours, theirs = report["seconds"][_OURS], report["seconds"][_TORCH]
    ratios = [
        spread_text(spread([their / our for our, their in zip(ours[what], theirs[what], strict=True)]), digits=2)
        for what in ("write", "read")
    ]
    table.add_row("moetrain / torch, by turn", *ratios)
    yield table
    facts = Table("", "seconds", box=None)
    steps = report["steps"]
    facts.add_row(f"{steps} steps", spread_text(spread(report["plain_s"]), digits=2))
    facts.add_row(f"{steps} steps and a save", spread_text(spread(report["saving_s"]), digits=2))
    facts.add_row("of which training waited", spread_text(spread(report["waited_s"]), digits=3))
    plain, saving = statistics.median(report["plain_s"]), statistics.median(report["saving_s"])
    facts.add_row(f"training time that a save every {steps} steps takes", f"{100 * (saving / plain - 1):.1f} %")
    yield facts
