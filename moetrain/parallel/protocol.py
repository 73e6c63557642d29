"""What every training engine promises.

An engine owns the model's parameters, their gradients and the optimizer's state. It knows neither losses nor data: it
is handed an objective. `TorchEngine` is the plain twin that `DeepSpeedEngine` is tested against.
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
    counts_LE: int64 tokens that each expert of each MoE layer was chosen by. required_LEB: int32 histograms of the
    biases that experts needed, for the quantile rule; without bins for others. metrics: detached sums.
    max_logits_AH: float32, detached, largest attention logit of each head of each layer (`ForwardOutput`), where it was
    measured.
    """

    loss: torch.Tensor
    counts_LE: torch.Tensor
    required_LEB: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int32))
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    max_logits_AH: torch.Tensor | None = None

    def detached(self) -> "ObjectiveResult":
        """Return the same numbers without the graph."""
        return replace(self, loss=self.loss.detach())


Objective = Callable[[Transformer, TokenBatch], ObjectiveResult]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A flat range of a global tensor, in the hands of the one rank that owns it."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor, over all ranks."""
    start: int
    """First element of the range, counted in the whole tensor laid flat."""
    values_P: torch.Tensor
    """The P elements from `start` on, float32 or int64, detached; may be a view of memory that a step changes."""


class StateReader(Protocol):
    """Global tensors by name, of which any flat range can be had."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return name and shape of every tensor, without reading one."""

    def read(self, name: str, *, first: int, last: int) -> torch.Tensor:
        """Return the elements [first, last) of the tensor `name` laid flat, 1-D, on the CPU.

        Raises CheckpointError when they cannot be read.
        """


class Engine(Protocol):
    """Parameters, gradients and optimizer state of one model, on however many ranks."""

    model: Transformer
    topology: Topology
    loss_factor: int
    """What this rank multiplies a loss by before it differentiates it; gradients of a step are freed of it again."""

    def accumulate(self, objective: Objective, batch: TokenBatch, *, is_last: bool) -> ObjectiveResult:
        """Add the gradient of one micro-batch, and return its numbers, detached. Collective.

        Every rank makes the same number of calls before a step, and says `is_last` at the last one.
        """

    def inspect(self, function: Callable[[Transformer, TokenBatch], T], batch: TokenBatch) -> T:
        """Return what `function` makes of the model and a batch, without gradient; `batch` comes on the model's device.

        Collective. The model is to be called here and in objectives only: under ZeRO 3 its weights are nowhere else.
        """

    def step(self, learning_rate: float) -> StepReport:
        """Clip the accumulated gradient, update the parameters, clear the gradient. Collective."""

    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply rows of two-dimensional parameters: row i of the parameter `name` by `factors[name][i]`. Collective.

        `factors`: 1-D float32 on any device, the same on every rank. Called after `step` and before the next
        `accumulate`. An engine multiplies the float32 masters in float32, makes every copy that a forward pass uses
        the same, and drops what was derived from the old values (quantised weights). A row whose factor is 1 keeps its
        bits, and so does the optimizer's state, of all rows. Where masters are cut over ranks, each rank multiplies the
        elements that it holds: element e of a parameter with C columns lies in row e // C.
        """

    def discard(self) -> None:
        """Drop the accumulated gradient; parameters and optimizer state stay. Collective, in the place of a step."""

    def pieces(self, *, with_optimizer: bool) -> Iterator[Piece]:
        """Yield what this rank owns of the state: over all ranks, each element of each tensor once. No collective.

        Global tensors whatever the layout: float32 parameters and persistent buffers, and with the optimizer
        `optimizer/<parameter>/momentum` (Muon) or `exp_avg` and `exp_avg_sq` (AdamW), and `optimizer/step` (int64).
        """

    def gather_state(self, *, with_optimizer: bool) -> dict[str, torch.Tensor] | None:
        """Return the tensors of all ranks' `pieces`, whole, on the CPU of the main rank; None elsewhere. Collective."""

    def load_state(self, reader: StateReader, *, with_optimizer: bool) -> None:
        """Take over a state that any layout gave; this rank reads its own part. Collective, where ranks share a part.

        Without the optimizer, its state stays as it is. Raises CheckpointError when a tensor is missing, left over or
        of another shape; then nothing has changed.
        """


def clip_factor_of(grad_norm: float, *, clip_norm: float) -> float:
    """Return what a gradient of norm `grad_norm` is multiplied by."""
    return min(1.0, clip_norm / (grad_norm + CLIP_EPS))


def report_of(grad_norm: float, *, clip_norm: float) -> StepReport:
    """Return what a step whose gradient has this norm reports."""
    if not math.isfinite(grad_norm):
        return StepReport(grad_norm=math.inf, clip_factor=0.0)
    return StepReport(grad_norm=grad_norm, clip_factor=clip_factor_of(grad_norm, clip_norm=clip_norm))


def forget_rounded(model: Transformer) -> None:
    """Drop the quantised weights that were made from masters that have changed since."""
    for _, layer in model.moe_layers():
        if layer.experts.fake_quant is not None:
            layer.experts.fake_quant.invalidate()


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Return `batch` with its columns on `device`."""
    if batch.tokens_BT.device == device:
        return batch
    return batch.map(lambda column: column.to(device))
