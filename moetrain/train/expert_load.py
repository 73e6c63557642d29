"""Token counts per expert: counted before the step if the global balance loss needs them, and reported as metrics.

L MoE layers, E routed experts, M micro-batches of one rank.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.mtp import Mtp
from moetrain.model.transformer import Transformer
from moetrain.parallel.protocol import Engine
from moetrain.parallel.topology import Topology


def global_loads(engine: Engine, micro_batches: Sequence[TokenBatch]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from a micro-batch's expert counts [L, E] to those of the whole step. Collective.

    With one micro-batch per rank, the function sums the counts over ranks. With more, a forward pass without gradient
    over all micro-batches counts first; routing does not depend on the loss, so these are the counts of the step.
    """
    if len(micro_batches) == 1:
        return engine.topology.all_reduce_sum
    loads_LE = count_loads(engine, micro_batches)
    return lambda counts_LE: loads_LE


def count_loads(engine: Engine, micro_batches: Sequence[TokenBatch]) -> torch.Tensor:
    """Return the expert counts [L, E] over all ranks' micro-batches, int64, from a forward pass. Collective."""
    counts = [engine.inspect(_counts, batch) for batch in micro_batches]
    return engine.topology.all_reduce_sum(torch.stack(counts).sum(dim=0))


def _counts(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, mtp=Mtp.joint)
    counts_LE: torch.Tensor = output.counts_LE
    return counts_LE


def violations(counts_LE: torch.Tensor) -> torch.Tensor:
    """Return MaxVio per layer, float64: largest load / mean load - 1 (arXiv 2408.15664)."""
    counts_LE = counts_LE.double()
    return counts_LE.amax(dim=-1) / counts_LE.mean(dim=-1).clamp_min(1e-9) - 1.0


def micro_violations(counts_MLE: torch.Tensor, *, topology: Topology) -> torch.Tensor:
    """Return the mean MaxVio per layer over all ranks' micro-batches; micro-batches without tokens are excluded.

    Collective. Unlike all other metrics, it depends on how the step is split into micro-batches.
    """
    has_tokens_ML = counts_MLE.sum(dim=-1) > 0
    sums_2L = torch.stack([(violations(counts_MLE) * has_tokens_ML).sum(dim=0), has_tokens_ML.double().sum(dim=0)])
    sums_2L = topology.all_reduce_sum(sums_2L)
    return sums_2L[0] / sums_2L[1].clamp_min(1.0)


def load_metrics(
    counts_LE: torch.Tensor, *, biases_LE: torch.Tensor, micro_violation_L: torch.Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Return the load and bias metrics of a step: per layer, and the mean over layers.

    MaxVio of the step and of micro-batches, load variation (standard deviation / mean), range of the bias, and the
    number of experts that no token chose, which is summed over layers instead of averaged.
    """
    if not names:
        return {}
    loads_LE = counts_LE.double()
    dead_L = (loads_LE == 0).sum(dim=1).double()
    layers: Mapping[str, torch.Tensor] = {
        "maxvio": violations(counts_LE),
        "maxvio_micro": micro_violation_L,
        "load_variation": loads_LE.std(dim=1, correction=0) / loads_LE.mean(dim=1).clamp_min(1e-9),
        "bias_range": (biases_LE.amax(dim=1) - biases_LE.amin(dim=1)).double(),
        "dead_experts": dead_L,
    }
    values = {
        f"{key}/{name}": value
        for key, values_L in layers.items()
        for name, value in zip(names, values_L.tolist(), strict=True)
    }
    means = {key: float(values_L.mean()) for key, values_L in layers.items()}
    return {**values, **means, "dead_experts": float(dead_L.sum())}
