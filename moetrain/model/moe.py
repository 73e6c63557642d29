"""The Mixture-of-Experts layer: router, routed experts behind a dispatcher, shared experts, balance loss.

The layer itself runs on one device; a dispatcher passed to it reaches experts on other ranks. N tokens, S = N * K rows
(one per token and chosen expert), D hidden, E experts, L local experts, F expert width, G = 2F, R rows of one round, K
chosen experts, M documents.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from moetrain.kernels.choice import usable_for
from moetrain.model.balance import required_biases, z_loss_sum
from moetrain.model.config import BiasRule, ModelConfig
from moetrain.model.kernel_module import KernelModule
from moetrain.model.layers import FeedForward
from moetrain.model.recompute import Recomputable, run_part
from moetrain.model.router import Router, Routing
from moetrain.ops.combine import combine, rows_for_experts
from moetrain.ops.expert_rounds import Round, compute_in_rounds, experts_of_round, round_ends, rows_between
from moetrain.ops.experts import expert_rows
from moetrain.quant.fake_quant import FakeQuantizer


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The document of each token: `ids_N` is int64 in 0..M-1, or M for padding, where `is_token_N` is False."""

    ids_N: torch.Tensor
    is_token_N: torch.Tensor
    lengths_M: torch.Tensor
    """Tokens per document, without padding; some may be 0."""
    tokens_n: torch.Tensor | None = None
    """Positions of the n tokens that are not padding, int64; None if there is no padding."""

    @classmethod
    def of(cls, segments_BT: torch.Tensor) -> "Documents":
        """Return which document each token of a batch of packed rows belongs to.

        segments_BT: number of the document in its row, from 1; 0 is padding.
        """
        num_segments = int(segments_BT.max()) + 1
        rows_B1 = torch.arange(segments_BT.shape[0], device=segments_BT.device)[:, None]
        num_documents = segments_BT.shape[0] * num_segments
        is_token_N = (segments_BT > 0).flatten()
        ids_N = torch.where(is_token_N, (rows_B1 * num_segments + segments_BT).flatten(), num_documents)
        lengths_M = torch.bincount(ids_N, minlength=num_documents + 1)[:num_documents]
        tokens_n = is_token_N.nonzero().squeeze(1)
        has_padding = len(tokens_n) < len(is_token_N)
        return cls(ids_N=ids_N, is_token_N=is_token_N, lengths_M=lengths_M, tokens_n=tokens_n if has_padding else None)

    def counts(self, expert_ids_NK: torch.Tensor, *, num_experts: int) -> torch.Tensor:
        """Return how many tokens of each document chose each expert [M, E], int64; padding is excluded."""
        num_documents = len(self.lengths_M)
        pairs_NK = self.ids_N[:, None] * num_experts + expert_ids_NK
        counts = torch.bincount(pairs_NK.flatten(), minlength=(num_documents + 1) * num_experts)
        return counts.view(-1, num_experts)[:num_documents]

    def sums(self, values_NE: torch.Tensor) -> torch.Tensor:
        """Return the sum over each document's tokens [M, E]; padding is excluded."""
        num_documents = len(self.lengths_M)
        sums = values_NE.new_zeros(num_documents + 1, values_NE.shape[1]).index_add(0, self.ids_N, values_NE)
        return sums[:num_documents]


