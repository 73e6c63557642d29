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
    # 20 calls, 100 calls and none were right before the first error.
    assert found == {(0, 10): (1, 20), (10, 25): (1, 25), (25, 50): (0, 25), (50, 100): (0, 50)}


def test_the_rate_of_errors_is_that_of_a_slow_count() -> None:
    lives = [_life(300, share / 50, success=share == 50) for share in range(51)]
    for row in hazard(lives):
        high = row["to"] or 10**9
        reached = [life.progress * 300 for life in lives if life.progress is not None]
        failed = [life.progress * 300 for life in lives if life.progress is not None and not life.grade.success]
        calls = sum(sum(row["from"] <= call < high for call in range(round(end))) for end in reached)
        errors = sum(row["from"] <= end < high for end in failed)
        assert (row["successes"], row["count"]) == (errors, calls)
        assert row["value"] == pytest.approx(errors / calls) and row["low"] <= row["value"] <= row["high"]


def test_a_failure_after_the_last_posting_counts_at_the_last_call() -> None:
    (row,) = (row for row in hazard([_life(10, 1.0)]) if row["successes"])
    assert (row["from"], row["to"]) == (0, 10)


def test_trajectories_that_are_not_scored_or_measured_are_left_out() -> None:
    unscored = replace(_life(100, 0.5), ending=Ending.environment_failed)
    assert hazard([unscored, _life(100, None), replace(_life(100, 0.5), num_calls_needed=None)]) == []
