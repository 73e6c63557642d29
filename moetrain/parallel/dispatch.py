"""Tokens to the ranks that hold their experts and back: dropless, with uneven splits, over the expert-parallel group.

N tokens of this rank, K experts a token, D hidden size, E experts of a layer, L experts on this rank, G ranks in the
group, S = N * K rows sent, R rows received.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.model.combine import combine
from moetrain.model.moe import Experts
from moetrain.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Rows that this rank sends to and receives from each rank of the group."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def reversed(self) -> "Splits":
        """Return the way back."""
        return Splits(send=self.receive, receive=self.send, group=self.group)


def exchange(rows: torch.Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows that the ranks of `group` sent to this one, in their order. Empty splits take part too."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    """`exchange`, whose gradient is the exchange the other way."""

    @staticmethod
    def forward(ctx: Any, rows_SD: torch.Tensor, splits: Splits) -> torch.Tensor:
        """Return rows_RD."""
        ctx.splits = splits
        return exchange(rows_SD, send=splits.send, receive=splits.receive, group=splits.group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of rows_SD."""
        back = ctx.splits.reversed()
        return exchange(grads[0], send=back.send, receive=back.receive, group=back.group), None


def _all_to_all(rows_SD: torch.Tensor, splits: Splits) -> torch.Tensor:
    rows_RD: torch.Tensor = _AllToAll.apply(rows_SD, splits)  # type: ignore[no-untyped-call]
    return rows_RD


class AllToAllDispatcher:
    """Dispatch over the ranks of the expert-parallel group; each holds E / G consecutive experts."""

    def __init__(self, topology: Topology, *, num_experts: int) -> None:
        assert topology.expert_group is not None
        self.group = topology.expert_group
        self.num_ranks = topology.expert_size
        self.num_experts = num_experts

    def __call__(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Return y_ND, the weighted sum of what each token's experts give, summed in float32. Collective."""
        ids_S = expert_ids_NK.flatten()
        order_S = ids_S.argsort(stable=True)
        counts_GL = torch.bincount(ids_S, minlength=self.num_experts).view(self.num_ranks, -1)
        received_GL = torch.empty_like(counts_GL)
        dist.all_to_all_single(received_GL, counts_GL, group=self.group)
        send, receive = torch.stack([counts_GL.sum(dim=1), received_GL.sum(dim=1)]).tolist()
        splits = Splits(send=send, receive=receive, group=self.group)

        rows_RD = _all_to_all(x_ND.index_select(0, order_S // expert_ids_NK.shape[1]), splits)
        local_ids_GL = torch.arange(received_GL.shape[1], device=x_ND.device).expand_as(received_GL)
        by_expert_R = local_ids_GL.flatten().repeat_interleave(received_GL.flatten()).argsort(stable=True)
        y_RD = experts.compute(rows_RD.index_select(0, by_expert_R), received_GL.sum(dim=0))
        by_source_R = by_expert_R.argsort()  # the inverse permutation
        y_SD = _all_to_all(y_RD.index_select(0, by_source_R), splits.reversed())
        return combine(y_SD, order_S, weights_NK=weights_NK)
