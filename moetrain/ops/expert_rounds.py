"""Expert computation in rounds of at most so many rows, each computed again in the backward pass (arXiv 1604.06174).

So the rows that exist at once do not depend on where the router sends tokens. How the rows of a round reach their
experts is the dispatcher's; no rank is known here.

N tokens, S rows (a token times a chosen expert), P rows that are sent in a round, R rows that are computed in it,
D hidden, L experts, l those of a round, F expert width, G = 2F (gate rows first).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moetrain.kernels.build import Library
from moetrain.ops.experts import expert_rows

Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is computed at once.

    sent_P: int64, which of this rank's S rows take part. to_experts: brings P rows to where their experts are and
    returns the R rows that arrived here, sorted by expert; from_experts brings R rows back. Either undoes the other,
    so that it is its gradient too. experts: those that have rows, at least one. counts_l: int64, rows of each of them.
    """

    sent_P: torch.Tensor
    to_experts: Move
    from_experts: Move
    experts: slice
    counts_l: torch.Tensor


def round_ends(counts: Iterable[int], *, limit: int) -> list[int]:
    """Return where each round ends among rows that are sorted by expert, `counts` rows each.

    No round has more than `limit` rows, and at least one is returned. An expert of at most `limit` rows is never cut:
    its gradient is summed in one go.
    """
    ends, start, end = [], 0, 0
    for count in counts:
        if end > start and end - start + count > limit:
            ends.append(end)
            start = end
        end += count
        while end - start > limit:
            start += limit
            ends.append(start)
    return [*ends, end] if end > start or not ends else ends


def rows_between(counts_X: torch.Tensor, *, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return how many rows of each block lie in [first, last), where blocks of `counts_X` rows follow one another.

    Blocks are along the last axis; `first` and `last` broadcast against the counts.
    """
    ends_X = counts_X.cumsum(-1)
    return (torch.minimum(ends_X, last) - torch.maximum(ends_X - counts_X, first)).clamp(min=0)


def experts_of_round(counts: Sequence[int]) -> slice:
    """Return the range of experts that holds all that have rows; the first one when none has."""
    with_rows = [expert for expert, count in enumerate(counts) if count] or [0]
    return slice(with_rows[0], with_rows[-1] + 1)


def compute_in_rounds(
    x_ND: torch.Tensor,
    tokens_S: torch.Tensor,
    *,
    weights: tuple[torch.Tensor, torch.Tensor],
    rounds: Sequence[Round],
    library: Library | None,
) -> torch.Tensor:
    """Return y_SD: row i is what its expert makes of token `tokens_S[i]`, in the dtype of x.

    weights: gate_up [L, G, D] and down [L, D, F]. For the backward pass x and the weights alone are kept. Ranks take
    part in all rounds in the same order, forward and backward. The gradient of an expert whose rows lie in several
    rounds is the float32 sum of theirs.
    """
    y_SD: torch.Tensor = _InRounds.apply(x_ND, *weights, tokens_S, rounds, library)  # type: ignore[no-untyped-call]
    return y_SD


class _InRounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        gate_up_LGD: torch.Tensor,
        down_LDF: torch.Tensor,
        tokens_S: torch.Tensor,
        rounds: Sequence[Round],
        library: Library | None,
    ) -> torch.Tensor:
        """Return y_SD."""
        y_SD = x_ND.new_empty(len(tokens_S), x_ND.shape[1])
        for now in rounds:
            x_RD = now.to_experts(x_ND.index_select(0, tokens_S[now.sent_P]))
            own = {"gate_up_LGD": gate_up_LGD[now.experts], "down_LDF": down_LDF[now.experts]}
            y_RD = expert_rows(x_RD, now.counts_l, **own, library=library)
            y_SD[now.sent_P] = now.from_experts(y_RD)
        ctx.save_for_backward(x_ND, gate_up_LGD, down_LDF, tokens_S)
        ctx.rounds, ctx.library = rounds, library
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and of both weights."""
        x_ND, gate_up_LGD, down_LDF, tokens_S = ctx.saved_tensors
        (grad_y_SD,) = grads
        grad_rows_SD = torch.empty_like(grad_y_SD)
        grad_gate_up_LGD = torch.zeros_like(gate_up_LGD, dtype=torch.float32)
        grad_down_LDF = torch.zeros_like(down_LDF, dtype=torch.float32)
        for now in ctx.rounds:
            x_RD = now.to_experts(x_ND.index_select(0, tokens_S[now.sent_P]))
            grad_y_RD = now.to_experts(grad_y_SD.index_select(0, now.sent_P))
            grad_x_RD, grad_gate_up_lGD, grad_down_lDF = _gradients(
                *(x_RD, gate_up_LGD[now.experts], down_LDF[now.experts]),
                counts_l=now.counts_l,
                grad_y_RD=grad_y_RD,
                library=ctx.library,
            )
            grad_gate_up_LGD[now.experts] += grad_gate_up_lGD
            grad_down_LDF[now.experts] += grad_down_lDF
            grad_rows_SD[now.sent_P] = now.from_experts(grad_x_RD)
        grad_x_ND = torch.zeros_like(x_ND).index_add_(0, tokens_S, grad_rows_SD)
        grads_of_weights = grad_gate_up_LGD.to(gate_up_LGD.dtype), grad_down_LDF.to(down_LDF.dtype)
        return grad_x_ND, *grads_of_weights, None, None, None


def _gradients(
    *tensors: torch.Tensor, counts_l: torch.Tensor, grad_y_RD: torch.Tensor, library: Library | None
) -> tuple[torch.Tensor, ...]:
    """Compute a round once more and return the gradients of its rows and of both weights, which are `tensors`."""
    with torch.enable_grad():
        x_RD, gate_up_lGD, down_lDF = (tensor.detach().requires_grad_() for tensor in tensors)
        y_RD = expert_rows(x_RD, counts_l, gate_up_LGD=gate_up_lGD, down_LDF=down_lDF, library=library)
    return torch.autograd.grad(y_RD, (x_RD, gate_up_lGD, down_lDF), grad_y_RD)