class Experts(Recomputable, KernelModule):
    """The routed experts of a layer on this rank: SwiGLU, with gate rows before up rows as in transformers."""

    def __init__(self, config: ModelConfig, *, num_local: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.compute_dtype = compute_dtype
        self.fake_quant: FakeQuantizer | None = None
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * width, hidden, dtype=torch.float32))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, width, dtype=torch.float32))

    def compute_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gate_up [L, 2F, D] and down [L, D, F] as used in the products: cast, or fake-quantised.

        For native kernels the fp32 masters are returned, because these kernels cast while they read.
        """
        if self.fake_quant is None:
            if usable_for(self.library, self.gate_up_proj.device, dtype=self.compute_dtype):
                return self.gate_up_proj, self.down_proj
            return self.gate_up_proj.to(self.compute_dtype), self.down_proj.to(self.compute_dtype)
        return (
            self.fake_quant(self.gate_up_proj, self.compute_dtype),
            self.fake_quant(self.down_proj, self.compute_dtype),
        )

    def forward(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, *, dispatcher: "Dispatcher"
    ) -> torch.Tensor:
        """Return y_ND, the output of `dispatcher` for these experts; see Dispatcher.

        Dispatch and combine both run inside this module's call. An engine that gathers weights for the call of the
        module that owns them (ZeRO 3) thus gathers them once per layer, however often the dispatcher computes.
        """

        def part(x_ND: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
            return dispatcher(x_ND, expert_ids_NK, weights_NK, self)

        return run_part(part, x_ND, weights_NK, parameters=self.parameters(), recompute=self.recompute)

    def compute(self, x_SD: torch.Tensor, counts_L: torch.Tensor) -> torch.Tensor:
        """Return the outputs of rows sorted by local expert, in the dtype of x; `counts_L` (int64) is the rows per
        expert.

        An expert without rows still gets a gradient (zero).
        """
        gate_up_LGD, down_LDF = self.compute_weights()
        return expert_rows(x_SD, counts_L, gate_up_LGD=gate_up_LGD, down_LDF=down_LDF, library=self.library)


class Dispatcher(Protocol):
    """Sends tokens to their experts and returns the weighted sum of the expert outputs."""

    def __call__(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Return y_ND in the dtype of x: the sum over k of weight * expert(x), accumulated in float32.

        `expert_ids_NK` are global ids; `experts` contains this rank's experts and computes rows sorted by expert.
        """


