"""Trajectories of a mode as rates: what the infrastructure ended is no wrong answer."""

from dataclasses import replace

from moetrain.eval.summary import summarize
from moetrain.rollout.types import Ending
from tests.report.nano_run import trajectory


def test_unscored_trajectories_are_left_out_of_rates_and_counted_apart() -> None:
    right, wrong = trajectory(0, success=True), trajectory(1, success=False)
    failed = replace(trajectory(2, success=False), ending=Ending.environment_failed)
    summary = summarize([right, wrong, failed])
    assert (summary["all"]["count"], summary["all"]["value"], summary["unscored"]) == (2, 0.5, 1)
    assert summary["by_calls"]["2"]["count"] == 2
    assert summary["outcomes"] == {"0/2": True, "1/2": False}
    assert summary["endings"] == {"answered": 2, "environment_failed": 1}
