"""Expert computation in rounds of a limited number of rows; the backward pass recomputes each (arXiv 1604.06174).

So the number of rows that exist at once does not depend on the routing. The dispatcher decides how the rows of a round
reach their experts; this module does not depend on ranks.

N tokens, S rows (one per token and chosen expert), P rows sent in a round, R rows computed in it, D hidden, L experts,
l experts of a round, F expert width, G = 2F (gate rows first).
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
    """The rows that are computed together.

    - sent_P: int64, indices of this rank's S rows in the round.
    - to_experts: sends P rows to the ranks of their experts and returns the R rows that arrive here, sorted by expert.
    - from_experts: sends R rows back. Each of the two is the inverse of the other, and so also its gradient.
    - experts: slice that contains all experts with rows, at least one expert.
    - counts_l: int64, number of rows per expert.
    """

    sent_P: torch.Tensor
    to_experts: Move
    from_experts: Move
    experts: slice
    counts_l: torch.Tensor


def round_ends(counts: Iterable[int], *, limit: int) -> list[int]:
    """Return the end of each round among rows sorted by expert, with `counts` rows per expert.

    No round has more than `limit` rows, and at least one round is returned. An expert with at most `limit` rows is
    never split, so its gradient is one sum.
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
    """Return the number of rows of each block that lie in [first, last), for consecutive blocks of `counts_X` rows.

    Blocks are along the last axis; `first` and `last` broadcast against the counts.
    """
    ends_X = counts_X.cumsum(-1)
    return (torch.minimum(ends_X, last) - torch.maximum(ends_X - counts_X, first)).clamp(min=0)


def experts_of_round(counts: Sequence[int]) -> slice:
    """Return the smallest slice that contains all experts with rows; the first expert if none has rows."""
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
    """Return y_SD in the dtype of x: row i is the output of its expert for token `tokens_S[i]`.

    weights: gate_up [L, G, D] and down [L, D, F]. Only x and the weights are kept for the backward pass. All ranks must
    take part in all rounds in the same order, forward and backward. The gradient of an expert with rows in several
    rounds is summed in float32.
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
        """Return the gradients of x and both weights."""
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
    """Recompute a round and return the gradients of `tensors`: its rows, gate_up and down."""
    with torch.enable_grad():
        x_RD, gate_up_lGD, down_lDF = (tensor.detach().requires_grad_() for tensor in tensors)
        y_RD = expert_rows(x_RD, counts_l, gate_up_LGD=gate_up_lGD, down_LDF=down_lDF, library=library)
    return torch.autograd.grad(y_RD, (x_RD, gate_up_lGD, down_lDF), grad_y_RD)
