"""A step of pretraining and SFT: from rows of documents to one update of the weights."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moetrain.data.batch import TokenBatch
from moetrain.log import TIME_PREFIX
from moetrain.model.config import BalanceConfig
from moetrain.parallel.protocol import Engine
from moetrain.train.config import DocumentTrainConfig
from moetrain.train.continuation import StartPoint
from moetrain.train.loop import Training
from moetrain.train.loss import ObjectiveFor
from moetrain.train.rows import split_rows
from moetrain.train.step import train_step


@dataclass(kw_only=True)
class DocumentStage:
    """The functions and settings of the steps of pretraining or SFT.

    objective_at: the objective of a step of the run (from 0). batch_at: this rank's rows of a step, as many on every
    rank. num_rows_at: the rows of a step, over all ranks. learning_rate: the rate of a step. mix_at: the index of the
    data mix that a step uses. position, start_point, identity: see `Training`. validate: metrics of held-out data,
    collective. initial_metrics: metrics that are logged once when a run begins. flops_per_token: of forward and
    backward. peak_flops: matmul peak of all ranks together, in FLOP/s. qk_clip: threshold of QK-Clip; None is off; if
    set, the objective must measure the logits.
    """

    engine: Engine
    objective_at: Callable[[int], ObjectiveFor]
    batch_at: Callable[[int], TokenBatch]
    num_rows_at: Callable[[int], int]
    learning_rate: Callable[[int], float]
    mix_at: Callable[[int], int]
    balance: BalanceConfig
    validate: Callable[[], Mapping[str, float]]
    identity: Mapping[str, Any]
    flops_per_token: float
    peak_flops: float
    position: Callable[[int], Mapping[str, Any]]
    start_point: StartPoint = field(default_factory=StartPoint)
    initial_metrics: Mapping[str, float] = field(default_factory=dict)
    qk_clip: float | None = None


def document_training(stage: DocumentStage, config: DocumentTrainConfig) -> Training:
    """Return the training of a stage that reads documents, for `train.loop.run_training`."""
    return Training(
        engine=stage.engine,
        take_step=lambda step: take_document_step(stage, config, step=step),
        learning_rate=stage.learning_rate,
        headline="loss",
        totals=("tokens", "targets"),
        position=stage.position,
        start_point=stage.start_point,
        identity=stage.identity,
        validate=stage.validate,
        validate_every=config.validate_every,
        initial_metrics=stage.initial_metrics,
    )


def take_document_step(stage: DocumentStage, config: DocumentTrainConfig, *, step: int) -> dict[str, float]:
    """Take step `step` (from 0) and return its metrics, the same on every rank. Collective."""
    start = time.perf_counter()
    balance = stage.balance.at(step - stage.start_point.first_step, steps=config.steps)
    values = train_step(
        stage.engine,
        stage.objective_at(step),
        micro_batches=split_rows(stage.batch_at(step), rows=config.rows_per_micro_batch),
        learning_rate=stage.learning_rate(step),
        balance=balance,
        step=step,
        qk_clip=stage.qk_clip,
        on_nonfinite=config.on_nonfinite,
    )
    tokens_per_s = values["tokens"] / (time.perf_counter() - start)
    values |= {"rows": stage.num_rows_at(step), "mix": stage.mix_at(step), "bias_rate": balance.bias_rate}
    values[TIME_PREFIX + "tokens_per_s"] = tokens_per_s
    if math.isfinite(stage.peak_flops):
        values[TIME_PREFIX + "mfu"] = stage.flops_per_token * tokens_per_s / stage.peak_flops
    return values
