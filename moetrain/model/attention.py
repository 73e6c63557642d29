"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over packed rows, for training: without a KV cache.

B rows, T tokens, D hidden, H heads, N query-key width without position, R rotary width, Q = N + R, V value width, C
kv_lora.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.nn import functional as F

from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable_for
from moetrain.model.config import ModelConfig
from moetrain.model.kernel_module import KernelModule
from moetrain.model.layers import Linear, RMSNorm
from moetrain.model.recompute import Recomputable, run_part
from moetrain.model.rope import Rotation, rotate
from moetrain.ops import native
from moetrain.ops.flash_attention import Runs, attend_flash, plan_runs, supports_flash
from moetrain.ops.max_logits import largest_by_head, max_logits
from moetrain.ops.tiled_attention import Tile, attend_tiled, first_seen, plan_tiles

LATENT_NORM_EPS = 1e-6  # transformers builds the latent norms without the config's epsilon
TILED_MAX_TOKENS = 2048
"""Longest rows for which tiled products beat the fused CPU kernel in bf16 forward and backward."""


class MaxLogits(StrEnum):
    """Whether a forward pass measures the largest attention logit of each head."""

    unmeasured = "unmeasured"
    measured = "measured"

    @classmethod
    def needed(cls, threshold: float | None) -> "MaxLogits":
        """Return `measured` if `threshold`, that of QK-Clip, is not None."""
        return cls.unmeasured if threshold is None else cls.measured


@dataclass(frozen=True, kw_only=True)
class FusedMask:
    """A dense mask [B, 1, T, T], True where a query token may attend to a key token, and the segments it was built
    from.
    """

    seen_B1TT: torch.Tensor
    segments_BT: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FirstSeen:
    """The index of the first key that each token attends to, int32, for the native kernel."""

    first_seen_BT: torch.Tensor


Mask = FusedMask | Runs | list[Tile] | FirstSeen
"""The attention mask in the form that the chosen attention path reads; built once and used by all layers."""


def plan_attention(segments_BT: torch.Tensor, dtype: torch.dtype, *, width: int, library: Library | None) -> Mask:
    """Return the attention mask of packed rows, in the form that the chosen path reads.

    `width`: the largest of the query, key and value widths per head. The paths are, in order: the native kernel where
    `library` supports the dtype (`FirstSeen`), the flash kernel on a GPU (`Runs`), tiled products for short rows on a
    CPU (tiles), and else torch's fused kernel (`FusedMask`). A token attends to itself and to earlier tokens of its own
    segment; padding is treated as one more segment.
    """
    num_tokens = segments_BT.shape[1]
    if usable_for(library, segments_BT.device, dtype=dtype):
        return FirstSeen(first_seen_BT=first_seen(segments_BT).int())
    if supports_flash(segments_BT.device, dtype, width=width):
        return plan_runs(segments_BT)
    if segments_BT.device.type == "cpu" and num_tokens <= TILED_MAX_TOKENS:
        return plan_tiles(segments_BT, dtype)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BT.device).tril()
    return FusedMask(seen_B1TT=(same_BTT & causal_TT)[:, None], segments_BT=segments_BT)


def attend_fused(
    q_BHTQ: torch.Tensor, k_BHTQ: torch.Tensor, *, v_BHTV: torch.Tensor, mask: FusedMask, scale: float
) -> torch.Tensor:
    """Return attention outputs [B, H, T, V] from torch's fused kernel.

    Values are padded to the query width, because the kernel falls back to a slow path when the widths differ.
    """
    value_width = v_BHTV.shape[-1]
    missing = q_BHTQ.shape[-1] - value_width
    padded = F.pad(v_BHTV, (0, missing)) if missing > 0 else v_BHTV
    out = F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, padded, attn_mask=mask.seen_B1TT, scale=scale)
    return out[..., :value_width]