class LocalDispatcher:
    """Dispatcher for experts that are all on this rank: sorts rows by expert, computes, and restores the order.

    `expert_rows`: maximum number of rows computed at once; None computes all at once.
    """

    def __init__(self, *, expert_rows: int | None = None) -> None:
        self.expert_rows = expert_rows

    def __call__(
        self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Return y_ND; see Dispatcher."""
        ids_S = expert_ids_NK.flatten()
        order_S = ids_S.argsort(stable=True)
        counts_E = torch.bincount(ids_S, minlength=experts.gate_up_proj.shape[0])
        tokens_S = order_S // expert_ids_NK.shape[1]
        if self.expert_rows is None or len(order_S) <= self.expert_rows:
            rows_SD = rows_for_experts(x_ND, order_S, num_chosen=expert_ids_NK.shape[1], library=experts.library)
            y_SD = experts.compute(rows_SD, counts_E)
        else:
            rounds = _local_rounds(counts_E, limit=self.expert_rows)
            y_SD = compute_in_rounds(
                x_ND, tokens_S, weights=experts.compute_weights(), rounds=rounds, library=experts.library
            )
        return combine(y_SD, order_S, weights_NK=weights_NK, library=experts.library)


def _local_rounds(counts_E: torch.Tensor, *, limit: int) -> list[Round]:
    """Return the rounds for rows that are sorted by expert and stay on this rank."""
    rounds, first = [], 0
    for last in round_ends(counts_E.tolist(), limit=limit):
        sent_P = torch.arange(first, last, device=counts_E.device)
        taken_E = rows_between(counts_E, first=torch.as_tensor(first), last=torch.as_tensor(last))
        experts = experts_of_round(taken_E.tolist())
        rounds.append(
            Round(sent_P=sent_P, to_experts=_stay, from_experts=_stay, experts=experts, counts_l=taken_E[experts])
        )
        first = last
    return rounds


def _stay(rows_RD: torch.Tensor) -> torch.Tensor:
    return rows_RD


@dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """Routing statistics of one layer; padding is excluded.

    `counts_E` int64: tokens that chose each expert. `balance_loss`: float32, see `sequence_balance_loss`. `entropy`:
    float32, detached, mean over tokens of the entropy of the normalised scores, in nats. `score_sums_E`: float32,
    normalised scores summed over tokens. `z_loss`: float32, see `balance.z_loss_sum`; 0 if its weight is 0.
    `required_EB` int32: see `balance.required_biases`; has no bins (B = 0) unless the bias rule is quantile and
    gradients are enabled.
    """

    counts_E: torch.Tensor
    balance_loss: torch.Tensor
    entropy: torch.Tensor
    score_sums_E: torch.Tensor
    z_loss: torch.Tensor
    required_EB: torch.Tensor


def sequence_balance_loss(
    normalized_NE: torch.Tensor, expert_ids_NK: torch.Tensor, *, documents: Documents
) -> torch.Tensor:
    """Return the sum over documents of length * sum_e f_e P_e (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    f_e is the expert's share of the document's choices times E (so 1 when even), P_e its mean normalised score. Because
    of the factor length, the sum over all batches divided by the number of tokens is the same for every split into
    batches.
    """
    num_experts = normalized_NE.shape[1]
    even_M1 = (documents.lengths_M * expert_ids_NK.shape[1]).clamp(min=1)[:, None] / num_experts
    counts_ME = documents.counts(expert_ids_NK, num_experts=num_experts)
    return (counts_ME / even_M1 * documents.sums(normalized_NE)).sum()


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer; holds weights only of the experts in `expert_slice`."""

    def __init__(
        self, config: ModelConfig, *, compute_dtype: torch.dtype, dispatcher: Dispatcher, expert_slice: slice
    ) -> None:
        super().__init__()
        num_local = len(range(*expert_slice.indices(config.num_experts)))
        self.gate = Router(config)
        self.experts = Experts(config, num_local=num_local, compute_dtype=compute_dtype)
        width = config.moe_intermediate_size * config.num_shared_experts
        self.shared_experts = FeedForward(config.hidden_size, width) if width else None
        self.dispatcher = dispatcher

    def forward(self, x_BTD: torch.Tensor, documents: Documents) -> tuple[torch.Tensor, RouterStatistics]:
        """Return the layer's output [B, T, D] and its router statistics."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        y_BTD = self._routed(x_ND, routing, documents.tokens_n).view_as(x_BTD)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, _statistics(routing, documents, gate=self.gate)

    def _routed(self, x_ND: torch.Tensor, routing: Routing, tokens_n: torch.Tensor | None) -> torch.Tensor:
        """Return the routed experts' output [N, D] at the positions `tokens_n` (None: all positions), and zero
        elsewhere.

        All padding tokens have the same embedding, so without this they would all load the same experts.
        """
        ids_NK, weights_NK = routing.expert_ids_NK, routing.weights_NK
        if tokens_n is None:
            routed_ND: torch.Tensor = self.experts(x_ND, ids_NK, weights_NK, dispatcher=self.dispatcher)
            return routed_ND
        routed_nD = self.experts(
            x_ND.index_select(0, tokens_n),
            ids_NK.index_select(0, tokens_n),
            weights_NK.index_select(0, tokens_n),
            dispatcher=self.dispatcher,
        )
        return torch.zeros_like(x_ND).index_copy(0, tokens_n, routed_nD)


def _statistics(routing: Routing, documents: Documents, *, gate: Router) -> RouterStatistics:
    normalized_NE = routing.scores_NE / routing.scores_NE.sum(-1, keepdim=True)
    kept_N = documents.is_token_N
    balance = gate.config.balance
    wants_required = balance.bias_rule == BiasRule.quantile and torch.is_grad_enabled()
    with torch.no_grad():
        counts_E = documents.counts(routing.expert_ids_NK, num_experts=normalized_NE.shape[1]).sum(dim=0)
        entropy_N = torch.special.entr(normalized_NE).sum(-1)
        entropy = (entropy_N * kept_N).sum() / kept_N.sum().clamp(min=1)
        if wants_required:
            bias_E = gate.e_score_correction_bias
            required_EB = required_biases(routing.scores_NE, bias_E, is_token_N=kept_N, config=gate.config)
        else:
            required_EB = counts_E.new_zeros((len(counts_E), 0), dtype=torch.int32)
    return RouterStatistics(
        counts_E=counts_E,
        balance_loss=sequence_balance_loss(normalized_NE, routing.expert_ids_NK, documents=documents),
        entropy=entropy,
        score_sums_E=kept_N.to(normalized_NE.dtype) @ normalized_NE,
        z_loss=z_loss_sum(routing.logits_NE, is_token_N=kept_N) if balance.z_loss else normalized_NE.new_zeros(()),
        required_EB=required_EB,
    )
