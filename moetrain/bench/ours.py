"""moetrain as a contestant of `bench train`, with the complete training step that the stages use."""

from collections.abc import Callable

import torch

from moetrain.bench.contestant import Contestant, Kind
from moetrain.commands.bench import BenchTrainRun
from moetrain.data.batch import TokenBatch
from moetrain.kernels.choice import find
from moetrain.kernels.config import Kernels
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Objective
from moetrain.quant.config import QuantConfig
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.step import train_step


class Ours:
    """Implements `Trainee` with one of moetrain's engines."""

    def __init__(self, run: BenchTrainRun, contestant: Contestant) -> None:
        self.run = run
        self.num_steps = 0
        library, _ = find(run.kernels)
        self.setting = f"{Kernels.native if library else Kernels.torch} kernels"
        name = EngineName.torch if contestant.kind is Kind.moetrain_torch else EngineName.deepspeed
        self.engine = build_engine(
            run.model,
            ParallelConfig(engine=name, expert=contestant.expert, timeout_s=300),
            optim_config=run.optim,
            quant_config=QuantConfig(),
            compute_dtype=torch.bfloat16,
            seed=run.run.seed,
            library=library,
        )

    def choose(self, batch_of: Callable[[int], TokenBatch], steps: int) -> None:
        """Do nothing: moetrain chooses its attention by device and sequence length."""

    def step(self, batch: TokenBatch) -> float:
        """Take one optimizer step on this rank's rows; return the cross-entropy over all ranks."""
        metrics = train_step(
            self.engine,
            self._objective,
            micro_batches=[batch],
            learning_rate=self.run.optim.lr,
            balance=self.run.model.balance,
            step=self.num_steps,
        )
        self.num_steps += 1
        return metrics["cross_entropy"]

    def _objective(self, counts: GlobalCounts) -> Objective:
        return language_model_objective(counts, balance=self.run.model.balance)
