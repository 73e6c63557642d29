"""The largest attention logit per head over the tokens of a batch, for QK-Clip.

A path that has its scores in memory takes the maximum from them. For a fused kernel that does not expose its scores,
`max_logits` recomputes them without gradient, one block at a time.

B rows, H heads, T tokens, I queries of a block, J keys of a block, Q query-key width.
"""

import torch

_QUERIES, _KEYS = 128, 1024
"""Size of a block. Only one block of scores exists at a time, whatever the length of the rows."""


def largest_by_head(largest_BHI: torch.Tensor, *, measured_BI: torch.Tensor) -> torch.Tensor:
    """Return the largest logit per head over the measured queries [H], float32; -inf if there are none.

    `largest_BHI`: the largest softmax input per query, modified in place. `measured_BI`: False for padding.
    """
    return largest_BHI.masked_fill_(~measured_BI[:, None], float("-inf")).amax((0, 2))


@torch.no_grad()
def max_logits(
    q_BHTQ: torch.Tensor,
    k_BHTQ: torch.Tensor,
    *,
    segments_BT: torch.Tensor,
    measured_BT: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the largest logit per head over the measured tokens [H], float32, without gradient.

    Products run in the dtype of the queries. A token attends to itself and to earlier tokens of its own segment.
    `measured_BT`: False for padding. A head without measured tokens gets -inf.
    """
    num_rows, num_heads, num_tokens, _ = q_BHTQ.shape
    index_T = torch.arange(num_tokens, device=q_BHTQ.device)
    largest_H = torch.full((num_heads,), float("-inf"), device=q_BHTQ.device)
    for start in range(0, num_tokens, _QUERIES):
        queries = slice(start, min(start + _QUERIES, num_tokens))
        for first_key in range(0, queries.stop, _KEYS):
            keys = slice(first_key, min(first_key + _KEYS, queries.stop))
            same_BIJ = segments_BT[:, queries, None] == segments_BT[:, None, keys]
            seen_B1IJ = (same_BIJ & (index_T[keys] <= index_T[queries, None]))[:, None]
            if not seen_B1IJ.any():
                continue
            q_ZIQ, k_ZJQ = q_BHTQ[:, :, queries].flatten(0, 1), k_BHTQ[:, :, keys].flatten(0, 1)
            scores_ZIJ = q_ZIQ.new_zeros(len(q_ZIQ), q_ZIQ.shape[1], k_ZJQ.shape[1])
            scores_ZIJ.baddbmm_(q_ZIQ, k_ZJQ.transpose(1, 2), alpha=scale)
            scores_BHIJ = scores_ZIJ.view(num_rows, num_heads, *scores_ZIJ.shape[1:]).masked_fill_(
                ~seen_B1IJ, float("-inf")
            )
            block_H = largest_by_head(scores_BHIJ.amax(-1).float(), measured_BI=measured_BT[:, queries])
            largest_H = torch.maximum(largest_H, block_H)
    return largest_H
