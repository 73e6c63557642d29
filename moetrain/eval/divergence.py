"""Compares two sets of weights: KL divergence on the same tokens, and the share of codes that differ.

B rows, T tokens, N sampled tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moetrain.inference.protocol import Model
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.quant.config import QuantConfig
from moetrain.quant.grids import Quantized, codes_of
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
def divergence(reference: Model, other: Model, *, trajectories: Sequence[Trajectory]) -> Divergence:
    """Return the divergence of `other` from `reference` on the sampled tokens of `trajectories`."""
    kls: list[torch.Tensor] = []
    changed: list[torch.Tensor] = []
    segments = [segment for trajectory in trajectories for segment in trajectory.segments if segment.num_sampled]
    for start in range(0, len(segments), _ROWS):
        rows = segments[start : start + _ROWS]
        first, second = (_logprobs(model, rows) for model in (reference, other))
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
    before: Mapping[str, torch.Tensor | Quantized], after: Mapping[str, torch.Tensor | Quantized], *, quant: QuantConfig
) -> dict[str, float]:
    """Return the share of codes and of scales of the routed experts that differ between two sets of weights.

    Weights that are not stored as codes are quantised with `quant`; codes have its format and group size.
    """
    num_codes = num_scales = codes_changed = scales_changed = 0
    for name, weights in after.items():
        if isinstance(weights, torch.Tensor) and weights.ndim < 3:  # only experts have three axes
            continue
        first, second = (
            codes_of(tensors, grid=quant.grid, group_size=quant.group_size) for tensors in (before[name], weights)
        )
        num_codes += first.codes_XOI.numel()
        num_scales += first.scales_XOG.numel()
        codes_changed += int((first.codes_XOI != second.codes_XOI).sum())
        scales_changed += int((first.scales_XOG != second.scales_XOG).sum())
    return {
        "code_flip_rate": codes_changed / max(num_codes, 1),
        "scale_change_rate": scales_changed / max(num_scales, 1),
    }


def _logprobs(model: Model, segments: Sequence[Segment]) -> torch.Tensor:
    """Return the log-probabilities [N, V] of every token at the positions of the sampled ones."""
    chunks: list[Chunk] = []
    before: list[int] = []  # rows that precede a sampled token
    num_rows = num_pages = 0
    for segment in segments:
        own_pages = -(-len(segment.tokens) // PAGE)
        pages = range(num_pages, num_pages + own_pages)
        chunks.append(Chunk(tokens=segment.tokens, start=0, pages=pages))
        before += [num_rows + place - 1 for place, is_sampled in enumerate(segment.is_sampled) if is_sampled]
        num_rows, num_pages = num_rows + len(segment.tokens), num_pages + own_pages
    hidden_ND = model.forward(Rows.of(chunks, device=model.device), model.new_cache(num_pages))
    return torch.log_softmax(model.logits(hidden_ND[torch.tensor(before, device=model.device)]), -1)
