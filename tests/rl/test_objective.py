"""The objective of an RL step: invariances, balance losses, temperature."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.inference.sampling import sample
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.protocol import ObjectiveResult
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.columns import Row, micro_batches
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.rl.loss import rl_objective
from moetrain.rl.protocol import TokenLoss
from moetrain.rollout.types import Segment
from moetrain.train.loss import GlobalCounts, balance_terms, token_logprobs
from tests.rl.trajectories import draw_trajectory, segment_of


def _batch(segments: list[Segment], advantages: list[float]) -> TokenBatch:
    rows = [
        Row(
            trajectory=draw_trajectory(segments),
            segment=segment,
            advantages=[advantage] * len(segment.tokens),
            trajectory_id=0,
        )
        for segment, advantage in zip(segments, advantages, strict=True)
    ]
    (batch,) = micro_batches(rows, columns=K25.columns, max_tokens=1 << 20, pad_id=0, rank=0, world_size=1)
    return batch


def _two() -> TokenBatch:
    return _batch([segment_of(10), segment_of(30)], [0.5, -0.5])


def _counts(batch: TokenBatch) -> GlobalCounts:
    return GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=1.0)


def _result(
    model: Transformer, batch: TokenBatch, *, losses: BalanceLosses = BalanceLosses.none, algorithm: K25 | None = None
) -> ObjectiveResult:
    objective = rl_objective(
        algorithm or K25(),
        divisor=6.0,
        counts=_counts(batch),
        balance=model.config.balance,
        balance_losses=losses,
    )
    return objective(model, batch)


def _model(balance: BalanceConfig | None = None) -> Transformer:
    model = Transformer(ModelConfig(num_layers=2, balance=balance or BalanceConfig()), compute_dtype=torch.float32)
    initialize(model, 0)
    return model


def test_balance_losses_are_part_of_the_objective_only_where_they_are_asked_for() -> None:
    balance = BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
    model, batch = _model(balance), _two()
    output = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    terms = balance_terms(output, counts=_counts(batch), model=model.config, balance=balance)
    alone, added = (_result(model, batch, losses=losses) for losses in (BalanceLosses.none, BalanceLosses.model))
    assert terms.loss.item() > 0.1
    assert added.loss.item() == pytest.approx(alone.loss.item() + terms.loss.item(), rel=1e-5)
    assert added.metrics.keys() - alone.metrics.keys() == {"balance_loss", "global_balance_loss", "z_loss"}
    for result in (alone, added):  # the bias moves in either case
        assert torch.equal(result.counts_LE, output.counts_LE)
        assert torch.equal(result.required_LEB, output.required_LEB)
        assert int(result.required_LEB[0, 0].sum()) == batch.num_tokens


def test_metrics_lie_on_the_device_of_the_batch() -> None:
    model, batch = _model(), _two()
    _result(model, batch)  # makes the table of rotations, which then stays
    with torch.device("meta"):  # where a tensor goes that is given no device
        metrics = _result(model, batch).metrics
    assert {name: value.device.type for name, value in metrics.items()} == dict.fromkeys(metrics, "cpu")
    assert metrics["trained_tokens"].item() == 6.0


def test_cutting_a_trajectory_into_finer_segments_changes_no_loss() -> None:
    """Two segments that repeat their context are one trajectory: the same sampled tokens after the same tokens."""
    model = _model()
    whole = segment_of(30, num_sampled=6)
    first = Segment(
        tokens=whole.tokens[:27],
        is_sampled=whole.is_sampled[:27],
        logprobs=whole.logprobs[:27],
        versions=whole.versions[:27],
        temperature=1.0,
    )
    second = Segment(
        tokens=whole.tokens,
        is_sampled=[False] * 27 + [True] * 3,
        logprobs=[0.0] * 27 + whole.logprobs[27:],
        versions=whole.versions,
        temperature=1.0,
    )
    one = _result(model, _batch([whole], [0.5]))
    cut = _result(model, _batch([first, second], [0.5, 0.5]))
    assert cut.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    for name in ("trained_tokens", "sum/logprob_gap", "sum/outside_window", "sum/entropy"):
        assert cut.metrics[name].item() == pytest.approx(one.metrics[name].item(), rel=1e-6), name


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 1.5])
def test_the_ratio_of_a_policy_to_itself_is_exactly_one_at_every_temperature(temperature: float) -> None:
    """Sampling and training read equal logits, so they give equal bits."""
    model, vocab = _model(), ModelConfig().vocab_size
    segment = segment_of(40, num_sampled=12)
    batch = _batch([segment], [0.5])
    hidden_BTD = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT).hidden_BTD
    row_N, column_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    logits_NV = model.lm_head(hidden_BTD[row_N, column_N - 1])
    drawn_N, sampled_N = sample(
        logits_NV.detach(),
        temperatures_B=torch.full((12,), temperature),
        uniforms_B=torch.linspace(0.01, 0.99, 12, dtype=torch.float64),
    )
    assert logits_NV.shape[1] == vocab
    tokens_BT = batch.tokens_BT.clone()
    tokens_BT[row_N, column_N] = drawn_N
    temperatures_N = torch.full((12,), temperature or 1.0)
    # The same hidden states, whatever was drawn: what is compared is the way from logits to log-probabilities.
    trained = token_logprobs(
        model, hidden_BTD, batch=TokenBatch(**{**vars(batch), "tokens_BT": tokens_BT}), temperatures_N=temperatures_N
    )
    ratio_N = (trained.logprobs_N - sampled_N).exp()
    assert torch.equal(ratio_N, torch.ones(12))


def test_the_temperature_of_each_token_reaches_the_loss() -> None:
    model = _model()
    segments = [segment_of(20, temperature=0.5), segment_of(20, temperature=2.0)]
    batch = _batch(segments, [1.0, 1.0])
    hidden_BTD = model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT).hidden_BTD
    row_N, column_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    logits_NV = model.logits(hidden_BTD[row_N, column_N - 1])
    temperatures_N = torch.tensor([0.5] * 3 + [2.0] * 3)
    expected_N = torch.log_softmax(logits_NV / temperatures_N[:, None], dim=-1)
    expected_N = expected_N.gather(1, batch.tokens_BT[row_N, column_N][:, None])[:, 0]
    result = _result(model, batch)
    assert result.metrics["sum/logprob_gap"].item() == pytest.approx(
        float((expected_N.detach() + 0.5).abs().sum()), rel=1e-5
    )


@pytest.mark.parametrize(("field", "value"), [("group_size", 1), ("tasks_per_step", 0), ("tokens_per_micro_batch", 0)])
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"rl\.{field}"):
        RlConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda loss_N: loss_N.mean(),
            r"Changed\.token_loss returns loss_N of shape \[\] for .* shape \[6\]",
        ),
        (lambda loss_N: loss_N[:1], r"of shape \[1\]"),
        (lambda loss_N: loss_N.detach(), "without a gradient"),
    ],
)
def test_a_loss_that_is_not_one_per_token_with_a_gradient_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    class Changed(K25):
        def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> TokenLoss:
            return TokenLoss(loss_N=change(super().token_loss(logprobs_N, columns=columns).loss_N))

    with pytest.raises(ConfigError, match=message):
        _result(_model(), _two(), algorithm=Changed())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: loss.loss_N, r"Changed\.token_loss returns Tensor: return TokenLoss"),
        (lambda loss: replace(loss, sums={"mine": 3.0}), r"has a sum 'mine' that is no scalar tensor"),
        (lambda loss: replace(loss, sums={"mine": torch.ones(2)}), r"has a sum 'mine' that is no scalar tensor"),
        (lambda loss: replace(loss, sums={"entropy": torch.ones(())}), r"has a sum 'entropy', which every RL step rep"),
    ],
)
def test_what_is_no_token_loss_is_refused(make: Callable[[TokenLoss], Any], message: str) -> None:
    class Changed(K25):
        def token_loss(self, logprobs_N: torch.Tensor, *, columns: Mapping[str, torch.Tensor]) -> Any:
            return make(super().token_loss(logprobs_N, columns=columns))

    with pytest.raises(ConfigError, match=message):
        _result(_model(), _two(), algorithm=Changed())