class Attention(Recomputable, KernelModule):
    """Latent attention: one compressed latent gives the keys and values of all heads; heads share one rotary key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def _projected_queries(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return queries [B, T, H, Q] before rotation."""
        config = self.config
        if config.q_lora_rank is None:
            q: torch.Tensor = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        return q.view(*q.shape[:-1], config.num_heads, -1)

    def _queries(self, x_BTD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        config = self.config
        projected = self._projected_queries(x_BTD)
        q_nope, q_rope = torch.split(projected, [config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        return torch.cat([q_nope.transpose(1, 2), rotate(q_rope, rotation).transpose(1, 2)], -1)

    def forward(
        self, x_BTD: torch.Tensor, *, rotation: Rotation, mask: Mask, measured_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention output [B, T, D] and, if measured, the largest logit of each head [H].

        `measured_BT` is True for tokens whose logits count; with None nothing is measured, at no cost. The logits are
        the inputs of the softmax, including the softmax scale: float32, without gradient, -inf if no token is measured.
        """
        measured: list[torch.Tensor | None] = []

        def part(x_BTD: torch.Tensor) -> torch.Tensor:
            out_BTD, max_logits_H = self._attend(x_BTD, rotation=rotation, mask=mask, measured_BT=measured_BT)
            measured.append(max_logits_H)
            return out_BTD

        out_BTD = run_part(part, x_BTD, parameters=self.parameters(), recompute=self.recompute)
        return out_BTD, measured[0]

    def _attend(
        self, x_BTD: torch.Tensor, *, rotation: Rotation, mask: Mask, measured_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        latent_BTC, k_rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_BTC)).unflatten(-1, (config.num_heads, -1))
        if isinstance(mask, FirstSeen):
            return self._attend_natively(
                self._projected_queries(x_BTD), kv, k_rope_BTR, rotation=rotation, mask=mask, measured_BT=measured_BT
            )
        q_BHTQ = self._queries(x_BTD, rotation)
        k_rope_B1TR = rotate(k_rope_BTR[:, :, None], rotation).transpose(1, 2)
        k_nope_BHTN, v_BHTV = kv.transpose(1, 2).split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k_BHTQ = torch.cat([k_nope_BHTN, k_rope_B1TR.expand(-1, config.num_heads, -1, -1)], -1)
        scale = config.softmax_scale
        if isinstance(mask, list):
            out_BHTV, max_logits_H = attend_tiled(
                q_BHTQ, k_BHTQ, v_BHTV=v_BHTV, tiles=mask, scale=scale, measured_BT=measured_BT
            )
            return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), max_logits_H
        if isinstance(mask, Runs):
            out_BHTV = attend_flash(q_BHTQ, k_BHTQ, v_BHTV=v_BHTV, runs=mask, scale=scale)
        else:
            out_BHTV = attend_fused(q_BHTQ, k_BHTQ, v_BHTV=v_BHTV, mask=mask, scale=scale)
        max_logits_H = None
        if measured_BT is not None:
            max_logits_H = max_logits(
                q_BHTQ, k_BHTQ, segments_BT=mask.segments_BT, measured_BT=measured_BT, scale=scale
            )
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2)), max_logits_H

    def _attend_natively(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        k_rope_BTR: torch.Tensor,
        *,
        rotation: Rotation,
        mask: FirstSeen,
        measured_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.library is not None, (
            "the mask was planned for native kernels, but this module has no kernel library"
        )
        rows = native.Rows(
            cosine_BTP=rotation.cos.squeeze(2), sine_BTP=rotation.sin.squeeze(2), first_seen_BT=mask.first_seen_BT
        )
        scale = self.config.softmax_scale
        out_BTHV, largest_BHT = native.latent_attention(
            q, kv, k_rotary_BTR=k_rope_BTR, rows=rows, scale=scale, library=self.library
        )
        max_logits_H = None if measured_BT is None else largest_by_head(largest_BHT, measured_BI=measured_BT)
        return self.o_proj(out_BTHV.flatten(2)), max_logits_H
