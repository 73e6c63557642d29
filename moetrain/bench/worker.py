"""Worker of `bench train`, one process per rank: `python -m moetrain.bench.worker CONFIG.yaml CONTESTANT-AS-JSON`."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from moetrain.bench.batches import zipf_batch
from moetrain.bench.contestant import Contestant, Kind
from moetrain.bench.process import commands
from moetrain.commands.bench import BenchTrainRun
from moetrain.compose import load_config
from moetrain.data.batch import TokenBatch
from moetrain.runtime import keep_freed_memory, rank
from moetrain.train.rows import rank_rows

_SETTLING_STEPS = 1
"""Untimed steps at the start of a turn: they refill caches that other contestants used during their turns."""


class Trainee(Protocol):
    """A model with its optimizer, as `bench train` times it."""

    setting: str

    def choose(self, batch_of: Callable[[int], TokenBatch], steps: int) -> None:
        """Time each available setting for `steps` steps, and keep the fastest."""

    def step(self, batch: TokenBatch) -> float:
        """Take one optimizer step on this rank's rows; return the cross-entropy in nats per token."""


def make_batch(run: BenchTrainRun, step: int) -> TokenBatch:
    """Return the rows of a step, over all ranks."""
    return zipf_batch(vocab_size=run.model.vocab_size, rows=run.rows, seq_len=run.seq_len, seed=run.run.seed, step=step)


def build(run: BenchTrainRun, contestant: Contestant) -> Trainee:
    """Return the trainee of a contestant. All contestants get the same weights, drawn from the run's seed."""
    if contestant.kind in (Kind.moetrain, Kind.moetrain_torch):
        from moetrain.bench.ours import Ours

        return Ours(run, contestant)
    from moetrain.bench.peers import AutoEp, Transformers  # transformers and deepspeed take seconds to import

    return AutoEp(run, contestant) if contestant.kind is Kind.deepspeed_autoep else Transformers(run, contestant)


class Worker:
    """Takes and times the steps of one trainee on command."""

    def __init__(self, run: BenchTrainRun, contestant: Contestant) -> None:
        self.run = run
        self.contestant = contestant
        self.rank = rank()
        self.trainee = build(run, contestant)
        self.num_steps = 0

    def batch_of(self, step: int) -> TokenBatch:
        """Return this rank's rows of a step."""
        return rank_rows(make_batch(self.run, step), rank=self.rank, world_size=self.contestant.ranks)

    def take(self, num_steps: int) -> tuple[list[float], list[float]]:
        """Take `num_steps` steps; return (seconds per step, loss per step)."""
        seconds, losses = [], []
        for _ in range(num_steps):
            batch = self.batch_of(self.num_steps)
            start = time.perf_counter()
            losses.append(self.trainee.step(batch))
            seconds.append(time.perf_counter() - start)
            self.num_steps += 1
        return seconds, losses

    def answer(self, command: str) -> dict[str, Any]:
        """Run one command of `Remote`; return the measurements as plain values for JSON."""
        seconds: list[float] = []
        losses: list[float] = []
        profile = None
        if command == "prepare":
            seconds, losses = self.take(self.run.warmup_steps)
            self.trainee.choose(self.batch_of, self.run.warmup_steps)
        elif command == "turn":
            self.take(_SETTLING_STEPS)
            seconds, losses = self.take(self.run.steps)
        else:
            from moetrain.bench.ours import Ours
            from moetrain.bench.parts import profile_parts

            assert isinstance(self.trainee, Ours)
            profile = profile_parts(
                self.trainee.engine, lambda: self.take(self.run.profile_steps), num_steps=self.run.profile_steps
            )
        return {
            "seconds": seconds,
            "losses": losses,
            "profile": profile,
            "setting": self.trainee.setting,
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def main() -> None:
    """Answer the commands on standard input until it ends."""
    run: BenchTrainRun = load_config("bench train", Path(sys.argv[1]))
    contestant = Contestant(**json.loads(sys.argv[2]) | {"kind": Kind(json.loads(sys.argv[2])["kind"])})
    if contestant.kind in (Kind.moetrain, Kind.moetrain_torch):
        keep_freed_memory()  # every moetrain command does this; peers run with their own defaults
    torch.set_num_threads(contestant.threads)
    worker: Worker | None = None
    for command, answers in commands():
        worker = worker or Worker(run, contestant)
        print(json.dumps(worker.answer(command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
