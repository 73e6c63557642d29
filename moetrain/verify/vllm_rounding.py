"""Our model with the epsilon and the roundings of vLLM on a CPU.

vLLM has one epsilon for all norms, `rms_norm_eps`; those of the latents have 1e-6 here, as in transformers. In bf16 it
rounds the output of every operation to bf16, as our model does that computes in bf16. It also stores the gains of
norms and the weights of routers in bf16, and rounds the router's logits, which our model keeps in float32.
"""

from typing import Any

import torch
from torch import nn

from moetrain.export.read import Export
from moetrain.model.layers import RMSNorm
from moetrain.model.router import Router, Routing, route
from moetrain.model.transformer import Transformer

_OF_LATENTS = ("q_a_layernorm", "kv_a_layernorm")


def with_one_epsilon(model: Transformer) -> Transformer:
    """Give the norms of the latents the epsilon of the other norms, and return the model."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and name.endswith(_OF_LATENTS):
            module.eps = model.config.rms_norm_eps
    return model


@torch.no_grad()
def bf16_model(export: Export) -> Transformer:
    """Return our model of an export with vLLM's epsilon and roundings."""
    model = Transformer(export.model, compute_dtype=torch.bfloat16)
    model.load_state_dict(export.weights())
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(_round_logits)
    return with_one_epsilon(model)


def _round_logits(module: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
    assert isinstance(module, Router)
    return route(routing.logits_NE.bfloat16().float(), module.e_score_correction_bias, config=module.config)
