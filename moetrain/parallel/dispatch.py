"""Dispatch of tokens to the ranks of their experts by all-to-all with uneven splits; no token is dropped.

N tokens of this rank, K experts per token, D hidden size, E experts of a layer, L experts on this rank, G ranks in the
group (H where it is the sending side), S = N * K rows sent, R rows received, P rows sent in a round.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.model.moe import Experts
from moetrain.ops.combine import combine, inverse, permute, rows_for_experts
from moetrain.ops.expert_rounds import Round, compute_in_rounds, experts_of_round, round_ends, rows_between
from moetrain.parallel.host_memory import shared_memory_of
from moetrain.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Rows that this rank sends to and receives from each rank of the group."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def reversed(self) -> "Splits":
        """Return the splits of the opposite direction."""
        return Splits(send=self.receive, receive=self.send, group=self.group)


def exchange(rows: torch.Tensor, *, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows that the ranks of `group` sent to this rank, in rank order. Collective; splits may be 0."""
    received, rows = rows.new_empty(sum(receive), *rows.shape[1:]), rows.contiguous()
    if memory := shared_memory_of(group, device=rows.device):
        memory.exchange(rows, send=send, receive=receive, out=received)
    else:
        dist.all_to_all_single(received, rows, receive, send, group=group)
    return received


def _exchange(rows_SD: torch.Tensor, splits: Splits) -> torch.Tensor:
    return exchange(rows_SD, send=splits.send, receive=splits.receive, group=splits.group)


class _AllToAll(torch.autograd.Function):
    """`exchange` with a gradient: the exchange in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, rows_SD: torch.Tensor, splits: Splits) -> torch.Tensor:
        """Return rows_RD."""
        ctx.splits = splits
        return _exchange(rows_SD, splits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of rows_SD."""
        return _exchange(grads[0], ctx.splits.reversed()), None


def _all_to_all(rows_SD: torch.Tensor, splits: Splits) -> torch.Tensor:
    rows_RD: torch.Tensor = _AllToAll.apply(rows_SD, splits)  # type: ignore[no-untyped-call]
    return rows_RD


def _by_expert(counts_GL: torch.Tensor) -> torch.Tensor:
    """Return the permutation that sorts received rows by expert. They arrive by rank, then expert: `counts_GL` rows."""
    local_ids_GL = torch.arange(counts_GL.shape[1], device=counts_GL.device).expand_as(counts_GL)
    return local_ids_GL.flatten().repeat_interleave(counts_GL.flatten()).argsort(stable=True)


