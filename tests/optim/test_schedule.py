"""The learning rate at its corners."""

import math

import pytest

from moetrain.errors import ConfigError
from moetrain.optim.config import DecayShape, ScheduleConfig, ScheduleName
from moetrain.optim.schedule import learning_rate


def test_warmup_is_linear_and_its_last_step_is_the_peak() -> None:
    schedule = ScheduleConfig(warmup_steps=4)
    rates = [learning_rate(step, 100, lr=2.0, schedule=schedule) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_wsd_is_flat_then_linear_down_to_the_final_ratio() -> None:
    schedule = ScheduleConfig(warmup_steps=0, decay_fraction=0.5, final_ratio=0.1)
    rates = [learning_rate(step, 10, lr=1.0, schedule=schedule) for step in range(10)]
    assert rates[:5] == [1.0] * 5
    assert rates[5:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_wsd_without_decay_stays_at_the_peak() -> None:
    schedule = ScheduleConfig(warmup_steps=0, decay_fraction=0.0)
    assert learning_rate(9, 10, lr=1.0, schedule=schedule) == 1.0


def test_cosine_ends_at_the_final_ratio_and_constant_at_the_peak() -> None:
    cosine = ScheduleConfig(name=ScheduleName.cosine, warmup_steps=2, final_ratio=0.1)
    assert learning_rate(1, 10, lr=1.0, schedule=cosine) == 1.0
    assert learning_rate(5, 10, lr=1.0, schedule=cosine) == pytest.approx(0.55)
    assert learning_rate(9, 10, lr=1.0, schedule=cosine) == pytest.approx(0.1)
    constant = ScheduleConfig(name=ScheduleName.constant, warmup_steps=2)
    assert learning_rate(9, 10, lr=1.0, schedule=constant) == 1.0


def test_wsd_decays_by_a_cosine_as_kimi_k2_does() -> None:
    # 15.5T tokens at 67.1M a step: 10T flat at 2e-4, 5.5T down to a tenth (arXiv 2507.20534, section 2.5)
    total, flat = 2310, 1490
    schedule = ScheduleConfig(
        warmup_steps=5, decay_fraction=1 - flat / total, decay_shape=DecayShape.cosine, final_ratio=0.1
    )
    rates = [learning_rate(step, total, lr=2e-4, schedule=schedule) for step in range(total)]
    assert rates[5:flat] == [2e-4] * (flat - 5)
    for step in (flat, 1700, 1900, total - 1):
        progress = (step + 1 - flat) / (total - flat)
        assert rates[step] == pytest.approx(2e-5 + 1.8e-4 * (1 + math.cos(math.pi * progress)) / 2)
    assert rates[-1] == pytest.approx(2e-5)


def test_a_cooldown_warms_up_again_from_where_the_rate_was() -> None:
    # Moonlight (arXiv 2502.16982, section 2.4): from 4.2e-5 up to 1e-4 in 100 steps, then linearly to 0
    schedule = ScheduleConfig(warmup_steps=100, initial_ratio=0.42, decay_fraction=0.9, final_ratio=0.0)
    rates = [learning_rate(step, 1000, lr=1e-4, schedule=schedule) for step in range(1000)]
    assert rates[0] == pytest.approx(4.258e-5)
    assert rates[99] == 1e-4
    assert rates[549] == pytest.approx(5e-5)
    assert rates[999] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["initial_ratio", "decay_fraction", "final_ratio"])
def test_a_ratio_beyond_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.schedule.{name} is 1.5: give a share"):
        ScheduleConfig(**{name: 1.5})
