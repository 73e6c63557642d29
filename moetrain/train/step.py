"""One optimizer step: global counts, gradients, update, balance bias, metrics. Independent of the objective.

L MoE layers, E routed experts.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import DivergenceError
from moetrain.log import TIME_PREFIX
from moetrain.model.balance import update_bias
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import Engine, Objective, ObjectiveResult, StepReport
from moetrain.parallel.topology import Topology
from moetrain.train.attention_clip import batch_max_logits, clip_attention, logit_metrics
from moetrain.train.config import NonfinitePolicy
from moetrain.train.expert_load import global_loads, load_metrics, micro_violations
from moetrain.train.loss import GlobalCounts, ObjectiveFor
from moetrain.train.nonfinite import SKIPPED


def train_step(
    engine: Engine,
    objective_for: ObjectiveFor,
    *,
    micro_batches: Sequence[TokenBatch],
    learning_rate: float,
    balance: BalanceConfig,
    step: int,
    qk_clip: float | None = None,
    on_nonfinite: NonfinitePolicy = NonfinitePolicy.stop,
) -> dict[str, float]:
    """Take one optimizer step on this rank's micro-batches and return its metrics, the same on every rank.

    Collective: every rank must pass the same number of micro-batches. step: the step number, from 0; errors count from
    1, as the metrics do. qk_clip:
    threshold of QK-Clip, None is off; if set, the objective must measure the logits. If the loss or gradient norm is
    not finite, weights, optimizer state and balance bias stay unchanged on every rank, and the function raises
    `DivergenceError` or, with `on_nonfinite=skip`, returns metrics that include `SKIPPED`.
    """
    start = time.perf_counter()
    counts = global_counts(micro_batches, engine.topology)
    if balance.global_loss:
        counts = replace(counts, loads=global_loads(engine, micro_batches))
    objective = objective_for(counts)
    results, required_LEB = _accumulate(engine, objective, micro_batches)
    totals = _Totals(results, engine.topology)
    max_logits_AH = batch_max_logits(results, engine.topology) if qk_clip is not None else None
    if math.isfinite(totals.loss):
        report = engine.step(learning_rate)
    else:
        engine.discard()
        report = StepReport(grad_norm=math.nan, clip_factor=0.0)
    if not math.isfinite(report.grad_norm):
        if on_nonfinite is NonfinitePolicy.stop:
            raise _divergence(step, loss=totals.loss, grad_norm=report.grad_norm)
        given_up = {"loss": totals.loss, **totals.metrics, "grad_norm": report.grad_norm, "lr": learning_rate}
        return {**given_up, "tokens": counts.tokens, "targets": counts.targets, SKIPPED: 1.0}
    logits: dict[str, float] = {}
    if qk_clip is not None and max_logits_AH is not None:
        logits = logit_metrics(engine.model, max_logits_AH, threshold=qk_clip)
        clip_attention(engine, max_logits_AH, threshold=qk_clip)
    if balance.bias_rule is BiasRule.quantile:
        required_LEB = engine.topology.all_reduce_sum(required_LEB)
    _update_biases(engine.model, totals.counts_LE, required_LEB=required_LEB, balance=balance)
    seconds = time.perf_counter() - start
    return {
        "loss": totals.loss,
        **totals.metrics,
        "grad_norm": report.grad_norm,
        "clip_factor": report.clip_factor,
        "lr": learning_rate,
        "tokens": counts.tokens,
        "targets": counts.targets,
        **_load_metrics(engine.model, totals),
        **logits,
        TIME_PREFIX + "seconds": seconds,
        TIME_PREFIX + "tokens_per_s": counts.tokens / seconds,
    }


def _divergence(step: int, *, loss: float, grad_norm: float) -> DivergenceError:
    problem = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return DivergenceError(
        f"step {step + 1}: {problem}; the weights are those before this step. "
        "Start again with a lower optim.lr, or with train.on_nonfinite=skip to skip such steps"
    )


def global_counts(micro_batches: Sequence[TokenBatch], topology: Topology) -> GlobalCounts:
    """Return the totals over all ranks' micro-batches. Collective."""
    local = [
        (batch.num_tokens, batch.num_targets, float(batch.target_weights().double().sum())) for batch in micro_batches
    ]
    tokens, targets, weight = topology.all_reduce_sum(torch.tensor(local, dtype=torch.float64).sum(dim=0)).tolist()
    return GlobalCounts(tokens=max(int(tokens), 1), targets=max(int(targets), 1), target_weight=weight or 1.0)


def _accumulate(
    engine: Engine, objective: Objective, micro_batches: Sequence[TokenBatch]
) -> tuple[list[ObjectiveResult], torch.Tensor]:
    """Return the results of all micro-batches and the sum of their histograms; only one histogram is held at a time."""
    results: list[ObjectiveResult] = []
    required_LEB = torch.zeros((), dtype=torch.int32)
    for index, batch in enumerate(micro_batches):
        result = engine.accumulate(objective, batch, is_last=index == len(micro_batches) - 1)
        required_LEB = required_LEB + result.required_LEB
        results.append(replace(result, required_LEB=result.required_LEB[:, :, :0]))
    return results, required_LEB


def _update_biases(
    model: Transformer, counts_LE: torch.Tensor, *, required_LEB: torch.Tensor, balance: BalanceConfig
) -> None:
    if balance.bias_rule is BiasRule.none:
        return
    for index, (_, layer) in enumerate(model.moe_layers()):
        required_EB = required_LEB[index] if balance.bias_rule is BiasRule.quantile else required_LEB
        update_bias(
            layer.gate, counts_LE[index], required_EB=required_EB, rule=balance.bias_rule, rate=balance.bias_rate
        )


def _load_metrics(model: Transformer, totals: "_Totals") -> dict[str, float]:
    layers = model.moe_layers()
    biases = [layer.gate.e_score_correction_bias.cpu() for _, layer in layers]
    return load_metrics(
        totals.counts_LE.cpu(),
        biases_LE=torch.stack(biases) if biases else totals.counts_LE,
        micro_violation_L=totals.micro_violation_L,
        names=[name for name, _ in layers],
    )


class _Totals:
    """Sums of the objectives' results over micro-batches and ranks, reduced in float64."""

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
        self.micro_violation_L = micro_violations(torch.stack(loads), topology=topology)
