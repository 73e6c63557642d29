"""Parts of a block that keep their inputs alone and are computed again in the backward pass (arXiv 1604.06174).

The router is never inside such a part: it routes once, so that no token can go elsewhere the second time and no count
is taken twice. The gradients of parameters leave through the outer graph, as those of a part that is not recomputed do;
so sums have the same order, and a hook on a parameter sees its whole gradient once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from moetrain.model.config import Recompute

Part = Callable[..., torch.Tensor]


class _Recomputed(torch.autograd.Function):
    """Runs `part` without a graph, and once more with one when its gradient is asked for."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, parameters: list[nn.Parameter], num_inputs: int, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """Return what `part` makes of the inputs; the parameters stand beside them as sources of its graph."""
        inputs = tensors[:num_inputs]
        ctx.part, ctx.parameters = part, parameters
        ctx.save_for_backward(*inputs)
        return part(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs and parameters."""
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
            output = ctx.part(*inputs)
        sources = [tensor for tensor in (*inputs, *ctx.parameters) if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, sources, grads[0], allow_unused=True))
        each = [next(found) if tensor.requires_grad else None for tensor in (*inputs, *ctx.parameters)]
        return (None, None, None, *each)


def run_part(
    part: Part, *inputs: torch.Tensor, parameters: Iterable[nn.Parameter], recompute: Recompute
) -> torch.Tensor:
    """Return part(*inputs), one tensor; with `Recompute.blocks` nothing else of it is kept for the backward pass.

    `parameters`: those that the part reads, whole in both passes. Same bits in both modes.
    """
    if recompute is Recompute.none or not torch.is_grad_enabled():
        return part(*inputs)
    known = list(parameters)
    output: torch.Tensor = _Recomputed.apply(part, known, len(inputs), *inputs, *known)  # type: ignore[no-untyped-call]
    return output


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Tell all modules of `model` that have such parts what to do."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute


class Recomputable(nn.Module):
    """A module whose forward is one part; `recompute` is `none` until it is told otherwise."""

    recompute = Recompute.none
