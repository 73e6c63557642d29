"""Measures how close the routers are to another choice of experts, and how much a reordering changes their scores.

Shape letters: N tokens, E experts, K chosen experts per token, G groups of S experts. O and H both have size G and
index the selected (open) and the other (closed) group of a pair.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moetrain.model.config import ModelConfig
from moetrain.model.router import Routing
from moetrain.parallel.protocol import Engine

_SCORES_PER_GROUP = 2  # the score of a group is the sum of its two best experts; see model.router


class Margins:
    """Records the scores of an engine's routers, and the smallest margin by which an expert was chosen."""

    def __init__(self, engine: Engine) -> None:
        self.scores: list[torch.Tensor] = []
        self.smallest = float("inf")
        for _, layer in engine.model.moe_layers():
            layer.gate.register_forward_hook(self._watch)

    def _watch(self, gate: Any, inputs: Any, routing: Routing) -> None:
        del inputs  # torch's signature
        if not torch.is_grad_enabled():
            return  # the extra forward pass that only counts expert loads; see train.expert_load
        self.scores.append(routing.scores_NE.detach().clone())
        biased_NE = routing.scores_NE.detach() + gate.e_score_correction_bias
        self.smallest = min(self.smallest, smallest_lead(biased_NE, routing.expert_ids_NK, config=gate.config))


def smallest_lead(biased_NE: torch.Tensor, expert_ids_NK: torch.Tensor, *, config: ModelConfig) -> float:
    """Return the smallest margin of all choices of experts; inf if there is no alternative choice.

    If every score changes by less than half of the margin, no token changes its experts. Between two experts in open
    groups the margin is the difference of their scores. Between an open and a closed group it is the difference of
    their sums divided by the number of terms. If the open group contains no chosen expert, the best expert of the
    closed group must also exceed the last chosen expert to change the choice.
    """
    grouped_NGS = biased_NE.view(len(biased_NE), config.num_groups, -1)
    num_best = min(_SCORES_PER_GROUP, grouped_NGS.shape[-1])
    sums_NG = grouped_NGS.topk(num_best, dim=-1).values.sum(dim=-1)
    best_ids = sums_NG.topk(config.num_groups_per_token, dim=-1).indices
    is_open_NG = torch.zeros_like(sums_NG, dtype=torch.bool).scatter(1, best_ids, True)
    is_chosen_NE = torch.zeros_like(biased_NE, dtype=torch.bool).scatter(1, expert_ids_NK, True)
    is_chosen_NGS = is_chosen_NE.view_as(grouped_NGS)
    last_N = biased_NE.gather(1, expert_ids_NK).amin(dim=1)

    is_rival_NGS = is_open_NG[..., None] & ~is_chosen_NGS
    lead_N = last_N - grouped_NGS.masked_fill(~is_rival_NGS, float("-inf")).flatten(1).amax(dim=1)

    lead_NOH = (sums_NG[:, :, None] - sums_NG[:, None, :]) / num_best
    behind_NH = last_N[:, None] - grouped_NGS.amax(dim=-1)
    is_used_NO = is_chosen_NGS.any(dim=-1)
    lead_NOH = torch.where(is_used_NO[:, :, None], lead_NOH, lead_NOH.maximum(behind_NH[:, None, :]))
    is_pair_NOH = is_open_NG[:, :, None] & ~is_open_NG[:, None, :]
    return min(float(lead_N.min()), float(lead_NOH.masked_fill(~is_pair_NOH, float("inf")).min()))


def largest_score_gap(whole: Sequence[torch.Tensor], single: Sequence[torch.Tensor], *, num_layers: int) -> float:
    """Return the largest difference of router scores between a run on whole batches and one row by row in reverse."""
    num_rows = len(single) // len(whole)
    gap = 0.0
    for step in range(len(whole) // num_layers):
        rows = single[step * num_rows * num_layers : (step + 1) * num_rows * num_layers]
        for layer in range(num_layers):
            there = torch.cat(list(rows[layer::num_layers])[::-1])
            gap = max(gap, float((whole[step * num_layers + layer] - there).abs().max()))
    return gap
