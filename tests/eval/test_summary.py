"""Trajectories of a mode as rates: what the infrastructure ended is no wrong answer."""

from dataclasses import replace

import pytest

from moetrain.errors import RolloutError
from moetrain.eval.summary import check_scored, summarize
from moetrain.rollout.types import Ending
from moetrain.tasks.protocol import Grade
from tests.report.nano_run import trajectory


def test_unscored_trajectories_are_left_out_of_rates_and_counted_apart() -> None:
    right, wrong = trajectory(0, success=True), trajectory(1, success=False)
    failed = replace(trajectory(2, success=False), ending=Ending.environment_failed)
    summary = summarize([right, wrong, failed])
    assert (summary["all"]["count"], summary["all"]["value"], summary["unscored"]) == (2, 0.5, 1)
    assert summary["by_calls"]["2"]["count"] == 2
    assert summary["outcomes"] == {"0/2": True, "1/2": False}
    assert summary["endings"] == {"answered": 2, "environment_failed": 1}


def test_the_mean_reward_and_its_parts_are_reported() -> None:
    grades = [
        Grade(reward=0.5, parts={"format": 1.0}, reason="a"),
        Grade(reward=1.0, parts={"format": 0.0}, reason="b"),
    ]
    summary = summarize([replace(trajectory(0, success=True), grade=grade) for grade in grades])
    assert (summary["reward"], summary["reward_parts"]) == (0.75, {"format": 0.5})
    assert summarize([])["reward"] is None


def test_an_evaluation_without_a_scored_trajectory_is_an_error() -> None:
    right = trajectory(0, success=True)
    failed = replace(right, ending=Ending.environment_failed)
    check_scored({"modes": {"greedy": summarize([failed]), "sampled": summarize([right])}})
    with pytest.raises(RolloutError, match=r"no trajectory could be scored \(environment_failed 2\)"):
        check_scored({"modes": {"greedy": summarize([failed]), "sampled": summarize([failed])}})
    long = replace(right, ending=Ending.prompt_too_long)
    with pytest.raises(RolloutError, match=r"\(prompt_too_long 1\): the prompts leave no room .* rollout.max_tokens"):
        check_scored({"modes": {"greedy": summarize([long])}})
