"""The policy objective: K2.5's token-level loss over sampled tokens (arXiv 2602.02276, eq. 1).

N predicted tokens of a micro-batch.
"""

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig
from moetrain.model.transformer import Transformer
from moetrain.parallel.engine import Objective, ObjectiveResult
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.train.loss import GlobalCounts, balance_terms, router_entropies, token_logprobs


def policy_terms(
    logprobs_N: torch.Tensor, *, sampled_N: torch.Tensor, advantages_N: torch.Tensor, config: RlConfig
) -> torch.Tensor:
    """Return each token's loss: -(clip(ratio) * advantage - tau * log(ratio)^2).

    ratio is the policy's probability over the one the token was sampled with. Outside [ratio_low, ratio_high] the
    clipped ratio is constant, so that the token has no policy gradient, whatever the sign of its advantage.
    """
    log_ratio_N = logprobs_N - sampled_N
    ratio_N = log_ratio_N.exp().clamp(config.ratio_low, config.ratio_high)
    return -(ratio_N * advantages_N - config.tau * log_ratio_N.square())


def policy_objective(
    config: RlConfig,
    *,
    num_tokens: float,
    counts: GlobalCounts,
    balance: BalanceConfig,
    max_logits: MaxLogits = MaxLogits.unmeasured,
) -> Objective:
    """Return the objective of an RL step; `num_tokens` counts the sampled tokens of the step on all ranks.

    With `BalanceLosses.model` the losses of `balance` are added: means over all tokens of the step's trajectories, the
    prompts and observations included, since those are routed too.
    """

    def objective(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        assert batch.advantages_BT is not None and batch.logprobs_BT is not None
        output = model(
            batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT, max_logits=max_logits
        )
        predicted = token_logprobs(model, output.hidden_BTD, batch=batch)
        sampled_N = batch.logprobs_BT[batch.loss_mask_BT]
        terms_N = policy_terms(
            predicted.logprobs_N,
            sampled_N=sampled_N,
            advantages_N=batch.advantages_BT[batch.loss_mask_BT],
            config=config,
        )
        gap_N = (predicted.logprobs_N.detach() - sampled_N).abs()
        ratio_N = (predicted.logprobs_N.detach() - sampled_N).exp()
        outside_N = (ratio_N < config.ratio_low) | (ratio_N > config.ratio_high)
        metrics = {
            "logprob_gap": gap_N.sum(),
            "outside_window": outside_N.sum(),
            "entropy": predicted.entropies_N.sum(),
            "trained_tokens": torch.tensor(float(gap_N.numel()), device=gap_N.device),
            **router_entropies(
                output,
                layers=[name for name, _ in model.moe_layers()],
                num_tokens=batch.num_tokens,
                counts=counts,
            ),
        }
        loss = terms_N.sum() / num_tokens
        if config.balance_losses is BalanceLosses.model:
            terms = balance_terms(output, counts=counts, model=model.config, balance=balance)
            loss, metrics = loss + terms.loss, {**metrics, **terms.metrics}
        return ObjectiveResult(
            loss=loss,
            counts_LE=output.counts_LE,
            required_LEB=output.required_LEB,
            metrics=metrics,
            max_logits_AH=output.max_logits_AH,
        )

    return objective
