"""The forward pass of generation in plain torch operations, over a paged cache of latents.

N rows, S sequences, T rows of each sequence in a batch, P positions, D hidden, H heads, C kv_lora, R rope width, K
chosen experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional as F

from moetrain.inference.experts import expert_sums, swiglu
from moetrain.inference.rows import PAGE, Rows
from moetrain.inference.weights import InferenceWeights, LayerWeights, ModuleWeights
from moetrain.model.attention import LATENT_NORM_EPS
from moetrain.model.config import ModelConfig
from moetrain.model.rope import RopeTable, apply_rope, build_rope
from moetrain.model.router import route

_ROWS_OF_A_KERNEL = 16
"""Queries of a head from which a fused attention kernel has enough of them for each read of a key."""


class PlainModel:
    """Implements `inference.protocol.Model` on any device."""

    def __init__(self, weights: InferenceWeights) -> None:
        self.weights = weights
        self._rope = build_rope(weights.config, 1).to(weights.device)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.weights.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights.device

    @property
    def can_draft(self) -> bool:
        """Whether it has a module of multi-token prediction."""
        return self.weights.module is not None

    @property
    def logprob_library(self) -> None:
        """None: logprobs are computed by torch."""
        return None

    def new_cache(self, num_pages: int) -> torch.Tensor:
        """Return an empty cache."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        shape = (self.config.num_layers + self.can_draft, num_pages, PAGE, width)
        return torch.zeros(shape, dtype=self.weights.dtype, device=self.device)

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states [N, D] after the last norm."""
        x_ND = F.embedding(rows.tokens_N, self.weights.embed_VD)
        return self._blocks(x_ND, self.weights.layers, norm_D=self.weights.norm_D, rows=rows, cache_LPSC=cache_LPSC)

    def draft(self, hidden_ND: torch.Tensor, next_rows: Rows, *, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the module, [N, D]; see `inference.protocol.Model`."""
        module = self.weights.module
        assert module is not None, "the model can draft"
        embedded_ND = F.embedding(next_rows.tokens_N, self.weights.embed_VD)
        x_ND = F.linear(joined(module, embedded_ND, hidden_ND=hidden_ND, eps=self.config.rms_norm_eps), module.join_D2)
        cache_1PSC = cache_LPSC[self.config.num_layers :]
        return self._blocks(x_ND, [module.layer], norm_D=module.norm_D, rows=next_rows, cache_LPSC=cache_1PSC)

    def _blocks(
        self,
        x_ND: torch.Tensor,
        layers: list[LayerWeights],
        *,
        norm_D: torch.Tensor,
        rows: Rows,
        cache_LPSC: torch.Tensor,
    ) -> torch.Tensor:
        self._rope = longer(self._rope, self.config, num_positions=rows.tables_SW.shape[1] * PAGE)
        config, batches = self.config, list(_batches(rows, self.weights.dtype))
        for layer, cache_PSC in zip(layers, cache_LPSC, strict=False):
            x_ND = block(x_ND, layer, config=config, rows=rows, batches=batches, cache_PSC=cache_PSC, rope=self._rope)
        return rms_norm(x_ND, norm_D, eps=config.rms_norm_eps)

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [M, V]."""
        return F.linear(hidden_MD, self.weights.head_VD).float()


def longer(rope: RopeTable, config: ModelConfig, *, num_positions: int) -> RopeTable:
    """Return a table of at least `num_positions`: the given one if it suffices."""
    if len(rope.cos_SP) >= num_positions:
        return rope
    return build_rope(config, num_positions).to(rope.cos_SP.device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return the RMS norm over the last axis, computed in float32, in the dtype of `x`."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of sequences with equally many rows each: `rows_ST` their places, `tables_SW` their pages.

    bias_STP: 0 where a row attends to a position, else minus infinity.
    """

    rows_ST: torch.Tensor
    tables_SW: torch.Tensor
    bias_STP: torch.Tensor


