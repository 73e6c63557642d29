import math

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.rl.advantage import group_advantages
from moetrain.rl.batch import Scored, micro_batches
from moetrain.rl.config import Algorithm, BalanceLosses, RlConfig
from moetrain.rl.loss import policy_objective, policy_terms
from moetrain.rollout.types import Ending, Trajectory
from moetrain.tasks.protocol import Grade
from moetrain.train.loss import GlobalCounts, balance_terms


def _gradient(log_ratio: float, advantage: float, config: RlConfig) -> float:
    logprob = torch.tensor([log_ratio - 1.0], requires_grad=True)
    terms = policy_terms(logprob, sampled_N=torch.tensor([-1.0]), advantages_N=torch.tensor([advantage]), config=config)
    terms.sum().backward()
    assert logprob.grad is not None
    return float(logprob.grad)


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    config = RlConfig(tau=0.5)
    assert _gradient(0.0, 0.7, config) == pytest.approx(-0.7)


def test_a_token_outside_the_window_has_no_policy_gradient_whatever_the_sign() -> None:
    config = RlConfig(tau=0.0)
    for log_ratio in (math.log(2.5), math.log(0.4)):
        assert _gradient(log_ratio, 1.0, config) == 0.0 == _gradient(log_ratio, -1.0, config)
    assert _gradient(math.log(1.5), 1.0, config) == pytest.approx(-1.5)


def test_tau_pulls_the_policy_back_to_where_it_sampled() -> None:
    config = RlConfig(tau=0.25)
    assert _gradient(0.3, 0.0, config) == pytest.approx(2 * 0.25 * 0.3, rel=1e-5)


def test_advantages_are_centred_and_not_scaled() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], Algorithm.policy) == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1.0, 1.0], Algorithm.policy) == [0.0, 0.0]
    assert group_advantages([1.0, 0.0], Algorithm.rejection) == [1.0, 0.0]


def _scored(length: int, advantage: float) -> Scored:
    trajectory = Trajectory(
        task=0,
        sample=0,
        num_calls_needed=2,
        tokens=list(range(1, length + 1)),
        is_sampled=[False] * (length - 3) + [True] * 3,
        logprobs=[0.0] * (length - 3) + [-0.5] * 3,
        grade=Grade(success=advantage > 0, reason="right"),
        ending=Ending.answered,
        num_turns=1,
        num_calls=0,
        num_errors=0,
        num_transient_errors=0,
        version=0,
    )
    return Scored(trajectory=trajectory, advantage=advantage)


def test_micro_batches_hold_every_trajectory_that_has_an_advantage_once_and_whole() -> None:
    scored = [_scored(length, advantage) for length in (10, 70, 130, 500) for advantage in (0.5, 0.0, -0.5)]
    batches = micro_batches(scored, max_tokens=2048, pad_id=0)
    lengths = sorted(int(row.sum()) for batch in batches for row in (batch.segments_BT > 0) if row.any())
    assert lengths == [10, 10, 70, 70, 130, 130, 500, 500]
    assert all(batch.tokens_BT.numel() <= 2048 or len(batch.tokens_BT) == 4 for batch in batches)
    assert sum(batch.num_targets for batch in batches) == 8 * 3


def test_only_sampled_tokens_are_trained_on_with_their_own_numbers() -> None:
    (batch,) = micro_batches([_scored(10, 0.5)], max_tokens=2048, pad_id=0)
    assert batch.advantages_BT is not None and batch.logprobs_BT is not None
    assert batch.loss_mask_BT[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert batch.logprobs_BT[0, 7:10].tolist() == [-0.5] * 3
    assert batch.advantages_BT[0, :10].tolist() == [0.5] * 10


def test_balance_losses_are_part_of_the_objective_only_where_they_are_asked_for() -> None:
    balance = BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
    model = Transformer(ModelConfig(num_layers=2, balance=balance), compute_dtype=torch.float32)
    initialize(model, 0)
    (batch,) = micro_batches([_scored(10, 0.5), _scored(30, -0.5)], max_tokens=2048, pad_id=0)
    counts = GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=1.0)
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    terms = balance_terms(output, counts=counts, model=model.config, balance=balance)
    alone, added = (
        policy_objective(RlConfig(balance_losses=losses), num_tokens=6.0, counts=counts, balance=balance)(model, batch)
        for losses in (BalanceLosses.none, BalanceLosses.model)
    )
    assert terms.loss.item() > 0.1
    assert added.loss.item() == pytest.approx(alone.loss.item() + terms.loss.item(), rel=1e-5)
    assert added.metrics.keys() - alone.metrics.keys() == {"balance_loss", "global_balance_loss", "z_loss"}
    for result in (alone, added):  # the bias moves in either case
        assert torch.equal(result.counts_LE, output.counts_LE)
        assert torch.equal(result.required_LEB, output.required_LEB)
        assert int(result.required_LEB[0, 0].sum()) == batch.num_tokens


def test_what_the_objective_tells_lies_on_the_device_of_the_batch() -> None:
    model = Transformer(ModelConfig(num_layers=2), compute_dtype=torch.float32)
    initialize(model, 0)
    (batch,) = micro_batches([_scored(10, 0.5), _scored(30, -0.5)], max_tokens=2048, pad_id=0)
    counts = GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=1.0)
    objective = policy_objective(RlConfig(), num_tokens=6.0, counts=counts, balance=model.config.balance)
    objective(model, batch)  # makes the table of rotations, which then stays
    with torch.device("meta"):  # where a tensor goes that is given no device
        metrics = objective(model, batch).metrics
    assert {name: value.device.type for name, value in metrics.items()} == dict.fromkeys(metrics, "cpu")
    assert metrics["trained_tokens"].item() == 6.0


@pytest.mark.parametrize(
    ("field", "value"), [("group_size", 1), ("tasks_per_step", 0), ("ratio_low", 1.5), ("ratio_high", 0.9), ("tau", -1)]
)
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"rl\.{field}"):
        RlConfig(**{field: value})  # type: ignore[arg-type]
