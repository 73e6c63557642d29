"""Activation checkpointing: parts of a block that keep only their inputs and run again in the backward pass.

The method is that of arXiv 1604.06174. The router is never inside such a part: it runs once, so the second forward pass
cannot route a token differently and no count is taken twice. Parameter gradients flow through the outer graph, as they
do without recomputation, so sums have the same order and a hook on a parameter sees its whole gradient once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from moetrain.model.config import Recompute

Part = Callable[..., torch.Tensor]


class _Recomputed(torch.autograd.Function):
    """Runs `part` without a graph in the forward pass, and again with a graph in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, parameters: list[nn.Parameter], num_inputs: int, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """Return the output of `part`; `tensors` are the inputs, then the parameters, which need gradients from this
        node.
        """
        inputs = tensors[:num_inputs]
        ctx.part, ctx.parameters = part, parameters
        ctx.save_for_backward(*inputs)
        return part(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs and parameters."""
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
            output = ctx.part(*inputs)
        sources = [tensor for tensor in (*inputs, *ctx.parameters) if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(output, sources, grads[0], allow_unused=True))
        all_gradients = [next(gradients) if tensor.requires_grad else None for tensor in (*inputs, *ctx.parameters)]
        return (None, None, None, *all_gradients)


def run_part(
    part: Part, *inputs: torch.Tensor, parameters: Iterable[nn.Parameter], recompute: Recompute
) -> torch.Tensor:
    """Return part(*inputs), one tensor; with `Recompute.blocks` the backward pass keeps only the inputs.

    `parameters`: all parameters that the part reads; they must be complete in both passes. Both modes give the same
    bits.
    """
    if recompute is Recompute.none or not torch.is_grad_enabled():
        return part(*inputs)
    parameter_list = list(parameters)
    output: torch.Tensor = _Recomputed.apply(part, parameter_list, len(inputs), *inputs, *parameter_list)  # type: ignore[no-untyped-call]
    return output


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Set the recomputation mode of all `Recomputable` modules in `model`."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute


class Recomputable(nn.Module):
    """A module whose forward is one part that can be recomputed; the default mode is `none`."""

    recompute = Recompute.none
