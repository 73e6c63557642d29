"""The feed-forward computation of a layer's routed experts: four implementations, chosen by device and dtype.

- `expert_loop`: plain torch operations; the reference for the others.
- `expert_manual_backward`: for CPUs; the same bits, with an explicit backward pass that copies and stores less.
- the native kernels: for bfloat16 on CPUs, if available.
- `expert_grouped`: for bfloat16 on GPUs; one grouped product for all experts.

The last two order their sums differently.

S rows sorted by expert, R rows of one expert, D hidden, L experts, F expert width, G = 2F (gate rows first).
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable
from moetrain.ops import native
from moetrain.ops.thread_parts import part_bounds, run_parts

ROW_MULTIPLE = 64
"""The rows of each expert are padded to a multiple of this, because oneDNN builds a kernel for every new shape."""


def expert_rows(
    x_SD: torch.Tensor,
    counts_L: torch.Tensor,
    *,
    gate_up_LGD: torch.Tensor,
    down_LDF: torch.Tensor,
    library: Library | None,
) -> torch.Tensor:
    """Return down(silu(gate x) * up x) in the dtype of x; rows are sorted by expert, `counts_L` (int64) rows each.

    An expert without rows still gets a gradient: zero.
    """
    if native_library := usable(library, x_SD):
        return native.expert_rows(x_SD, counts_L, gate_up_LGD=gate_up_LGD, down_LDF=down_LDF, library=native_library)
    if x_SD.device.type == "cpu":
        return expert_manual_backward(x_SD, counts_L, gate_up_LGD=gate_up_LGD, down_LDF=down_LDF)
    if x_SD.dtype == torch.bfloat16:
        return expert_grouped(x_SD, counts_L, gate_up_LGD=gate_up_LGD, down_LDF=down_LDF)
    return expert_loop(x_SD, counts_L, gate_up_LGD=gate_up_LGD, down_LDF=down_LDF)


def expert_loop(
    x_SD: torch.Tensor, counts_L: torch.Tensor, *, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor
) -> torch.Tensor:
    """Return the outputs, computed one expert at a time."""
    outputs = []
    for x_RD, gate_up_GD, down_DF in zip(
        torch.split(x_SD, counts_L.tolist()), gate_up_LGD.unbind(), down_LDF.unbind(), strict=True
    ):
        padded = F.pad(x_RD, (0, 0, 0, -len(x_RD) % ROW_MULTIPLE))
        gate, up = F.linear(padded, gate_up_GD).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, down_DF)[: len(x_RD)])
    return torch.cat(outputs)


def expert_grouped(
    x_SD: torch.Tensor, counts_L: torch.Tensor, *, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor
) -> torch.Tensor:
    """Return the outputs by `torch.nn.functional.grouped_mm`, for bf16; the host does not need to read the counts."""
    ends_L = counts_L.cumsum(0).to(torch.int32)
    gate_SF, up_SF = F.grouped_mm(x_SD, gate_up_LGD.transpose(1, 2), offs=ends_L).chunk(2, -1)
    return F.grouped_mm(F.silu(gate_SF) * up_SF, down_LDF.transpose(1, 2), offs=ends_L)


def expert_manual_backward(
    x_SD: torch.Tensor, counts_L: torch.Tensor, *, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor
) -> torch.Tensor:
    """Return the outputs. The backward pass is explicit; outputs and gradients equal `expert_loop` bit for bit."""
    counts = counts_L.tolist()
    y_SD: torch.Tensor = _ManualBackward.apply(x_SD, gate_up_LGD, down_LDF, counts)  # type: ignore[no-untyped-call]
    return y_SD


def _pieces(counts: list[int]) -> Iterator[tuple[int, slice, slice]]:
    """Yield each expert's index, its rows among the sorted rows, and its rows in the padded buffer."""
    start = padded_start = 0
    for expert, count in enumerate(counts):
        padded = count + -count % ROW_MULTIPLE
        yield expert, slice(start, start + count), slice(padded_start, padded_start + padded)
        start, padded_start = start + count, padded_start + padded


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Consecutive experts that one thread computes. `end`: rows from here on belong to other parts."""

    pieces: list[tuple[int, slice, slice]]
    end: int


def _parts(counts: list[int]) -> list[_Part]:
    """Return the experts in at most one part per thread, with about equal numbers of rows."""
    pieces = list(_pieces(counts))
    ends = [end for _, end in part_bounds(pieces[-1][2].stop)]
    groups: list[list[tuple[int, slice, slice]]] = [[] for _ in ends]
    for piece in pieces:
        groups[min(bisect_right(ends, piece[2].start), len(ends) - 1)].append(piece)
    filled = [group for group in groups if group]
    limits = [group[0][1].start for group in filled[1:]] + [sum(counts) + ROW_MULTIPLE]
    return [_Part(pieces=group, end=end) for group, end in zip(filled, limits, strict=True)]


def _product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, rows: slice, part: _Part) -> None:
    """Write the rows of a @ b without padding to `out[rows]`.

    If possible the product is written in place, with its padding after the rows, where the part's next expert
    overwrites it. If the padding would reach rows of another part, the rows are copied instead.
    """
    end = rows.start + len(a)
    if end <= part.end:
        torch.mm(a, b, out=out[rows.start : end])
    else:
        out[rows] = torch.mm(a, b)[: rows.stop - rows.start]


def _padded(rows_RD: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the rows to `out`, fill the rest with zeros, and return `out`."""
    out[: len(rows_RD)] = rows_RD
    out[len(rows_RD) :].zero_()
    return out


