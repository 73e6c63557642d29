"""What a training stage will cost, told before it starts: parameters, memory, tokens, time. Arithmetic, and one short
measurement of the machine's matmul peak."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetrain.data.config import DataConfig
from moetrain.log import duration
from moetrain.model.config import ModelConfig
from moetrain.model.flops import ParameterCounts, flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.quant.config import QuantConfig
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.peak import measure_peak

ASSUMED_SHARE = 0.12
"""Share of the matmul peak that training is taken to reach where nothing was measured yet (2 CPU cores: 0.1 to 0.2)."""
_BYTES = {ComputeDtype.bfloat16: 2, ComputeDtype.float32: 4}
_MASTER = 4  # bytes of a float32 master, of its gradient and of each optimizer state
_ACTIVATIONS_PER_LAYER = 34  # widths of hidden_size kept a token and layer for the backward pass, MoE included; rough


@dataclass(kw_only=True)
class Estimate:
    """Cost of a stage. Bytes are of all ranks together, activations of one rank; seconds rest on an assumed share."""

    parameters: ParameterCounts
    tokens: int
    flops: float
    state_bytes: int
    activation_bytes: int
    peak_flops: float
    seconds: float


def estimate(
    *,
    model: ModelConfig,
    seq_len: int,
    train: TrainConfig,
    optim: OptimConfig,
    quant: QuantConfig,
    num_ranks: int,
    peak_flops: float,
    share: float = ASSUMED_SHARE,
) -> Estimate:
    """Return what a stage costs. peak_flops: matmul peak of all ranks, in FLOP/s."""
    counts = num_parameters(model)
    width = _BYTES[train.compute_dtype]
    states = 1 if optim.name is OptimizerName.muon else 2
    state_bytes = counts.total * _MASTER * (2 + states) + counts.total * width
    if quant.enabled:
        state_bytes += counts.routed * width  # the quantised weights, made once a step, beside the masters
    rows = min(train.rows_per_micro_batch, -(-train.rows_per_step // num_ranks))
    activations = rows * seq_len * model.hidden_size * model.num_layers * _ACTIVATIONS_PER_LAYER * width
    tokens = train.steps * train.rows_per_step * seq_len
    flops = tokens * flops_per_token(model, seq_len)
    return Estimate(
        parameters=counts,
        tokens=tokens,
        flops=flops,
        state_bytes=state_bytes,
        activation_bytes=activations,
        peak_flops=peak_flops,
        seconds=flops / (peak_flops * share),
    )


def dry_run(
    *, model: ModelConfig, data: DataConfig, train: TrainConfig, optim: OptimConfig, quant: QuantConfig, num_ranks: int
) -> list[str]:
    """Measure this machine's peak for a moment and return the lines that `dry_run=true` prints."""
    dtype = torch.bfloat16 if train.compute_dtype is ComputeDtype.bfloat16 else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Ranks share a machine's cores but not its GPUs.
    peak = measure_peak(dtype=dtype, device=device) * (num_ranks if device.type == "cuda" else 1)
    cost = estimate(
        model=model,
        seq_len=data.seq_len,
        train=train,
        optim=optim,
        quant=quant,
        num_ranks=num_ranks,
        peak_flops=peak,
    )
    return _lines(cost, train=train, num_ranks=num_ranks)


def _lines(cost: Estimate, *, train: TrainConfig, num_ranks: int) -> list[str]:
    counts = cost.parameters
    rows: Sequence[tuple[str, str]] = (
        ("parameters", f"{counts.total:,} in all, {counts.routed:,} of routed experts"),
        ("active a token", f"{counts.active_with_head:,} with the head, {counts.active:,} without"),
        ("tokens", f"{cost.tokens:,} in {train.steps:,} steps, padding included"),
        ("memory", f"{_gib(cost.state_bytes)} of weights, gradients and optimizer state over {num_ranks} rank(s)"),
        ("", f"about {_gib(cost.activation_bytes)} of activations a rank"),
        ("FLOPs", f"{cost.flops:.3g}"),
        ("matmul peak", f"{cost.peak_flops / 1e9:,.0f} GFLOP/s measured"),
        ("expected time", f"{duration(cost.seconds)} at {ASSUMED_SHARE:.0%} of it (assumed)"),
    )
    return [f"{name:<16}{text}" for name, text in rows]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
