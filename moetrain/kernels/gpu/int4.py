"""Routed experts on a GPU straight from INT4 codes, by the Triton kernels of `triton_int4`.

Codes and scales stay in memory as files hold them: 4.5 bits per weight in groups of 32. A weight becomes bf16(code *
scale) in registers, the number that training multiplies, and sums are in float32. The weights are the left operand of a
product and the rows the right one, so that tiles of few and of many rows use the same instruction. An output is one sum
over its inputs in ascending order: it does not depend on the tile, on the other rows or on their number.

N tokens, K chosen experts, S = N * K rows sorted by expert, T tiles of rows, D hidden, E experts, F expert width,
G = 2F (gate rows first), W words of eight codes.
"""

from dataclasses import dataclass
from typing import Any

import torch

OUTPUTS, INPUTS = 64, 64
"""Outputs of a program, and inputs that it reads at a time."""
_FEW, _MANY = 16, 64
"""Rows of a tile: few while the experts have few rows on average."""
_COLUMNS = 256
"""Numbers of a token that one program of the combination adds."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Matrices of all experts: int32 words [E, outputs, W] of the layout of `quant.codec_int4`, bf16 scales
    [E, outputs, groups].
    """

    words: torch.Tensor
    scales: torch.Tensor

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale."""
        return self.words.shape[-1] * 8 // self.scales.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows sorted by expert, cut into tiles of one expert each. The host reads none of it.

    order_S: places of the sorted rows in [N, K], int64. experts_T, firsts_T, ends_T: expert of each tile, its first
    sorted row, and the end of the expert's rows; a tile that is not needed has no rows.
    """

    order_S: torch.Tensor
    experts_T: torch.Tensor
    firsts_T: torch.Tensor
    ends_T: torch.Tensor


def tiles_of(expert_ids_NK: torch.Tensor, *, num_experts: int, rows_per_tile: int) -> Tiles:
    """Return the tiles of the chosen experts, as many as there can be: the host does not wait for their number."""
    device = expert_ids_NK.device
    ids_S, order_S = expert_ids_NK.flatten().sort(stable=True)
    bounds = torch.searchsorted(ids_S, torch.arange(num_experts + 1, device=device))
    tiles_E = (bounds.diff() + rows_per_tile - 1) // rows_per_tile
    tile_ends_E = tiles_E.cumsum(0)
    num_tiles = len(ids_S) // rows_per_tile + min(num_experts, len(ids_S))
    tiles_T = torch.arange(num_tiles, device=device)
    experts_T = torch.searchsorted(tile_ends_E, tiles_T, right=True).clamp(max=num_experts - 1)
    firsts_T = bounds[experts_T] + rows_per_tile * (tiles_T - (tile_ends_E - tiles_E)[experts_T])
    return Tiles(order_S=order_S, experts_T=experts_T, firsts_T=firsts_T, ends_T=bounds[experts_T + 1])


def expert_sums(
    x_ND: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    *,
    weights_NK: torch.Tensor,
    gate_up: Codes,
    down: Codes,
    rows_per_tile: int | None = None,
) -> torch.Tensor:
    """Return the weighted sums [N, D] in bf16 of the chosen experts' outputs for bf16 rows.

    weights_NK: float32. gate_up: [E, G, D]. down: [E, D, F]. rows_per_tile: a power of two from 16; None chooses by the
    mean number of rows per expert. It changes no bit of the result.
    """
    from moetrain.kernels.gpu import triton_int4  # Triton is optional

    num_tokens, width = x_ND.shape
    num_experts, num_chosen, hidden = len(down.words), expert_ids_NK.shape[1], gate_up.words.shape[1] // 2
    num_rows = expert_ids_NK.numel()
    if rows_per_tile is None:
        rows_per_tile = _FEW if num_rows <= _FEW * num_experts else _MANY
    tiles = tiles_of(expert_ids_NK, num_experts=num_experts, rows_per_tile=rows_per_tile)
    ends = (tiles.order_S, tiles.experts_T, tiles.firsts_T, tiles.ends_T)
    sizes: dict[str, Any] = {"ROWS": rows_per_tile, "OUTPUTS": OUTPUTS, "INPUTS": INPUTS}
    hidden_SF = x_ND.new_empty(num_rows, hidden)
    y_SD = x_ND.new_empty(num_rows, width)
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    grid = (len(tiles.experts_T), _blocks(hidden, OUTPUTS))
    triton_int4.hidden_kernel[grid](
        *(x_ND.contiguous(), gate_up.words, gate_up.scales, *ends, hidden_SF),
        NUM_INPUTS=width,
        NUM_OUTPUTS=hidden,
        NUM_CHOSEN=num_chosen,
        GROUP=gate_up.group_size,
        **sizes,
    )
    grid = (len(tiles.experts_T), _blocks(width, OUTPUTS))
    triton_int4.down_kernel[grid](
        *(hidden_SF, down.words, down.scales, *ends, y_SD),
        NUM_INPUTS=hidden,
        NUM_OUTPUTS=width,
        GROUP=down.group_size,
        **sizes,
    )
    grid = (num_tokens, _blocks(width, _COLUMNS))
    triton_int4.combine_kernel[grid](
        *(y_SD, weights_NK.contiguous(), out_ND), NUM_COLUMNS=width, NUM_CHOSEN=num_chosen, COLUMNS=_COLUMNS
    )
    return out_ND


def _blocks(count: int, size: int) -> int:
    return -(-count // size)
