"""Log-probabilities of the predicted tokens, and the objective of pretraining and SFT.

The head computes logits only for positions whose next token is in the loss mask, a few rows at a time, and recomputes
them in the backward pass, so the logits of all tokens never exist at once. Log-softmax runs in float32. Objectives
return this micro-batch's share of a global mean, so the sum does not depend on packing, micro-batches or ranks.

B rows, T tokens per row, N predicted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.attention import MaxLogits
from moetrain.model.balance import global_balance_loss
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.model.mtp import Mtp, MtpHidden
from moetrain.model.transformer import ForwardOutput, Transformer
from moetrain.ops.logprobs import chunked_logprobs
from moetrain.parallel.protocol import Objective, ObjectiveResult
from moetrain.train.config import MtpConfig


@dataclass(kw_only=True)
class TokenLogprobs:
    """Log-probabilities and entropies of the predicted tokens, in the order of `batch.loss_mask_BT.nonzero()`.

    logprobs_N: float32, with gradient. entropies_N: float32, without gradient. mtp: for each module of multi-token
    prediction that was computed, what it predicts.
    """

    logprobs_N: torch.Tensor
    entropies_N: torch.Tensor
    mtp: "tuple[MtpLogprobs, ...]" = ()


@dataclass(kw_only=True)
class MtpLogprobs:
    """Log-probabilities of the M <= N predicted tokens that a module of multi-token prediction reaches.

    It does not reach the first tokens of a document. logprobs_M: float32, with gradient. is_reached_N: bool.
    """

    logprobs_M: torch.Tensor
    is_reached_N: torch.Tensor


def _only_these(counts_LE: torch.Tensor) -> torch.Tensor:
    return counts_LE


@dataclass(kw_only=True)
class GlobalCounts:
    """Totals of one optimizer step over all micro-batches and ranks, by which losses are normalised.

    target_weight: sum of the weights of the predicted tokens. loads: maps the expert counts of the current micro-batch
    to those of the whole step (collective); the default is for steps of one micro-batch on one rank.
    """

    tokens: int
    targets: int
    target_weight: float
    loads: Callable[[torch.Tensor], torch.Tensor] = _only_these


def token_logprobs(
    model: Transformer,
    hidden_BTD: torch.Tensor,
    *,
    batch: TokenBatch,
    temperatures_N: torch.Tensor | None = None,
    mtp: MtpHidden | None = None,
) -> TokenLogprobs:
    """Return the float32 log-probability of each token in the loss mask, predicted from the token before it.

    temperatures_N: divisor of the logits of each predicted token, float32 above 0; None means 1 everywhere. mtp: the
    modules of multi-token prediction, which predict the same tokens from further back, at temperature 1.
    """
    mtp = mtp or MtpHidden()
    row_N, column_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD[row_N, column_N - 1]
    targets_N = batch.tokens_BT[row_N, column_N]
    positions_N = batch.positions_BT[row_N, column_N]
    reached = [positions_N >= distance for distance in range(2, 2 + len(mtp.hidden_BTD))]
    further = [
        read_BTD[row_N[is_reached_N], column_N[is_reached_N] - distance]
        for distance, (read_BTD, is_reached_N) in enumerate(zip(mtp.hidden_BTD, reached, strict=True), start=2)
    ]
    if temperatures_N is not None and bool((temperatures_N == 1).all()):
        temperatures_N = None  # the same numbers with less work

    def read_out(hidden_XD: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_ND, *further = torch.split(hidden_XD, sizes)
        own = chunked_logprobs(
            hidden_ND, weight_VD, targets_N=targets_N, temperatures_N=temperatures_N, library=model.library
        )
        if mtp.is_detached:
            weight_VD = weight_VD.detach()
        return *own, *(
            chunked_logprobs(hidden_MD, weight_VD, targets_N=targets_N[is_reached_N], library=model.library)[0]
            for hidden_MD, is_reached_N in zip(further, reached, strict=True)
        )

    sizes = [len(hidden_ND), *map(len, further)]
    logprobs_N, entropies_N, *found = model.lm_head(
        torch.cat([hidden_ND, *further]) if further else hidden_ND, read_out
    )
    return TokenLogprobs(
        logprobs_N=logprobs_N,
        entropies_N=entropies_N,
        mtp=tuple(
            MtpLogprobs(logprobs_M=logprobs_M, is_reached_N=is_reached_N)
            for logprobs_M, is_reached_N in zip(found, reached, strict=True)
        ),
    )


@dataclass(kw_only=True)
class MtpTerm:
    """The contribution of multi-token prediction to an objective: a loss with gradient, and metrics."""

    loss: torch.Tensor | float
    metrics: dict[str, torch.Tensor]


def mtp_term(predicted: TokenLogprobs, *, weight: float, weights_N: torch.Tensor, divisor: float) -> MtpTerm:
    """Return this micro-batch's share of the loss of multi-token prediction (arXiv 2412.19437, eq. 24 and 25).

    weights_N: factor on the loss of each predicted token. divisor: their sum over the step. The metric
    `mtp_cross_entropy` is the mean over modules, without `weight`.
    """
    if not predicted.mtp:
        return MtpTerm(loss=0.0, metrics={})
    losses = [-(weights_N[module.is_reached_N] * module.logprobs_M).sum() / divisor for module in predicted.mtp]
    mean = torch.stack(losses).mean()
    return MtpTerm(loss=weight * mean, metrics={"mtp_cross_entropy": mean.detach()})


@dataclass(kw_only=True)
class BalanceTerms:
    """The routers' contribution to an objective: a loss with gradient, and its terms as metrics."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def balance_terms(
    output: ForwardOutput, *, counts: GlobalCounts, model: ModelConfig, balance: BalanceConfig
) -> BalanceTerms:
    """Return this micro-batch's share of the balance losses with a weight in `balance`, summed over layers.

    Each is a mean over the step's tokens, so the sum does not depend on the split into micro-batches and ranks.
    """
    loss = balance.sequence_loss * output.balance_loss / counts.tokens
    metrics = {"balance_loss": loss.detach()}
    if balance.global_loss:
        loads_LE = counts.loads(output.counts_LE)
        whole = global_balance_loss(output.score_sums_LE, loads_LE, config=model)
        term = balance.global_loss * whole / counts.tokens
        loss, metrics["global_balance_loss"] = loss + term, term.detach()
    if balance.z_loss:
        term = balance.z_loss * output.z_loss / counts.tokens
        loss, metrics["z_loss"] = loss + term, term.detach()
    return BalanceTerms(loss=loss, metrics=metrics)


