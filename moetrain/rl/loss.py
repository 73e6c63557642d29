"""The objective of an RL step: an algorithm's token losses, divided by a global count, plus balance losses.

N predicted tokens of a micro-batch.
"""

import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig
from moetrain.model.mtp import Mtp
from moetrain.model.transformer import Transformer
from moetrain.parallel.engine import Objective, ObjectiveResult
from moetrain.rl.columns import LOGPROB, TEMPERATURE
from moetrain.rl.config import BalanceLosses
from moetrain.rl.protocol import Algorithm, TokenLoss
from moetrain.train.config import MtpConfig
from moetrain.train.loss import GlobalCounts, balance_terms, mtp_term, router_entropies, token_logprobs

SUM_PREFIX = "sum/"
"""Prefix of metrics that are sums over tokens; they are reported per trained token."""
_GAP, _ENTROPY = "logprob_gap", "entropy"
_OWN_SUMS = (_GAP, _ENTROPY)


def rl_objective(
    algorithm: Algorithm,
    *,
    divisor: float,
    counts: GlobalCounts,
    balance: BalanceConfig,
    balance_losses: BalanceLosses,
    max_logits: MaxLogits = MaxLogits.unmeasured,
    mtp_weight: float = MtpConfig.weight,
) -> Objective:
    """Return the objective of an RL step; the sum of the token losses of all ranks is divided by `divisor`.

    Modules of multi-token prediction learn the sampled tokens, regardless of advantage; their loss sends no gradient
    into the model's other layers. With `BalanceLosses.model` the losses of `balance` are added. They are means over all
    tokens of the step's trajectories, including prompts and observations, because these are routed too. The objective
    raises ConfigError for token losses that have another shape than the logprobs, or no graph.
    """

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        output = model(
            batch.tokens_BT,
            segments_BT=batch.segments_BT,
            positions_BT=batch.positions_BT,
            max_logits=max_logits,
            mtp=Mtp.detached,
        )
        temperatures_N = batch.at_targets(TEMPERATURE)
        predicted = token_logprobs(model, output.hidden_BTD, batch=batch, temperatures_N=temperatures_N, mtp=output.mtp)
        columns = {name: batch.at_targets(name) for name in batch.columns}
        loss = algorithm.token_loss(predicted.logprobs_N, columns=columns)
        _check(loss, predicted.logprobs_N, algorithm=algorithm)
        gap_N = (predicted.logprobs_N.detach() - columns[LOGPROB]).abs()
        metrics = {
            **{SUM_PREFIX + name: value.detach() for name, value in loss.sums.items()},
            SUM_PREFIX + _GAP: gap_N.sum(),
            SUM_PREFIX + _ENTROPY: predicted.entropies_N.sum(),
            "trained_tokens": torch.tensor(float(gap_N.numel()), device=gap_N.device),
            **router_entropies(
                output,
                layers=[name for name, _ in model.moe_layers()],
                num_tokens=batch.num_tokens,
                counts=counts,
            ),
        }
        ones_N = torch.ones_like(predicted.logprobs_N)
        mtp = mtp_term(predicted, weight=mtp_weight, weights_N=ones_N, divisor=counts.targets)
        metrics |= mtp.metrics
        total = (batch.target_weights() * loss.loss_N).sum() / divisor + mtp.loss
        if balance_losses is BalanceLosses.model:
            terms = balance_terms(output, counts=counts, model=model.config, balance=balance)
            total, metrics = total + terms.loss, {**metrics, **terms.metrics}
        return ObjectiveResult(
            loss=total,
            counts_LE=output.counts_LE,
            required_LEB=output.required_LEB,
            metrics=metrics,
            max_logits_AH=output.max_logits_AH,
        )

    return objective


def _check(loss: TokenLoss, logprobs_N: torch.Tensor, *, algorithm: Algorithm) -> None:
    """Raise ConfigError for a loss that is not one number per token with a gradient, and for sums that are no sums."""
    owner = f"{type(algorithm).__name__}.token_loss"
    if not isinstance(loss, TokenLoss):
        raise ConfigError(f"{owner} returns {type(loss).__name__}: return TokenLoss(loss_N=...)")
    for name, value in loss.sums.items():
        if name in _OWN_SUMS:
            raise ConfigError(f"{owner} has a sum {name!r}, which every RL step reports: give it another name")
        if not isinstance(value, torch.Tensor) or value.dim():
            raise ConfigError(f"{owner} has a sum {name!r} that is no scalar tensor: return the sum over the tokens")
    if loss.loss_N.shape != logprobs_N.shape:  # a mean or a sum would be broadcast, and counted once per token
        raise ConfigError(
            f"{owner} returns loss_N of shape {list(loss.loss_N.shape)} for logprobs_N of shape "
            f"{list(logprobs_N.shape)}: return the loss of each token; the trainer sums and divides"
        )
    if logprobs_N.requires_grad and not loss.loss_N.requires_grad:
        raise ConfigError(f"{owner} returns loss_N without a gradient: compute it from logprobs_N, without detach()")