class AllToAllDispatcher:
    """Dispatch over the ranks of the expert-parallel group; each stores E / G consecutive experts.

    With `expert_rows`, a rank receives at most that many rows at once. More rows are processed in rounds, in which all
    ranks take part.
    """

    def __init__(self, topology: Topology, *, num_experts: int, expert_rows: int | None = None) -> None:
        assert topology.expert_group is not None
        self.group = topology.expert_group
        self.num_ranks = topology.expert_size
        self.rank = topology.expert_rank
        self.num_experts = num_experts
        self.expert_rows = expert_rows

    def __call__(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Return y_ND, the weighted sum of the outputs of each token's experts, summed in float32. Collective."""
        ids_S = expert_ids_NK.flatten()
        order_S = ids_S.argsort(stable=True)
        num_chosen = expert_ids_NK.shape[1]
        tokens_S = order_S // num_chosen
        counts_GL = torch.bincount(ids_S, minlength=self.num_experts).view(self.num_ranks, -1)
        if self.expert_rows is None:
            received_GL = torch.empty_like(counts_GL)
            dist.all_to_all_single(received_GL, counts_GL, group=self.group)
            rows_SD = rows_for_experts(x_ND, order_S, num_chosen=num_chosen, library=experts.library)
            y_SD = self._at_once(rows_SD, counts_GL, received_GL=received_GL, experts=experts)
            return combine(y_SD, order_S, weights_NK=weights_NK, library=experts.library)

        counts_HGL = [torch.empty_like(counts_GL) for _ in range(self.num_ranks)]
        dist.all_gather(counts_HGL, counts_GL, group=self.group)
        rounds = self._rounds(torch.stack(counts_HGL).cpu(), limit=self.expert_rows, device=x_ND.device)
        if len(rounds) > 1:
            y_SD = compute_in_rounds(
                x_ND, tokens_S, weights=experts.compute_weights(), rounds=rounds, library=experts.library
            )
        else:
            received_GL = torch.stack([counts[self.rank] for counts in counts_HGL])
            rows_SD = rows_for_experts(x_ND, order_S, num_chosen=num_chosen, library=experts.library)
            y_SD = self._at_once(rows_SD, counts_GL, received_GL=received_GL, experts=experts)
        return combine(y_SD, order_S, weights_NK=weights_NK, library=experts.library)

    def _at_once(
        self, rows_SD: torch.Tensor, counts_GL: torch.Tensor, *, received_GL: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Return the outputs y_SD of rows sorted by expert, in one round."""
        send, receive = torch.stack([counts_GL.sum(dim=1), received_GL.sum(dim=1)]).tolist()
        splits = Splits(send=send, receive=receive, group=self.group)
        rows_RD = _all_to_all(rows_SD, splits)
        by_expert_R = _by_expert(received_GL)
        by_source_R = inverse(by_expert_R)
        sorted_RD = permute(rows_RD, by_expert_R, inverse_S=by_source_R, library=experts.library)
        y_RD = experts.compute(sorted_RD, received_GL.sum(dim=0))
        y_RD = permute(y_RD, by_source_R, inverse_S=by_expert_R, library=experts.library)
        return _all_to_all(y_RD, splits.reversed())

    def _rounds(self, counts_HGL: torch.Tensor, *, limit: int, device: torch.device) -> list[Round]:
        """Return the rounds, the same number on every rank. counts_HGL: rows that rank H sends to expert L of rank G.

        A receiving rank orders its rows by expert, then sender, and splits this order into rounds. Each sender's rows
        are sorted by expert, so the rows that it sends to one rank in one round are consecutive.
        """
        counts_GX = counts_HGL.permute(1, 2, 0).flatten(1)  # X = L * H, the order that is split into rounds
        ends_G = [round_ends(counts, limit=limit) for counts in counts_HGL.sum(dim=0).tolist()]
        num_rounds = max(len(ends) for ends in ends_G)
        ends_TG = torch.tensor([ends + ends[-1:] * (num_rounds - len(ends)) for ends in ends_G]).T
        sent_G = counts_HGL[self.rank].sum(dim=1)
        next_G = sent_G.cumsum(0) - sent_G
        first_G = torch.zeros_like(next_G)
        rounds = []
        for last_G in ends_TG:
            taken_GX = rows_between(counts_GX, first=first_G[:, None], last=last_G[:, None])
            taken_GLH = taken_GX.view(self.num_ranks, -1, self.num_ranks)
            send_G = taken_GLH[:, :, self.rank].sum(dim=1)
            sent = [torch.arange(start, start + n) for start, n in zip(next_G.tolist(), send_G.tolist(), strict=True)]
            received_GL = taken_GLH[self.rank].T.to(device)
            rounds.append(self._round(torch.cat(sent).to(device), received_GL, send=send_G.tolist()))
            next_G, first_G = next_G + send_G, last_G
        return rounds

    def _round(self, sent_P: torch.Tensor, received_GL: torch.Tensor, *, send: list[int]) -> Round:
        splits = Splits(send=send, receive=received_GL.sum(dim=1).tolist(), group=self.group)
        counts_L = received_GL.sum(dim=0)
        experts = experts_of_round(counts_L.tolist())

        # The permutation is recomputed for the backward pass: stored, its size would grow with the received rows.
        def to_experts(rows_PD: torch.Tensor) -> torch.Tensor:
            return _exchange(rows_PD, splits).index_select(0, _by_expert(received_GL))

        def from_experts(rows_RD: torch.Tensor) -> torch.Tensor:
            return _exchange(rows_RD.index_select(0, _by_expert(received_GL).argsort()), splits.reversed())

        return Round(
            sent_P=sent_P, to_experts=to_experts, from_experts=from_experts, experts=experts, counts_l=counts_L[experts]
        )
