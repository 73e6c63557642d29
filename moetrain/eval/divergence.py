"""Compares two sets of weights: KL divergence on the same tokens, and the share of codes that differ.

B rows, T tokens, N sampled tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moetrain.inference.forward import forward
from moetrain.inference.weights import InferenceWeights
from moetrain.model.rope import build_rope
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import quantize
from moetrain.rollout.types import Segment, Trajectory

_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(reference || other) in nats per sampled token. top1_changed: share of positions whose top token differs."""

    mean_kl: float
    max_kl: float
    top1_changed: float
    num_tokens: int


@torch.inference_mode()
def divergence(
    reference: InferenceWeights, other: InferenceWeights, *, trajectories: Sequence[Trajectory]
) -> Divergence:
    """Return the divergence of `other` from `reference` on the sampled tokens of `trajectories`."""
    kls: list[torch.Tensor] = []
    changed: list[torch.Tensor] = []
    segments = [segment for trajectory in trajectories for segment in trajectory.segments if segment.num_sampled]
    for start in range(0, len(segments), _ROWS):
        rows = segments[start : start + _ROWS]
        first, second = (_logprobs(weights, rows) for weights in (reference, other))
        kls.append((first.exp() * (first - second)).sum(-1))
        changed.append(first.argmax(-1) != second.argmax(-1))
    kl_N, changed_N = torch.cat(kls), torch.cat(changed)
    return Divergence(
        mean_kl=float(kl_N.mean()),
        max_kl=float(kl_N.max()),
        top1_changed=float(changed_N.float().mean()),
        num_tokens=kl_N.numel(),
    )


def code_changes(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], *, quant: QuantConfig
) -> dict[str, float]:
    """Return the share of codes and of scales of the routed experts that differ between two sets of weights."""
    names = [name for name, tensor in after.items() if tensor.ndim == 3]  # only experts have three axes
    num_codes = num_scales = codes_changed = scales_changed = 0
    for name in names:
        first, second = (
            quantize(tensors[name], grid=quant.grid, group_size=quant.group_size) for tensors in (before, after)
        )
        num_codes += first.codes_XOI.numel()
        num_scales += first.scales_XOG.numel()
        codes_changed += int((first.codes_XOI != second.codes_XOI).sum())
        scales_changed += int((first.scales_XOG != second.scales_XOG).sum())
    return {
        "code_flip_rate": codes_changed / max(num_codes, 1),
        "scale_change_rate": scales_changed / max(num_scales, 1),
    }


def _logprobs(weights: InferenceWeights, rows: Sequence[Segment]) -> torch.Tensor:
    config = weights.config
    length = max(len(row.tokens) for row in rows)
    tokens_BT = torch.zeros(len(rows), length, dtype=torch.long)
    is_sampled_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row.tokens)] = torch.tensor(row.tokens)
        is_sampled_BT[index, : len(row.tokens)] = torch.tensor(row.is_sampled)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    hidden_BTD = forward(
        weights,
        tokens_BT=tokens_BT.to(weights.device),
        starts_B=torch.zeros(len(rows), dtype=torch.long, device=weights.device),
        cache_LBSC=torch.zeros(config.num_layers, len(rows), length, width, dtype=weights.dtype, device=weights.device),
        rope=build_rope(config, length).to(weights.device),
    )
    row_N, column_N = is_sampled_BT.to(weights.device).nonzero(as_tuple=True)
    logits_NV = F.linear(hidden_BTD[row_N, column_N - 1], weights.head_VD).float()
    return torch.log_softmax(logits_NV, -1)