class _ManualBackward(torch.autograd.Function):
    """Computes one expert after the other, so that an expert's data stays in the cache.

    Outputs are written in place: the next expert's rows overwrite an expert's padding.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SD: torch.Tensor, gate_up_LGD: torch.Tensor, down_LDF: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        """Return y_SD."""
        parts = _parts(counts)
        num_padded = parts[-1].pieces[-1][2].stop
        x_PD = x_SD.new_empty(num_padded, x_SD.shape[1])
        gate_up_PG = x_SD.new_empty(num_padded, gate_up_LGD.shape[1])
        y_SD = x_SD.new_empty(len(x_SD) + ROW_MULTIPLE, x_SD.shape[1])

        def compute(index: int) -> None:
            part = parts[index]
            for expert, rows, padded in part.pieces:
                x_RD = _padded(x_SD[rows], x_PD[padded])
                torch.mm(x_RD, gate_up_LGD[expert].T, out=gate_up_PG[padded])
                gate_RF, up_RF = gate_up_PG[padded].chunk(2, -1)
                hidden_RF = F.silu(gate_RF).mul_(up_RF)
                _product(hidden_RF, down_LDF[expert].T, out=y_SD, rows=rows, part=part)

        run_parts(compute, len(parts))
        ctx.save_for_backward(x_PD, gate_up_PG, gate_up_LGD, down_LDF)
        ctx.parts = parts
        return y_SD[: len(x_SD)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the rows and both weights; silu is recomputed."""
        x_PD, gate_up_PG, gate_up_LGD, down_LDF = ctx.saved_tensors
        (grad_y_SD,) = grads
        grad_x_SD = x_PD.new_empty(len(grad_y_SD) + ROW_MULTIPLE, x_PD.shape[1])
        grad_gate_up_LGD, grad_down_LDF = torch.empty_like(gate_up_LGD), torch.empty_like(down_LDF)
        parts: list[_Part] = ctx.parts

        def compute(index: int) -> None:
            part = parts[index]
            for expert, rows, padded in part.pieces:
                if rows.start == rows.stop:
                    grad_gate_up_LGD[expert].zero_()
                    grad_down_LDF[expert].zero_()
                    continue
                x_RD, gate_up_RG = x_PD[padded], gate_up_PG[padded]
                gate_RF, up_RF = gate_up_RG.chunk(2, -1)
                grad_y_RD = _padded(grad_y_SD[rows], torch.empty_like(x_RD))
                silu_RF = F.silu(gate_RF)
                torch.mm(grad_y_RD.T, silu_RF * up_RF, out=grad_down_LDF[expert])
                grad_hidden_RF = torch.mm(grad_y_RD, down_LDF[expert])
                grad_gate_up_RG = torch.empty_like(gate_up_RG)
                grad_gate_RF, grad_up_RF = grad_gate_up_RG.chunk(2, -1)
                torch.mul(grad_hidden_RF, silu_RF, out=grad_up_RF)
                torch.ops.aten.silu_backward.grad_input(grad_hidden_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
                torch.mm(grad_gate_up_RG.T, x_RD, out=grad_gate_up_LGD[expert])
                _product(grad_gate_up_RG, gate_up_LGD[expert], out=grad_x_SD, rows=rows, part=part)

        run_parts(compute, len(parts))
        return grad_x_SD[: len(grad_y_SD)], grad_gate_up_LGD, grad_down_LDF, None
