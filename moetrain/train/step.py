"""One optimizer step: global counts, gradients, update, balance bias, metrics. Blind to the objective.

Letters: L layers with experts, E routed experts.
"""

import math
import time
from collections.abc import Mapping, Sequence

import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import DivergenceError
from moetrain.model.config import BalanceConfig
from moetrain.model.router import update_bias
from moetrain.parallel.protocol import Engine, ObjectiveResult
from moetrain.parallel.topology import Topology
from moetrain.train.loss import GlobalCounts, ObjectiveFor

TIME_PREFIX = "time/"
"""Metrics that a clock gives; all others are the same each time a run is repeated."""


def train_step(
    engine: Engine,
    objective_for: ObjectiveFor,
    *,
    micro_batches: Sequence[TokenBatch],
    learning_rate: float,
    balance: BalanceConfig,
    step: int,
) -> dict[str, float]:
    """Take one optimizer step on this rank's micro-batches and return its metrics, the same on every rank.

    A collective: each rank calls it with the same number of micro-batches. step names the step in errors. Raises
    `DivergenceError` when the loss or the gradient norm is not finite; the weights are then untouched.
    """
    start = time.perf_counter()
    counts = global_counts(micro_batches, engine.topology)
    objective = objective_for(counts)
    last = len(micro_batches) - 1
    results = [engine.accumulate(objective, batch, is_last=index == last) for index, batch in enumerate(micro_batches)]
    totals = _Totals(results, engine.topology)
    if not math.isfinite(totals.loss):
        raise DivergenceError(
            f"step {step}: the loss is {totals.loss}; the weights are those before this step. "
            "Start again with a lower optim.lr or a smaller optim.clip_norm"
        )
    report = engine.step(learning_rate)
    if not math.isfinite(report.grad_norm):
        raise DivergenceError(
            f"step {step}: the gradient norm is {report.grad_norm}; the weights are those before this step. "
            "Start again with a lower optim.lr"
        )
    for (_, layer), counts_E in zip(engine.model.moe_layers(), totals.counts_LE, strict=True):
        update_bias(layer.gate.e_score_correction_bias, counts_E, rule=balance.bias_rule, rate=balance.bias_rate)
    seconds = time.perf_counter() - start
    return {
        "loss": totals.loss,
        **totals.metrics,
        "grad_norm": report.grad_norm,
        "clip_factor": report.clip_factor,
        "lr": learning_rate,
        "tokens": counts.tokens,
        "targets": counts.targets,
        **load_metrics(totals.counts_LE, names=[name for name, _ in engine.model.moe_layers()]),
        TIME_PREFIX + "seconds": seconds,
        TIME_PREFIX + "tokens_per_s": counts.tokens / seconds,
    }


def global_counts(micro_batches: Sequence[TokenBatch], topology: Topology) -> GlobalCounts:
    """Return the totals of all ranks' micro-batches. A collective."""
    local = [
        (batch.num_tokens, batch.num_targets, float(batch.weights_BT[batch.loss_mask_BT].double().sum()))
        for batch in micro_batches
    ]
    tokens, targets, weight = topology.all_reduce_sum(torch.tensor(local, dtype=torch.float64).sum(dim=0)).tolist()
    return GlobalCounts(tokens=max(int(tokens), 1), targets=max(int(targets), 1), target_weight=weight or 1.0)


def load_metrics(counts_LE: torch.Tensor, *, names: Sequence[str]) -> dict[str, float]:
    """Return MaxVio (largest load over mean load, minus 1; arXiv 2408.15664) a layer, its mean, and idle experts."""
    if not names:
        return {}
    counts_LE = counts_LE.double()
    violation_L = counts_LE.amax(dim=1) / counts_LE.mean(dim=1).clamp_min(1e-9) - 1.0
    by_layer = {f"maxvio/{name}": float(violation) for name, violation in zip(names, violation_L, strict=True)}
    return {**by_layer, "maxvio": float(violation_L.mean()), "dead_experts": float((counts_LE == 0).sum())}


class _Totals:
    """Sums over micro-batches and ranks of what the objectives returned, reduced in one collective in float64."""

    def __init__(self, results: Sequence[ObjectiveResult], topology: Topology) -> None:
        first = results[0]
        names = sorted(first.metrics)
        columns = [
            torch.stack([result.loss.detach().double(), *(result.metrics[name].double() for name in names)])
            for result in results
        ]
        loads = [result.counts_LE.double() for result in results]
        local = torch.cat([torch.stack(columns).sum(dim=0), torch.stack(loads).sum(dim=0).flatten()])
        total = topology.all_reduce_sum(local)
        self.loss = float(total[0])
        self.metrics: Mapping[str, float] = dict(zip(names, total[1 : 1 + len(names)].tolist(), strict=True))
        self.counts_LE = total[1 + len(names) :].reshape(first.counts_LE.shape).round().long()
