"""The forward pass of generation over a latent KV cache: T new tokens for each of B slots.

B slots, T new tokens, S cached positions, D hidden, H heads, C kv_lora, R rope width, E experts, K chosen experts.
Sequences, sampling and scheduling are in `inference/engine.py`.
"""

import torch
from einops import rearrange
from torch.nn import functional as F

from moetrain.inference.weights import InferenceWeights, LayerWeights
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.model.rope import RopeTable, apply_rope
from moetrain.model.router import route


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return the RMS norm over the last axis, computed in float32, in the dtype of `x`."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def forward(
    weights: InferenceWeights,
    *,
    tokens_BT: torch.Tensor,
    starts_B: torch.Tensor,
    cache_LBSC: torch.Tensor,
    rope: RopeTable,
) -> torch.Tensor:
    """Return hidden states [B, T, D] after the last norm; writes positions starts_B .. starts_B+T-1 of the cache.

    `cache_LBSC` is [layers, B, S, C+R]; every position that is written must be less than S. A token does not attend to
    later positions, so rows may end in padding. Attention multiplies all S positions, so allocate no more than
    required. Pass each slot with all of its positions, because products copy tensors that are not contiguous.
    """
    config = weights.config
    num_new = tokens_BT.shape[1]
    positions_BT = starts_B[:, None] + torch.arange(num_new, device=weights.device)
    is_later_BTS = torch.arange(cache_LBSC.shape[2], device=weights.device) > positions_BT[:, :, None]
    bias_BTS = torch.zeros(is_later_BTS.shape, dtype=weights.dtype, device=weights.device)
    bias_BTS.masked_fill_(is_later_BTS, float("-inf"))
    x_BTD = F.embedding(tokens_BT, weights.embed_VD)
    for layer, cache_BSC in zip(weights.layers, cache_LBSC, strict=True):
        normed_BTD = rms_norm(x_BTD, layer.input_norm_D, eps=config.rms_norm_eps)
        x_BTD = x_BTD + _attention(
            layer,
            config,
            x_BTD=normed_BTD,
            positions_BT=positions_BT,
            bias_BTS=bias_BTS,
            cache_BSC=cache_BSC,
            rope=rope,
        )
        normed_BTD = rms_norm(x_BTD, layer.post_norm_D, eps=config.rms_norm_eps)
        x_BTD = x_BTD + _feed_forward(layer, config, normed_BTD)
    return rms_norm(x_BTD, weights.norm_D, eps=config.rms_norm_eps)


def _attention(
    layer: LayerWeights,
    config: ModelConfig,
    *,
    x_BTD: torch.Tensor,
    positions_BT: torch.Tensor,
    bias_BTS: torch.Tensor,
    cache_BSC: torch.Tensor,
    rope: RopeTable,
) -> torch.Tensor:
    """Return the attention output, computed in the latent space.

    The key up-projection is absorbed into the queries, and the value up-projection into the outputs.
    """
    num_rows, num_new = positions_BT.shape
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    if layer.q_a is None or layer.q_a_norm is None:
        q = F.linear(x_BTD, layer.q_b)
    else:
        q = F.linear(rms_norm(F.linear(x_BTD, layer.q_a), layer.q_a_norm, eps=LATENT_NORM_EPS), layer.q_b)
    q_BTHQ = q.view(num_rows, num_new, config.num_heads, config.qk_head_dim)
    latent_BTC = F.linear(x_BTD, layer.kv_a)
    key_rope_BTR = apply_rope(latent_BTC[..., None, rank:], rope, positions_BT=positions_BT)[..., 0, :]
    new_BTC = torch.cat([rms_norm(latent_BTC[..., :rank], layer.kv_a_norm_C, eps=LATENT_NORM_EPS), key_rope_BTR], -1)
    cache_BSC[torch.arange(num_rows, device=x_BTD.device)[:, None], positions_BT] = new_BTC
    q_latent = torch.bmm(rearrange(q_BTHQ[..., :nope], "b t h n -> h (b t) n"), layer.up_k_HNC)
    q_latent_BTHC = rearrange(q_latent, "h (b t) c -> b t h c", b=num_rows)
    q_rope_BTHR = apply_rope(q_BTHQ[..., nope:], rope, positions_BT=positions_BT)
    query = rearrange(torch.cat([q_latent_BTHC, q_rope_BTHR], -1), "b t h c -> b (t h) c")
    bias = bias_BTS.repeat_interleave(config.num_heads, dim=1)
    scores = torch.baddbmm(bias, query, cache_BSC.transpose(1, 2), alpha=config.softmax_scale)
    mixed = torch.bmm(scores.softmax(-1), cache_BSC)[..., :rank]
    values = torch.bmm(rearrange(mixed, "b (t h) c -> h (b t) c", h=config.num_heads), layer.up_v_HCV)
    return F.linear(rearrange(values, "h (b t) v -> b t (h v)", b=num_rows), layer.o_proj)


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _feed_forward(layer: LayerWeights, config: ModelConfig, x_BTD: torch.Tensor) -> torch.Tensor:
    y_BTD = _swiglu(x_BTD, layer.dense_gate_up, layer.dense_down)
    if layer.router_ED is None:
        return y_BTD
    return y_BTD + _routed(layer, config, x_BTD.flatten(0, 1)).view_as(x_BTD)


def _routed(layer: LayerWeights, config: ModelConfig, x_ND: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs.

    The rows of each expert are padded to the largest number of rows, so that one batched product computes all experts.
    """
    assert layer.router_ED is not None and layer.router_bias_E is not None
    assert layer.experts_gate_up_EDF is not None and layer.experts_down_EFD is not None
    routing = route(F.linear(x_ND.float(), layer.router_ED), layer.router_bias_E, config=config)
    num_tokens, num_chosen = routing.expert_ids_NK.shape
    ids = routing.expert_ids_NK.flatten()
    order = torch.argsort(ids, stable=True)
    counts_E = torch.bincount(ids, minlength=config.num_experts)
    first_E = counts_E.cumsum(0) - counts_E
    rows = torch.arange(ids.numel(), device=ids.device) - first_E[ids[order]]
    padded = x_ND.new_zeros(config.num_experts, int(counts_E.max()), x_ND.shape[1])
    padded[ids[order], rows] = x_ND[order // num_chosen]
    gate, up = torch.bmm(padded, layer.experts_gate_up_EDF).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, layer.experts_down_EFD)
    y = torch.empty(ids.numel(), x_ND.shape[1], dtype=torch.float32, device=ids.device)
    y[order] = out[ids[order], rows].float()
    y_NKD = y.view(num_tokens, num_chosen, -1)
    return (y_NKD * routing.weights_NK[..., None]).sum(1).to(x_ND.dtype)
