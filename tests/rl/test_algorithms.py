"""RL algorithms against their formulas."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.algorithms.rejection import Rejection
from moetrain.rl.config import RlConfig
from moetrain.rl.protocol import Algorithm, Normalizer
from moetrain.rl.registry import build, register, registered
from tests.rl.trajectories import draw_trajectory, segment_of


def _gradient(algorithm: K25, *, log_ratio: float, advantage: float) -> float:
    logprob = torch.tensor([log_ratio - 1.0], requires_grad=True)
    columns = {"advantage": torch.tensor([advantage]), "logprob": torch.tensor([-1.0])}
    algorithm.token_loss(logprob, columns=columns).loss_N.sum().backward()
    assert logprob.grad is not None
    return float(logprob.grad)


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    assert _gradient(K25(tau=0.5), log_ratio=0.0, advantage=0.7) == pytest.approx(-0.7)


def test_a_token_outside_the_window_has_no_policy_gradient_whatever_the_sign() -> None:
    algorithm = K25(tau=0.0)
    for log_ratio in (math.log(2.5), math.log(0.4)):
        assert _gradient(algorithm, log_ratio=log_ratio, advantage=1.0) == 0.0
        assert _gradient(algorithm, log_ratio=log_ratio, advantage=-1.0) == 0.0
    assert _gradient(algorithm, log_ratio=math.log(1.5), advantage=1.0) == pytest.approx(-1.5)


def test_tau_pulls_the_policy_back_to_where_it_sampled() -> None:
    assert _gradient(K25(tau=0.25), log_ratio=0.3, advantage=0.0) == pytest.approx(2 * 0.25 * 0.3, rel=1e-5)


def test_tokens_outside_the_window_are_counted() -> None:
    columns = {"advantage": torch.ones(3), "logprob": torch.tensor([0.0, -1.0, -5.0])}
    sums = K25().token_loss(torch.tensor([-1.0, -1.0, -1.0]), columns=columns).sums
    assert int(sums["outside_window"]) == 2


def test_rejection_is_the_likelihood_of_the_solved_trajectories() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    Rejection().token_loss(logprobs_N, columns={"advantage": torch.tensor([1.0, 0.0])}).loss_N.sum().backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [-1.0, 0.0]
    assert Rejection.normalizer is Normalizer.trained_tokens


def test_advantages_are_centred_and_not_scaled_and_every_segment_shares_them() -> None:
    group = [draw_trajectory([segment_of(3), segment_of(4)], reward=reward) for reward in (1.0, 0.25, 0.25, 0.5)]
    first, second, _, last = K25().advantages(group)
    assert first == [[0.5] * 3, [0.5] * 4]
    assert second == [[-0.25] * 3, [-0.25] * 4]
    assert last == [[0.0] * 3, [0.0] * 4]
    solved = Rejection().advantages(group)
    assert [per_segment[0][0] for per_segment in solved] == [1.0, 0.0, 0.0, 0.0]


def test_an_algorithm_is_built_with_its_options() -> None:
    algorithm = build(RlConfig(options={"tau": 0.125}))
    assert isinstance(algorithm, K25)
    assert (algorithm.tau, algorithm.ratio_high) == (0.125, 2.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RlConfig(algorithm="ppo"), r"rl\.algorithm is ppo: give one of .*k2_5, .*rejection"),
        (
            RlConfig(options={"beta": 1.0}),
            r"rl\.options\.beta: rl\.algorithm=k2_5 has the options ratio_low, ratio_high",
        ),
        (RlConfig(algorithm="rejection", options={"tau": 1.0}), r"rl\.options\.tau: .* has no options"),
        (RlConfig(options={"tau": -1.0}), r"rl\.options\.tau is -1"),
        (RlConfig(options={"tau": math.nan}), r"rl\.options\.tau is nan"),
        (RlConfig(options={"ratio_low": 1.5}), r"rl\.options\.ratio_low and ratio_high are 1\.5 and 2\.0"),
    ],
)
def test_what_is_no_algorithm_or_option_is_refused(config: RlConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config)


@dataclass(kw_only=True)
class _Own(Rejection):
    width: int
    is_soft: bool = False
    columns: Any = field(default=("advantage",), init=False)
    normalizer: Any = field(default=Normalizer.trajectories, init=False)

    def __post_init__(self) -> None:
        if self.width > 9:
            raise KeyError("width")
        if self.width == 9:
            self.normalizer = "sequences"
        if self.width == 8:
            self.columns = ("advantage", "length")
        if self.width == 7:
            self.columns = "advantage"


def test_the_options_of_a_plugins_algorithm_have_the_types_of_its_fields() -> None:
    register("own", _Own)

    def made(**options: object) -> Algorithm:
        return build(RlConfig(algorithm="own", options=options))

    own = made(width=2, is_soft=True)
    assert isinstance(own, _Own) and own.width == 2 and own.is_soft is True
    options: dict[str, object]
    for options, message in [
        ({}, r"rl\.options\.width is missing: rl\.algorithm=own requires it"),
        ({"width": 1.5}, r"rl\.options\.width is 1\.5: give a value of type int"),
        ({"width": 1, "is_soft": 0}, r"rl\.options\.is_soft is 0: give a value of type bool"),
        ({"width": 10}, r"rl\.options: rl\.algorithm=own cannot be constructed: KeyError: 'width'"),
        ({"width": 1, "columns": 3}, r"rl\.options\.columns: rl\.algorithm=own has the options width, is_soft$"),
        ({"width": 9}, r"normalizer 'sequences': give one of sampled_tokens, trained_tokens, trajectories"),
        ({"width": 8}, r"column 'length': give one of advantage"),
        ({"width": 7}, r"has the columns 'advantage': give a tuple, such as \('advantage',\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made(**options)


@dataclass(kw_only=True)
class _Half:
    columns = ()

    def advantages(self) -> None:
        """Return nothing."""


def test_an_algorithm_of_moetrain_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="registers the RL algorithm k2_5, which moetrain has: give another name"):
        register("k2_5", _Own)
    assert registered()["k2_5"] is K25


def test_a_class_that_is_no_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"RL algorithm plain is <class .*>: give a class with @dataclass"):
        register("plain", object)  # type: ignore[arg-type]
    register("half", _Half)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"rl\.algorithm=half has no normalizer: an algorithm has columns, normalizer"
    ):
        build(RlConfig(algorithm="half"))
