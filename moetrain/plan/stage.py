"""The cost of a training stage: parameters, bytes per rank, tokens, FLOPs and hours, by arithmetic. Imports no torch.

Bytes of parameters, gradients and optimizer state are exact counts; bytes of activations are an estimate. The time is
an estimate too and requires the measured speed of the machine.
"""

from dataclasses import dataclass

from moetrain.model.config import ModelConfig, Recompute
from moetrain.model.flops import (
    ParameterCounts,
    attention_parameters,
    expert_parameters,
    feed_forward_parameters,
    flops_per_token,
    num_parameters,
)
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import PARTITIONING_STAGE, EngineName, ParallelConfig

_FLOAT32 = 4
_BFLOAT16 = 2
_ADAMW_STATES = 2  # first and second moment
_MUON_STATES = 1  # momentum
_ACTIVATIONS_PER_LAYER = 20
"""Values that a block stores per token and unit of hidden size, experts included: a rule of thumb."""
_INPUTS_PER_LAYER = 4
"""Values among these that remain with parallel.recompute=blocks: inputs of the norms, attention and feed-forward."""
UTILISATION = 0.15
"""Assumed MFU: the share of the matmul peak that training reaches."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The cost of a stage; bytes are per rank."""

    parameters: ParameterCounts
    tokens: int
    flops: float
    bytes_parameters: int
    bytes_gradients: int
    bytes_optimizer: int
    bytes_activations: int
    bytes_start: int
    """Peak while the engine is built, before the first step; activations and gathered weights are not part of it."""

    @property
    def bytes_total(self) -> int:
        """Total bytes per rank."""
        return self.bytes_parameters + self.bytes_gradients + self.bytes_optimizer + self.bytes_activations

    def seconds(self, flops_per_second: float) -> float:
        """Return the expected duration, given the matmul peak of all ranks together."""
        return self.flops / (flops_per_second * UTILISATION)


def plan_stage(
    model: ModelConfig,
    *,
    optim: OptimConfig,
    parallel: ParallelConfig,
    world_size: int,
    tokens: int,
    seq_len: int,
    tokens_in_memory: int,
) -> StagePlan:
    """Return the cost of training on `tokens`; `tokens_in_memory` is the size of one micro-batch on one rank."""
    counts = num_parameters(model)
    dense = counts.total - counts.routed
    local_experts = counts.routed // parallel.expert
    local = dense + local_experts
    # Optimizer shards: dense weights over all ranks, experts over the ranks with the same experts.
    owned = dense / world_size + local_experts / (world_size / parallel.expert)
    embeddings = 2 * model.vocab_size * model.hidden_size
    on_muon = (counts.total - embeddings) / counts.total if optim.name is OptimizerName.muon else 0.0
    states = on_muon * _MUON_STATES + (1 - on_muon) * _ADAMW_STATES
    return StagePlan(
        parameters=counts,
        tokens=tokens,
        flops=tokens * flops_per_token(model, seq_len),
        bytes_parameters=_bytes_of_weights(model, parallel, local=local, owned=owned),
        bytes_gradients=round((owned if parallel.zero > 1 else local) * _FLOAT32),
        bytes_optimizer=round(owned * states * _FLOAT32),
        bytes_activations=tokens_in_memory * _activations_per_token(model, parallel) * _BFLOAT16,
        bytes_start=_bytes_of_start(model, parallel, local=local, owned=owned, states=states),
    )


def _bytes_of_weights(model: ModelConfig, parallel: ParallelConfig, *, local: int, owned: float) -> int:
    """Return the bytes per rank of weights and of their bf16 casts. local: number of weights that the rank computes
    with.

    Under ZeRO 3 a rank stores only the shard it owns and gathers one unit at a time; casts stay until the backward
    pass, unless blocks are recomputed. Padding and the gains of norms, which are not sharded, are ignored.
    """
    if parallel.zero != PARTITIONING_STAGE:
        return local * (_FLOAT32 + _BFLOAT16)
    unit = _largest_unit(model, parallel)
    cast = unit if parallel.recompute is Recompute.blocks else local
    return round((owned + unit) * _FLOAT32) + cast * _BFLOAT16


def _bytes_of_start(model: ModelConfig, parallel: ParallelConfig, *, local: int, owned: float, states: float) -> int:
    """Return the peak per rank while the engine is built.

    Under ZeRO 1 and 2 a rank fills its whole part of the model in float32, copies it into flat vectors, parameter group
    by parameter group, and allocates a second copy of the owned masters, which is freed after the optimizer state
    exists. Under ZeRO 3 a rank fills one parameter after another and keeps the shard that it owns. It then copies the
    shards, allocates the gradients, and gathers each parameter once; the optimizer state follows after one copy is
    freed. Memory that the ranks of a node share to gather weights is not counted.
    """
    if parallel.engine is EngineName.torch:
        elements = local * (1 + states)
    elif parallel.zero != PARTITIONING_STAGE:
        elements = max(2 * local, local + owned * (1 + states))
    else:
        elements = max(3 * owned + _largest_parameter(model, parallel), owned * (2 + states))
    return round(elements * _FLOAT32)


def _largest_parameter(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the size of the largest parameter: an embedding, or gate and up of all local experts of a layer."""
    embedding = model.vocab_size * model.hidden_size
    if not model.num_moe_layers + model.num_mtp_layers:
        return max(embedding, model.intermediate_size * model.hidden_size)
    local_experts = model.num_experts // parallel.expert
    return max(embedding, local_experts * 2 * model.moe_intermediate_size * model.hidden_size)


def _largest_unit(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the largest number of parameters that ZeRO 3 gathers at once: an embedding, or one part of a layer."""
    units = [model.vocab_size * model.hidden_size, attention_parameters(model)]
    if model.num_dense_layers:
        units.append(feed_forward_parameters(model, model.intermediate_size))
    if model.num_moe_layers + model.num_mtp_layers:
        expert = expert_parameters(model)
        units += [model.num_experts // parallel.expert * expert, model.num_shared_experts * expert]
    return max(units)


def _activations_per_token(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the number of stored values per token; with recomputation, only one block at a time stores all of them."""
    num_layers = model.num_layers + model.num_mtp_layers
    if parallel.recompute is Recompute.none:
        return model.hidden_size * num_layers * _ACTIVATIONS_PER_LAYER
    again = _ACTIVATIONS_PER_LAYER - _INPUTS_PER_LAYER
    return model.hidden_size * (num_layers * _INPUTS_PER_LAYER + again)
