"""What every training engine promises, and the door that builds one.

An engine owns the model's parameters, their gradients and the optimizer's state. It knows neither losses nor data: it
is handed an objective. `TorchEngine` is the plain twin that `DeepSpeedEngine` is tested against.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig
from moetrain.model.moe import LocalDispatcher
from moetrain.model.transformer import Transformer, initialize
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.dispatch import AllToAllDispatcher
from moetrain.parallel.topology import Topology, setup
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig

CLIP_EPS = 1e-6  # DeepSpeed's and torch's, added to the norm


@dataclass(kw_only=True)
class StepReport:
    """What an optimizer step says about its gradients.

    grad_norm: global L2 norm of the summed gradient before clipping. clip_factor: what the gradient was multiplied by,
    min(1, clip_norm / grad_norm). A norm that is not finite skips the update: grad_norm is inf and clip_factor is 0.
    """

    grad_norm: float
    clip_factor: float


@dataclass(kw_only=True)
class ObjectiveResult:
    """What an objective makes of one micro-batch.

    loss: float32 scalar with a graph, this micro-batch's share; the objective is the sum over micro-batches and ranks.
    counts_LE: int64 tokens that each expert of each MoE layer was chosen by. metrics: detached sums.
    """

    loss: torch.Tensor
    counts_LE: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)

    def detached(self) -> "ObjectiveResult":
        """Return the same numbers without the graph."""
        return replace(self, loss=self.loss.detach())


Objective = Callable[[Transformer, TokenBatch], ObjectiveResult]


class Engine(Protocol):
    """Parameters, gradients and optimizer state of one model, on however many ranks."""

    model: Transformer
    topology: Topology

    def accumulate(self, objective: Objective, batch: TokenBatch, *, is_last: bool) -> ObjectiveResult:
        """Add the gradient of one micro-batch, and return its numbers, detached. Collective.

        Every rank makes the same number of calls before a step, and says `is_last` at the last one.
        """

    def step(self, learning_rate: float) -> StepReport:
        """Clip the accumulated gradient, update the parameters, clear the gradient. Collective."""

    def gather_state(self, *, with_optimizer: bool) -> dict[str, torch.Tensor] | None:
        """Return the whole state on the main rank, None elsewhere. Collective.

        Global float32 tensors by name, whatever the layout: parameters, persistent buffers, and with the optimizer
        `optimizer/<parameter>/momentum` (Muon) or `exp_avg` and `exp_avg_sq` (AdamW), and `optimizer/step` (int64).
        """

    def load_state(self, tensors: Mapping[str, torch.Tensor], *, with_optimizer: bool) -> None:
        """Take over what `gather_state` of any layout returned; without the optimizer its state stays as it is.

        Raises CheckpointError when a tensor is missing, left over or of another shape; then nothing has changed.
        """


def clip_factor_of(grad_norm: float, *, clip_norm: float) -> float:
    """Return what a gradient of norm `grad_norm` is multiplied by."""
    return min(1.0, clip_norm / (grad_norm + CLIP_EPS))


def forget_rounded(model: Transformer) -> None:
    """Drop the quantised weights that were made from masters that have changed since."""
    for _, layer in model.moe_layers():
        if layer.experts.fake_quant is not None:
            layer.experts.fake_quant.invalidate()


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Return `batch` with its columns on `device`."""
    if batch.tokens_BT.device == device:
        return batch
    return replace(batch, **{name: value.to(device) for name, value in vars(batch).items() if value is not None})


def build_engine(
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    *,
    optim_config: OptimConfig,
    quant_config: QuantConfig,
    compute_dtype: torch.dtype,
    seed: int,
) -> Engine:
    """Return an engine around a model that is initialised from `seed`, the same for every layout.

    Raises ConfigError when the layout does not fit the processes or the experts.
    """
    topology = setup(parallel_config)
    if model_config.num_experts % parallel_config.expert:
        raise ConfigError(
            f"parallel.expert is {parallel_config.expert}: it must divide model.num_experts={model_config.num_experts}"
        )
    model = _build_model(model_config, topology, quant_config=quant_config, compute_dtype=compute_dtype, seed=seed)
    if parallel_config.engine == EngineName.torch:
        from moetrain.parallel.torch_engine import TorchEngine

        return TorchEngine(model, topology, optim_config=optim_config, compute_dtype=compute_dtype)
    from moetrain.parallel.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    return DeepSpeedEngine(
        model, topology, optim_config=optim_config, zero_stage=parallel_config.zero, compute_dtype=compute_dtype
    )


def _build_model(
    config: ModelConfig, topology: Topology, *, quant_config: QuantConfig, compute_dtype: torch.dtype, seed: int
) -> Transformer:
    """Return this rank's part of the model, on its device: all of it but the experts, and its share of those."""
    num_local = config.num_experts // topology.expert_size
    first = topology.expert_rank * num_local
    is_split = topology.expert_size > 1
    model = Transformer(
        config,
        compute_dtype=compute_dtype,
        dispatcher=AllToAllDispatcher(topology, num_experts=config.num_experts) if is_split else LocalDispatcher(),
        expert_slice=slice(first, first + num_local),
    )
    initialize(model, seed)
    if quant_config.enabled:
        apply([layer.experts for _, layer in model.moe_layers()], quant_config)
    return model.to(topology.device)
