"""The training step of `bench balance` and `bench optimizers`, the same as in pretraining."""

from moetrain.data.build import Data
from moetrain.model.attention import MaxLogits
from moetrain.optim.schedule import learning_rate
from moetrain.parallel.protocol import Engine, Objective
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.rows import rank_rows, split_rows
from moetrain.train.stages import Sections
from moetrain.train.step import train_step


def take_step(sections: Sections, *, engine: Engine, data: Data, step: int) -> dict[str, float]:
    """Take training step `step` and return its metrics. Collective. Raises `DivergenceError`."""
    train, optim, topology = sections.train, sections.optim, engine.topology
    batch = data.loader.rows_between(train.rows_before(step), train.rows_before(step + 1))
    rows = rank_rows(batch, rank=topology.rank, world_size=topology.world_size)
    balance = sections.model.balance.at(step, steps=train.steps)

    def objective_for(counts: GlobalCounts) -> Objective:
        return language_model_objective(counts, balance=balance, max_logits=MaxLogits.needed(optim.qk_clip))

    return train_step(
        engine,
        objective_for,
        micro_batches=split_rows(rows, rows=train.rows_per_micro_batch),
        learning_rate=learning_rate(step, train.steps, lr=optim.lr, schedule=optim.schedule),
        balance=balance,
        step=step,
        qk_clip=optim.qk_clip,
    )
