"""Rows a step, mixes and the balance rate as pure functions of the step, and what is refused."""

import pytest

from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.train.config import DocumentTrainConfig, RampConfig

RAMP = [RampConfig(steps=3, rows=2), RampConfig(steps=2, rows=4)]


def test_the_rows_of_a_ramp_are_a_function_of_the_step() -> None:
    train = DocumentTrainConfig(steps=8, rows_per_step=8, rows_per_micro_batch=2, batch_ramp=RAMP)
    assert [train.rows_before(step) for step in range(9)] == [0, 2, 4, 6, 10, 14, 22, 30, 38]
    assert train.most_rows == 8


def test_without_a_ramp_every_step_has_the_same_rows() -> None:
    train = DocumentTrainConfig(steps=8, rows_per_step=6, rows_per_micro_batch=3)
    assert [train.rows_before(step) for step in (0, 1, 8)] == [0, 6, 48]


def test_the_balance_bias_stands_still_in_the_last_share_of_the_steps_whatever_its_rule() -> None:
    for rule in (BiasRule.sign, BiasRule.centred, BiasRule.quantile):
        balance = BalanceConfig(bias_rule=rule, bias_rate=0.5, bias_still_share=0.3)
        assert [balance.at(step, steps=10).bias_rate for step in range(10)] == [0.5] * 7 + [0.0] * 3
        assert balance.at(7, steps=10).bias_rule is BiasRule.none
    assert BalanceConfig().at(9, steps=10) == BalanceConfig()


SETTINGS = [
    "model=k2_nano_test",
    "data=test",
    "train.steps=10",
    "train.rows_per_step=8",
    "train.rows_per_micro_batch=4",
]


def test_a_ramp_and_a_mix_can_be_given_on_the_command_line() -> None:
    ramp = "train.batch_ramp=[{steps: 2, rows: 4}, {steps: 3, rows: 8}]"
    mix = "data.mix=[{from_share: 0.5, weights: {english: 0.9}}, {from_step: 8, weights: {dialogues: 0, english: 1}}]"
    run = compose("pretrain", [*SETTINGS, ramp, mix])
    assert run.train.batch_ramp == [RampConfig(steps=2, rows=4), RampConfig(steps=3, rows=8)]
    assert [change.first_step(10) for change in run.data.mix] == [5, 8]
    assert run.data.mix_weights() == [
        {"english": 0.5, "dialogues": 0.5},
        {"english": 0.9, "dialogues": 0.5},
        {"english": 1.0, "dialogues": 0.0},
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "train.batch_ramp=[{steps: 2, rows: 6}]",
            "batch_ramp: rows is 6: give a multiple of train.rows_per_micro_batch",
        ),
        ("train.batch_ramp=[{steps: 11, rows: 4}]", "batch_ramp takes 11 steps, but train.steps is 10"),
        ("train.batch_ramp=[{steps: 0, rows: 4}]", "batch_ramp: steps is 0"),
        ("train.batch_ramp=[{steps: 2}]", "train.batch_ramp"),
        ("train.batch_ramp=[{steps: 2, row: 4}]", "row"),
        ("data.mix=[{weights: {english: 1}}]", "from_step is None and from_share is None"),
        ("data.mix=[{from_step: 10, weights: {english: 1}}]", "begins at step 10: give a step after 0 and before"),
        ("data.mix=[{from_share: 0.01, weights: {english: 1}}]", "begins at step 0"),
        ("data.mix=[{from_step: 0, weights: {english: 1}}]", "from_step is 0: give at least 1"),
        ("data.mix=[{from_step: 5}, {from_step: 5}]", r"data.mix\[1\] begins at step 5"),
        ("data.mix=[{from_step: 5, weights: {code: 1}}]", r"data.mix\[0\].weights names code: give one of"),
        ("data.mix=[{from_step: 5, weights: {english: -1}}]", "weight of english is -1"),
        ("data.mix=[{from_step: 5, weights: {english: 0, dialogues: 0}}]", "leaves no source with a weight above 0"),
        ("model.balance.bias_still_share=1.5", "bias_still_share is 1.5: give a share"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        compose("pretrain", [*SETTINGS, word])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "word",
    ["train.rows_per_step=8", "train.rows_per_micro_batch=1", "train.validate_every=1", "train.batch_ramp=[]"],
)
def test_rl_refuses_what_its_steps_do_not_have(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]) as raised:
        compose("rl", ["model=k2_nano_test", word])
    assert "\n" not in str(raised.value)
