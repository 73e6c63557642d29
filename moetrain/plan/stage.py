"""What a training stage takes: parameters, bytes a rank, tokens, operations and hours, by arithmetic. No torch here.

Bytes of parameters, gradients and optimizer state are exact; activations are an estimate, and so is the time, which
needs the speed of the machine.
"""

from dataclasses import dataclass

from moetrain.model.config import ModelConfig
from moetrain.model.flops import ParameterCounts, flops_per_token, num_parameters
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig

_FLOAT32 = 4
_BFLOAT16 = 2
_ADAMW_STATES = 2  # first and second moment
_MUON_STATES = 1  # momentum
_ACTIVATIONS_A_LAYER = 20
"""Values that a block keeps for each token and unit of width, with what its experts keep: a rule of thumb."""
UTILISATION = 0.15
"""Share of the matmul peak that training is assumed to reach."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage takes. Bytes are of one rank."""

    parameters: ParameterCounts
    tokens: int
    flops: float
    bytes_parameters: int
    bytes_gradients: int
    bytes_optimizer: int
    bytes_activations: int

    @property
    def bytes_total(self) -> int:
        """All of it."""
        return self.bytes_parameters + self.bytes_gradients + self.bytes_optimizer + self.bytes_activations

    def seconds(self, flops_per_second: float) -> float:
        """Return the expected time, given the peak of all ranks together."""
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
    """Return what training on `tokens` takes; `tokens_in_memory` is one micro-batch of one rank."""
    counts = num_parameters(model)
    dense = counts.total - counts.routed
    local_experts = counts.routed // parallel.expert
    local = dense + local_experts
    # A shard of the optimizer: dense parts over all ranks, experts over the ranks that hold the same ones.
    owned = dense / world_size + local_experts / (world_size / parallel.expert)
    embeddings = 2 * model.vocab_size * model.hidden_size
    on_muon = (counts.total - embeddings) / counts.total if optim.name is OptimizerName.muon else 0.0
    states = on_muon * _MUON_STATES + (1 - on_muon) * _ADAMW_STATES
    width = model.hidden_size * model.num_layers
    return StagePlan(
        parameters=counts,
        tokens=tokens,
        flops=tokens * flops_per_token(model, seq_len),
        bytes_parameters=local * (_FLOAT32 + _BFLOAT16),
        bytes_gradients=round((owned if parallel.zero > 1 else local) * _FLOAT32),
        bytes_optimizer=round(owned * states * _FLOAT32),
        bytes_activations=tokens_in_memory * width * _ACTIVATIONS_A_LAYER * _BFLOAT16,
    )
