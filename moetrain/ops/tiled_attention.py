"""Attention over packed rows in tiles of queries, with an explicit backward pass; for short rows on CPUs.

A tile of queries is multiplied only with the keys from the start of its first document to its own end. This skips the
upper triangle and most of the other documents. In bf16 with rows of up to a few hundred tokens, the products run
several times faster than torch's fused CPU kernel.

B rows, H heads, Z = B * H, z of them in a part, T tokens, I queries of a tile, J keys of a tile, Q query-key width, V
value width.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moetrain.ops.max_logits import largest_by_head
from moetrain.ops.thread_parts import part_bounds, run_parts

TILE = 128
"""Number of queries per tile, and the granularity of its first key. This gives few distinct shapes, for each of which
oneDNN builds a kernel."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries start..end and keys first_key..end; the bias is 0 where a query attends to a key, else -inf."""

    start: int
    end: int
    first_key: int
    bias_BIJ: torch.Tensor


def first_seen(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return the index of the first token [B, T] of each token's segment, int64.

    Segments are consecutive tokens; padding is treated as one more segment.
    """
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_run_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_run_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(starts_run_BT, index_T, 0).cummax(1).values


def plan_tiles(segments_BT: torch.Tensor, dtype: torch.dtype) -> list[Tile]:
    """Return the tiles of packed rows, for all layers of a forward pass.

    A token attends to itself and to earlier tokens of its own segment.
    """
    num_tokens = segments_BT.shape[1]
    index_T = torch.arange(num_tokens, device=segments_BT.device)
    first_seen_BT = first_seen(segments_BT)
    tiles = []
    for start in range(0, num_tokens, TILE):
        end = min(start + TILE, num_tokens)
        first_key = int(first_seen_BT[:, start].min()) // TILE * TILE
        queries_I1, keys_J = index_T[start:end, None], index_T[first_key:end]
        seen_BIJ = (keys_J <= queries_I1) & (keys_J >= first_seen_BT[:, start:end, None])
        bias_BIJ = torch.zeros(seen_BIJ.shape, dtype=dtype, device=segments_BT.device)
        bias_BIJ.masked_fill_(~seen_BIJ, float("-inf"))
        tiles.append(Tile(start=start, end=end, first_key=first_key, bias_BIJ=bias_BIJ))
    return tiles


class _TiledAttention(torch.autograd.Function):
    """Stores the probabilities of every tile for the backward pass, and measures the largest scores if requested."""

    @staticmethod
    def forward(
        ctx: Any,
        q_ZTQ: torch.Tensor,
        k_ZTQ: torch.Tensor,
        v_ZTV: torch.Tensor,
        tiles: list[Tile],
        scale: float,
        measured_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs [Z, T, V], and the largest logits [H] over the measured tokens if there are any."""
        out_ZTV = v_ZTV.new_empty(v_ZTV.shape)
        largest_ZT = q_ZTQ.new_empty(q_ZTQ.shape[:2], dtype=torch.float32) if measured_BT is not None else None
        bounds = part_bounds(len(q_ZTQ))
        probabilities: list[list[torch.Tensor]] = [[] for _ in bounds]
        num_rows = len(tiles[0].bias_BIJ)
        row_Z = torch.arange(num_rows, device=q_ZTQ.device).repeat_interleave(len(q_ZTQ) // num_rows)

        def part(index: int) -> None:
            mine = slice(*bounds[index])
            q_zTQ, k_zTQ, v_zTV, out_zTV = q_ZTQ[mine], k_ZTQ[mine], v_ZTV[mine], out_ZTV[mine]
            for tile in tiles:
                queries, keys = slice(tile.start, tile.end), slice(tile.first_key, tile.end)
                scores_zIJ = tile.bias_BIJ.index_select(0, row_Z[mine])
                scores_zIJ.baddbmm_(q_zTQ[:, queries], k_zTQ[:, keys].transpose(1, 2), alpha=scale)
                if largest_ZT is not None:
                    largest_ZT[mine, queries] = scores_zIJ.amax(-1).float()
                p_zIJ = scores_zIJ.softmax(-1)
                out_zTV[:, queries] = torch.bmm(p_zIJ, v_zTV[:, keys])
                probabilities[index].append(p_zIJ)

        run_parts(part, len(bounds))
        ctx.save_for_backward(q_ZTQ, k_ZTQ, v_ZTV, *chain.from_iterable(probabilities))
        ctx.tiles, ctx.bounds, ctx.scale = tiles, bounds, scale
        if largest_ZT is None or measured_BT is None:
            return out_ZTV, None
        largest_BHT = largest_ZT.view(len(measured_BT), -1, measured_BT.shape[1])
        max_logits_H = largest_by_head(largest_BHT, measured_BI=measured_BT)
        ctx.mark_non_differentiable(max_logits_H)
        return out_ZTV, max_logits_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of queries, keys and values; the last two are summed over tiles in float32."""
        q_ZTQ, k_ZTQ, v_ZTV, *probabilities = ctx.saved_tensors
        grad_q_ZTQ = torch.empty_like(q_ZTQ)
        grad_k_ZTQ = torch.zeros_like(k_ZTQ, dtype=torch.float32)
        grad_v_ZTV = torch.zeros_like(v_ZTV, dtype=torch.float32)

        def part(index: int) -> None:
            mine = slice(*ctx.bounds[index])
            q_zTQ, k_zTQ, v_zTV, grad_zTV = q_ZTQ[mine], k_ZTQ[mine], v_ZTV[mine], grads[0][mine]
            grad_q_zTQ, grad_k_zTQ, grad_v_zTV = grad_q_ZTQ[mine], grad_k_ZTQ[mine], grad_v_ZTV[mine]
            of_part = probabilities[index * len(ctx.tiles) : (index + 1) * len(ctx.tiles)]
            for tile, p_zIJ in zip(ctx.tiles, of_part, strict=True):
                queries, keys = slice(tile.start, tile.end), slice(tile.first_key, tile.end)
                grad_zIV = grad_zTV[:, queries].contiguous()  # otherwise every bmm would copy it
                grad_v_zTV[:, keys].add_(torch.bmm(p_zIJ.transpose(1, 2), grad_zIV))
                grad_p_zIJ = torch.bmm(grad_zIV, v_zTV[:, keys].transpose(1, 2))
                grad_scores_zIJ = torch.ops.aten._softmax_backward_data(grad_p_zIJ, p_zIJ, -1, p_zIJ.dtype)
                grad_q_zTQ[:, queries] = torch.bmm(grad_scores_zIJ, k_zTQ[:, keys])
                grad_k_zTQ[:, keys].add_(torch.bmm(grad_scores_zIJ.transpose(1, 2), q_zTQ[:, queries]))

        run_parts(part, len(ctx.bounds))
        return (
            grad_q_ZTQ.mul_(ctx.scale),
            grad_k_ZTQ.mul_(ctx.scale).to(k_ZTQ.dtype),
            grad_v_ZTV.to(v_ZTV.dtype),
            None,
            None,
            None,
        )


def attend_tiled(
    q_BHTQ: torch.Tensor,
    k_BHTQ: torch.Tensor,
    *,
    v_BHTV: torch.Tensor,
    tiles: list[Tile],
    scale: float,
    measured_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention outputs [B, H, T, V], and the largest logit per head [H] if tokens are measured.

    Softmax accumulates in float32. `measured_BT`: True for tokens whose logits count. The maximum is float32 without
    gradient; a head without measured tokens gets -inf.
    """
    q_ZTQ, k_ZTQ, v_ZTV = q_BHTQ.flatten(0, 1), k_BHTQ.flatten(0, 1), v_BHTV.flatten(0, 1)
    out_ZTV, max_logits_H = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        q_ZTQ, k_ZTQ, v_ZTV, tiles, scale, measured_BT
    )
    return out_ZTV.view(v_BHTV.shape), max_logits_H
