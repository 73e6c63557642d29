"""The interface of a training engine.

An engine owns the model's parameters, their gradients and the optimizer state. It is independent of losses and data:
the caller passes an objective. `TorchEngine` is the reference implementation that `DeepSpeedEngine` is tested against.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.transformer import Transformer
from moetrain.parallel.topology import Topology

T = TypeVar("T")

CLIP_EPS = 1e-6  # added to the norm, as in DeepSpeed and torch


@dataclass(kw_only=True)
class StepReport:
    """Gradient norm and clip factor of an optimizer step.

    grad_norm: global L2 norm of the summed gradient before clipping. clip_factor: factor on the gradient,
    min(1, clip_norm / grad_norm). If the norm is not finite, the update is skipped, grad_norm is inf and clip_factor 0.
    """

    grad_norm: float
    clip_factor: float


@dataclass(kw_only=True)
class ObjectiveResult:
    """The result of an objective for one micro-batch.

    loss: float32 scalar with a graph, this micro-batch's share; the objective is the sum over micro-batches and ranks.
    counts_LE: int64, number of tokens that chose each expert of each MoE layer. required_LEB: int32 histograms of the
    required biases, for the quantile rule; B is 0 for other rules. metrics: detached sums. max_logits_AH: float32,
    detached, largest attention logit per layer and head (see `ForwardOutput`), or None if it was not measured.
    """

    loss: torch.Tensor
    counts_LE: torch.Tensor
    required_LEB: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int32))
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    max_logits_AH: torch.Tensor | None = None

    def detached(self) -> "ObjectiveResult":
        """Return the same result with a loss that has no graph."""
        return replace(self, loss=self.loss.detach())


Objective = Callable[[Transformer, TokenBatch], ObjectiveResult]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of a global tensor, owned by one rank."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor, over all ranks."""
    start: int
    """Index of the first element of the range in the flattened whole tensor."""
    values_P: torch.Tensor
    """The P elements from `start` on, float32 or int64, detached; may be a view of memory that a step overwrites."""


class StateReader(Protocol):
    """Reads flat ranges of global tensors by name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor without reading the tensors."""

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of the flattened tensor `name`, 1-D, on the CPU.

        Raises CheckpointError if they cannot be read.
        """


class Engine(Protocol):
    """Parameters, gradients and optimizer state of one model on any number of ranks."""

    model: Transformer
    topology: Topology
    loss_factor: int
    """Factor on this rank's loss before the backward pass; it cancels in the reduced gradients."""

    def accumulate(self, objective: Objective, batch: TokenBatch, *, is_last: bool) -> ObjectiveResult:
        """Add the gradient of one micro-batch; return its detached result. Collective.

        Every rank must make the same number of calls before a step, with `is_last` set in the last one only.
        """

    def inspect(self, function: Callable[[Transformer, TokenBatch], T], batch: TokenBatch) -> T:
        """Return `function(model, batch)`, computed without gradients; `batch` is moved to the model's device.

        Collective. The model must be called only here and in objectives, because under ZeRO 3 its weights are gathered
        nowhere else.
        """

    def step(self, learning_rate: float) -> StepReport:
        """Clip the accumulated gradient, update the parameters and clear the gradient. Collective."""

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply row i of the two-dimensional parameter `name` by `factors[name][i]`. Collective.

        factors: 1-D float32 on any device, equal on all ranks. Must be called after `step` and before the next
        `accumulate`. An engine multiplies the float32 masters, updates all copies that the forward pass uses, and drops
        quantised weights. A row with factor 1 keeps its bits. The optimizer state does not change. If masters are split
        over ranks, each rank multiplies its own elements: element e of a parameter with C columns is in row e // C.
        """

    def discard(self) -> None:
        """Drop the accumulated gradient instead of a step; parameters and optimizer state do not change. Collective."""

    def pieces(self, *, with_optimizer: bool) -> Iterator[Piece]:
        """Yield the pieces of the state that this rank owns. Over all ranks, each element occurs once. Not collective.

        The names and shapes of the global tensors do not depend on the layout: float32 parameters, persistent buffers,
        and with the optimizer `optimizer/<parameter>/momentum` (Muon) or `exp_avg` and `exp_avg_sq` (AdamW), and
        `optimizer/step` (int64).
        """

    def gather_state(self, *, with_optimizer: bool) -> dict[str, torch.Tensor] | None:
        """Return the whole tensors of the state on the CPU of the main rank; None on other ranks. Collective."""

    def load_state(self, reader: StateReader, *, with_optimizer: bool) -> None:
        """Load a state written under any layout; each rank reads its own part. Collective.

        Without `with_optimizer`, the optimizer state does not change. Raises CheckpointError, without any change, if a
        tensor is missing, unexpected or has another shape.
        """


def clip_factor_of(grad_norm: float, *, clip_norm: float) -> float:
    """Return the factor that limits a gradient of norm `grad_norm` to `clip_norm`."""
    return min(1.0, clip_norm / (grad_norm + CLIP_EPS))


def step_report(grad_norm: float, *, clip_norm: float) -> StepReport:
    """Return the report of a step whose gradient has this norm."""
    if not math.isfinite(grad_norm):
        return StepReport(grad_norm=math.inf, clip_factor=0.0)
    return StepReport(grad_norm=grad_norm, clip_factor=clip_factor_of(grad_norm, clip_norm=clip_norm))


def invalidate_quantized(model: Transformer) -> None:
    """Drop the cached quantised weights; must be called after the masters change."""
    for _, layer in model.moe_layers():
        if layer.experts.fake_quant is not None:
            layer.experts.fake_quant.invalidate()


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Return `batch` with its columns on `device`."""
    if batch.tokens_BT.device == device:
        return batch
    return batch.map(lambda column: column.to(device))
