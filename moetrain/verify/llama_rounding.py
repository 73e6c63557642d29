"""Our model with the inputs of its products rounded as llama.cpp rounds them on a CPU.

llama.cpp rounds the inputs of a product with a BF16 matrix to bf16, and with a Q4_0 matrix to Q8_0: for each 32 inputs
a scale of the largest over 127, then whole numbers. The rest is float32, as in our model.

N tokens, K experts per token, D hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.export.read import Export
from moetrain.model.layers import Linear
from moetrain.model.moe import Experts
from moetrain.model.transformer import Transformer

_BLOCK = 32
_STEPS = 127

Rounding = Callable[[Tensor], Tensor]


def round_bf16(x: Tensor) -> Tensor:
    """Return `x` rounded to bf16, as float32."""
    return x.bfloat16().float()


def round_q8_0(x: Tensor) -> Tensor:
    """Return `x` rounded to Q8_0 along its last axis, as float32."""
    groups = rearrange(x, "... (g s) -> ... g s", s=_BLOCK)
    scales = groups.abs().amax(-1, keepdim=True) / _STEPS
    codes = torch.where(scales > 0, groups / scales, 0.0).round()
    return (codes * scales.half().float()).flatten(-2)


def round_inputs(model: Transformer, export: Export) -> Transformer:
    """Add hooks that round the inputs of each product as llama.cpp does for the type of its matrix; return `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and export.dense[f"{name}.weight"].dtype is torch.bfloat16:
            module.register_forward_pre_hook(_round_first)
    for name, layer in model.moe_layers():
        stored = export.dense.get(f"{name}.experts.gate_up_proj")
        if stored is None:
            layer.dispatcher = partial(_compute, rounding=round_q8_0)
        elif stored.dtype is torch.bfloat16:
            layer.dispatcher = partial(_compute, rounding=round_bf16)
    return model


def _round_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_bf16(args[0]), *args[1:])


def _compute(
    x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, experts: Experts, *, rounding: Rounding
) -> Tensor:
    """Return the weighted sum of the experts' outputs, as a dispatcher; the inputs of each product are rounded."""
    y_ND, rounded_ND = torch.zeros_like(x_ND), rounding(x_ND)
    for expert in range(len(experts.gate_up_proj)):
        rows, places = (expert_ids_NK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(rounded_ND[rows], experts.gate_up_proj[expert]).chunk(2, -1)
        out = F.linear(rounding(F.silu(gate) * up), experts.down_proj[expert])
        y_ND.index_add_(0, rows, weights_NK[rows, places, None] * out)
    return y_ND