def _batches(rows: Rows, dtype: torch.dtype) -> Iterator[_Batch]:
    by_count: dict[int, list[int]] = {}
    for sequence, count in enumerate(rows.counts):
        by_count.setdefault(count, []).append(sequence)
    device = rows.tokens_N.device
    firsts = torch.tensor([0, *rows.counts], device=device).cumsum(0)
    for count, sequences in by_count.items():
        rows_ST = firsts[sequences][:, None] + torch.arange(count, device=device)
        positions_ST = rows.positions_N[rows_ST]
        num_pages = -(-max(rows.lengths[sequence] for sequence in sequences) // PAGE)
        is_later = torch.arange(num_pages * PAGE, device=device) > positions_ST[..., None]
        bias_STP = torch.zeros(is_later.shape, dtype=dtype, device=device).masked_fill_(is_later, float("-inf"))
        yield _Batch(rows_ST=rows_ST, tables_SW=rows.tables_SW[sequences, :num_pages], bias_STP=bias_STP)


def joined(module: ModuleWeights, embedded_ND: torch.Tensor, *, hidden_ND: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what the module's joining matrix multiplies, [N, 2D]."""
    embedded_ND = rms_norm(embedded_ND, module.embed_norm_D, eps=eps)
    return torch.cat([embedded_ND, rms_norm(hidden_ND, module.hidden_norm_D, eps=eps)], -1)


def block(
    x_ND: torch.Tensor,
    layer: LayerWeights,
    *,
    config: ModelConfig,
    rows: Rows,
    batches: list[_Batch],
    cache_PSC: torch.Tensor,
    rope: RopeTable,
) -> torch.Tensor:
    """Return the residual stream [N, D] after a block; writes the rows' positions of its cache."""
    normed_ND = rms_norm(x_ND, layer.input_norm_D, eps=config.rms_norm_eps)
    x_ND = x_ND + _attention(layer, config, normed_ND, rows=rows, batches=batches, cache_PSC=cache_PSC, rope=rope)
    normed_ND = rms_norm(x_ND, layer.post_norm_D, eps=config.rms_norm_eps)
    return x_ND + _feed_forward(layer, config, normed_ND)


def _attention(
    layer: LayerWeights,
    config: ModelConfig,
    x_ND: torch.Tensor,
    *,
    rows: Rows,
    batches: list[_Batch],
    cache_PSC: torch.Tensor,
    rope: RopeTable,
) -> torch.Tensor:
    """Return the attention output, computed in the latent space.

    The key up-projection is absorbed into the queries, and the value up-projection into the outputs.
    """
    nope, rank, positions_1N = config.qk_nope_head_dim, config.kv_lora_rank, rows.positions_N[None]
    if layer.q_a is None or layer.q_a_norm is None:
        q = F.linear(x_ND, layer.q_b)
    else:
        q = F.linear(rms_norm(F.linear(x_ND, layer.q_a), layer.q_a_norm, eps=LATENT_NORM_EPS), layer.q_b)
    q_NHQ = q.view(len(q), config.num_heads, config.qk_head_dim)
    latent_NC = F.linear(x_ND, layer.kv_a)
    key_rope_NR = apply_rope(latent_NC[None, :, None, rank:], rope, positions_BT=positions_1N)[0, :, 0]
    new_NC = torch.cat([rms_norm(latent_NC[:, :rank], layer.kv_a_norm_C, eps=LATENT_NORM_EPS), key_rope_NR], -1)
    pages_N = rows.tables_SW[rows.sequences_N, rows.positions_N // PAGE]
    cache_PSC[pages_N, rows.positions_N % PAGE] = new_NC
    q_latent_HNC = torch.bmm(rearrange(q_NHQ[..., :nope], "n h q -> h n q"), layer.up_k_HNC)
    q_rope_NHR = apply_rope(q_NHQ[None, ..., nope:], rope, positions_BT=positions_1N)[0]
    query_NHC = torch.cat([rearrange(q_latent_HNC, "h n c -> n h c"), q_rope_NHR], -1)
    mixed_NHC = query_NHC.new_empty(*query_NHC.shape[:2], rank)
    for batch in batches:
        cached_SPC = cache_PSC[batch.tables_SW].flatten(1, 2)
        attend = attend_latents if x_ND.device.type == "cpu" else attend_latents_fused
        mixed_NHC[batch.rows_ST] = attend(
            query_NHC[batch.rows_ST], cached_SPC, bias_STP=batch.bias_STP, rank=rank, scale=config.softmax_scale
        )
    values = torch.bmm(rearrange(mixed_NHC, "n h c -> h n c"), layer.up_v_HCV)
    return F.linear(rearrange(values, "h n v -> n (h v)"), layer.o_proj)


def attend_latents(
    query_STHC: torch.Tensor, cached_SPC: torch.Tensor, *, bias_STP: torch.Tensor, rank: int, scale: float
) -> torch.Tensor:
    """Return the mixed latents [S, T, H, rank]. The cached latents are keys and, without rotary keys, values."""
    num_heads = query_STHC.shape[2]
    query = rearrange(query_STHC, "s t h c -> s (t h) c")
    bias = bias_STP.repeat_interleave(num_heads, dim=1)
    scores = torch.baddbmm(bias, query, cached_SPC.transpose(1, 2), alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), cached_SPC)[..., :rank]
    return rearrange(mixed, "s (t h) c -> s t h c", h=num_heads)


def attend_latents_fused(
    query_STHC: torch.Tensor, cached_SPC: torch.Tensor, *, bias_STP: torch.Tensor, rank: int, scale: float
) -> torch.Tensor:
    """Return what `attend_latents` returns, by torch's fused attention, which stores no scores on GPUs.

    The heads of few rows are queries of one head, so that a kernel reads the latents once for all of them.
    """
    num_rows, num_heads = query_STHC.shape[1:3]
    keys = cached_SPC[:, None]
    if num_rows < _ROWS_OF_A_KERNEL:
        query = rearrange(query_STHC, "s t h c -> s 1 (t h) c")
        bias = bias_STP[:, :, None].expand(-1, -1, num_heads, -1).flatten(1, 2)[:, None]
    else:
        query = rearrange(query_STHC, "s t h c -> s h t c")
        bias, keys = bias_STP[:, None], keys.expand(-1, num_heads, -1, -1)
    mixed = F.scaled_dot_product_attention(query, keys, keys[..., :rank], attn_mask=bias, scale=scale)
    if num_rows < _ROWS_OF_A_KERNEL:
        return rearrange(mixed, "s 1 (t h) c -> s t h c", h=num_heads)
    return rearrange(mixed, "s h t c -> s t h c")


def _feed_forward(layer: LayerWeights, config: ModelConfig, x_ND: torch.Tensor) -> torch.Tensor:
    y_ND = swiglu(x_ND, layer.dense_gate_up, down=layer.dense_down)
    return y_ND if layer.router_ED is None else y_ND + _routed(layer, config, x_ND)


def _routed(layer: LayerWeights, config: ModelConfig, x_ND: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs."""
    assert layer.router_ED is not None and layer.router_bias_E is not None and layer.experts is not None
    routing = route(F.linear(x_ND.float(), layer.router_ED), layer.router_bias_E, config=config)
    gate_up, down = layer.experts
    return expert_sums(x_ND, routing.expert_ids_NK, weights_NK=routing.weights_NK, gate_up=gate_up, down=down)
