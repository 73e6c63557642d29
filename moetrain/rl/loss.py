"""The objective of an RL step: an algorithm's token losses, divided by a global count, plus balance losses.

N predicted tokens of a micro-batch.
"""

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.engine import Objective, ObjectiveResult
from moetrain.rl.columns import LOGPROB, TEMPERATURE
from moetrain.rl.config import BalanceLosses
from moetrain.rl.protocol import Algorithm
from moetrain.train.loss import GlobalCounts, balance_terms, router_entropies, token_logprobs

SUM_PREFIX = "sum/"
"""Prefix of metrics that are sums over tokens; they are reported per trained token."""


def rl_objective(
    algorithm: Algorithm,
    *,
    divisor: float,
    counts: GlobalCounts,
    balance: BalanceConfig,
    balance_losses: BalanceLosses,
    max_logits: MaxLogits = MaxLogits.unmeasured,
) -> Objective:
    """Return the objective of an RL step; the sum of the token losses of all ranks is divided by `divisor`.

    With `BalanceLosses.model` the losses of `balance` are added. They are means over all tokens of the step's
    trajectories, including prompts and observations, because these are routed too.
    """

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        output = model(
            batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, max_logits=max_logits
        )
        temperatures_N = batch.at_targets(TEMPERATURE)
        predicted = token_logprobs(model, output.hidden_BTD, batch=batch, temperatures_N=temperatures_N)
        columns = {name: batch.at_targets(name) for name in batch.columns}
        loss = algorithm.token_loss(predicted.logprobs_N, columns=columns)
        gap_N = (predicted.logprobs_N.detach() - columns[LOGPROB]).abs()
        metrics = {
            **{SUM_PREFIX + name: value.detach() for name, value in loss.sums.items()},
            SUM_PREFIX + "logprob_gap": gap_N.sum(),
            SUM_PREFIX + "entropy": predicted.entropies_N.sum(),
            "trained_tokens": torch.tensor(float(gap_N.numel()), device=gap_N.device),
            **router_entropies(
                output,
                layers=[name for name, _ in model.moe_layers()],
                num_tokens=batch.num_tokens,
                counts=counts,
            ),
        }
        total = (batch.target_weights() * loss.loss_N).sum() / divisor
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