def router_entropies(
    output: ForwardOutput, *, layers: Sequence[str], num_tokens: int, counts: GlobalCounts
) -> dict[str, torch.Tensor]:
    """Return this micro-batch's share of the mean router entropies: over all layers, and per layer by name."""
    entropy_L = output.entropy_L * num_tokens / counts.tokens
    return {
        "router_entropy": output.entropy_L.sum() / max(len(output.entropy_L), 1) * num_tokens / counts.tokens,
        **{f"router_entropy/{name}": entropy for name, entropy in zip(layers, entropy_L, strict=True)},
    }


def language_model_objective(
    counts: GlobalCounts,
    *,
    balance: BalanceConfig,
    max_logits: MaxLogits = MaxLogits.unmeasured,
    mtp_weight: float = MtpConfig.weight,
) -> Objective:
    """Return the objective of pretraining and SFT for a step with these global counts.

    loss = -sum(weight * logprob) / global target weight + the losses of `balance` + that of multi-token prediction.
    """

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        output = model(
            batch.tokens_BT,
            segments_BT=batch.segments_BT,
            positions_BT=batch.positions_BT,
            max_logits=max_logits,
            mtp=Mtp.joint,
        )
        predicted = token_logprobs(model, output.hidden_BTD, batch=batch, mtp=output.mtp)
        weights_N = batch.target_weights()
        cross_entropy = -(weights_N * predicted.logprobs_N).sum() / counts.target_weight
        terms = balance_terms(output, counts=counts, model=model.config, balance=balance)
        mtp = mtp_term(predicted, weight=mtp_weight, weights_N=weights_N, divisor=counts.target_weight)
        layers = [name for name, _ in model.moe_layers()]
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "entropy": predicted.entropies_N.sum() / counts.targets,
            **terms.metrics,
            **mtp.metrics,
            **router_entropies(output, layers=layers, num_tokens=batch.num_tokens, counts=counts),
        }
        return ObjectiveResult(
            loss=cross_entropy + terms.loss + mtp.loss,
            counts_LE=output.counts_LE,
            required_LEB=output.required_LEB,
            metrics=metrics,
            max_logits_AH=output.max_logits_AH,
        )

    return objective


ObjectiveFor = Callable[[GlobalCounts], Objective]
"""Builds the objective of one step from the step's global counts."""
