"""The learning rate at its corners."""

import pytest

from moetrain.optim.config import ScheduleConfig, ScheduleName
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
