from dataclasses import replace

import pytest

from moetrain.eval.hazard import hazard
from moetrain.rollout.types import Ending, Trajectory
from tests.report.nano_run import trajectory


def _life(calls: int, progress: float | None, *, success: bool = False) -> Trajectory:
    return replace(trajectory(0, success=success, calls=calls), progress=progress)


def test_calls_before_the_first_error_are_counted_by_their_number() -> None:
    rows = hazard([_life(100, 0.2), _life(100, 1.0, success=True), _life(30, 0.0)])
    found = {(row["from"], row["to"]): (row["successes"], row["count"]) for row in rows}
    # 20 calls, 100 calls and none were right before the first error, which is a call too.
    assert found == {(0, 10): (1, 21), (10, 25): (1, 26), (25, 50): (0, 25), (50, 100): (0, 50)}


def test_the_rate_of_errors_is_that_of_a_slow_count() -> None:
    lives = [_life(300, share / 50, success=share == 50) for share in range(51)]
    for row in hazard(lives):
        high = row["to"] or 10**9
        right = [(round(300 * (life.progress or 0)), life.grade.success) for life in lives]
        failed = [end for end, success in right if not success]
        calls = sum(sum(row["from"] <= call < high for call in range(end + (not success))) for end, success in right)
        errors = sum(row["from"] <= end < high for end in failed)
        assert (row["successes"], row["count"]) == (errors, calls)
        assert row["value"] == pytest.approx(errors / calls) and row["low"] <= row["value"] <= row["high"]


def test_a_failure_after_the_last_posting_counts_at_the_last_call() -> None:
    (row,) = (row for row in hazard([_life(10, 1.0)]) if row["successes"])
    assert (row["from"], row["to"]) == (0, 10)


def test_trajectories_that_are_not_scored_or_measured_are_left_out() -> None:
    unscored = replace(_life(100, 0.5), ending=Ending.environment_failed)
    assert hazard([unscored, _life(100, None), replace(_life(100, 0.5), num_calls_needed=None)]) == []


def test_the_rate_is_that_of_independent_errors() -> None:
    """Of 1,000 trajectories that fail at each call with probability 0.1, as many as expected fail at each one."""
    lives, alive = [], 1000.0
    for call in range(10):
        failing = round(alive * 0.1)
        lives += [_life(10, call / 10)] * failing
        alive -= failing
    lives += [_life(10, 1.0, success=True)] * round(alive)
    (row,) = hazard(lives)
    assert row["value"] == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("ending", [Ending.max_turns, Ending.max_tokens, Ending.max_sampled_tokens])
def test_an_end_at_a_limit_is_no_error(ending: Ending) -> None:
    (row,) = hazard([replace(_life(16, 0.5), ending=ending)] * 3)
    assert (row["successes"], row["count"]) == (0, 24)
    erred = replace(_life(16, 0.5), ending=ending, has_erred=True)
    assert sum(row["successes"] for row in hazard([erred] * 3)) == 3
