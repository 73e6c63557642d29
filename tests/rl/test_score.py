"""Which trajectories of a step are trained on, and what the metrics say of the others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moetrain.errors import ConfigError
from moetrain.rl.advantage import constant
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.algorithms.rejection import Rejection
from moetrain.rl.metrics import rollout_metrics
from moetrain.rl.score import score
from moetrain.rollout.types import UNSCORED, Ending, Segment, Trajectory
from moetrain.tasks.protocol import Grade
from tests.rl.trajectories import draw_trajectory, segment_of


def _trajectory(
    reward: float, *, ending: Ending = Ending.answered, parts: dict[str, float] | None = None
) -> Trajectory:
    trajectory = draw_trajectory([segment_of(10)], reward=reward, ending=ending)
    return replace(trajectory, grade=Grade(reward=reward, reason="graded", parts=parts or {}))


@pytest.mark.parametrize("ending", sorted(UNSCORED))
def test_a_failure_of_the_infrastructure_is_no_wrong_answer(ending: Ending) -> None:
    """It is in neither the baseline, the update, the divisor nor the reward."""
    group = [_trajectory(1.0), _trajectory(0.0), _trajectory(1.0)]
    failed = _trajectory(0.0, ending=ending)
    without, with_failure = score([group], K25()), score([[*group, failed]], K25())
    assert [row.advantages[0] for row in without.rows] == [row.advantages[0] for row in with_failure.rows]
    assert without.divisor == with_failure.divisor
    values = rollout_metrics([[*group, failed]])
    assert values["reward"] == pytest.approx(2 / 3)
    assert values["unscored"] == 0.25
    assert values[f"ending/{ending.value}"] == 0.25


def test_a_group_with_one_scored_member_has_no_update() -> None:
    alone = [_trajectory(1.0), _trajectory(0.0, ending=Ending.environment_failed)]
    for algorithm in (K25(), Rejection()):
        scored = score([alone, [_trajectory(1.0), _trajectory(0.0)]], algorithm)
        assert scored.num_small_groups == 1
        assert {row.trajectory_id for row in scored.rows} <= {0, 1}
        assert len(scored.rows) == (2 if isinstance(algorithm, K25) else 1)


def test_a_step_of_failures_has_no_reward_and_no_rows() -> None:
    failed = [[_trajectory(0.0, ending=Ending.max_seconds)] * 2]
    assert score(failed, K25()).rows == []
    values = rollout_metrics(failed)
    assert "reward" not in values
    assert values["unscored"] == 1.0


def test_what_the_losses_are_divided_by() -> None:
    groups = [[_trajectory(1.0), _trajectory(0.0)], [_trajectory(1.0), _trajectory(1.0)]]
    assert score(groups, K25()).divisor == 12.0  # three sampled tokens each, those without an advantage included
    assert score([[_trajectory(1.0), _trajectory(0.0)]], Rejection()).divisor == 3.0


def test_rewards_are_numbers_with_parts_and_success_is_a_threshold() -> None:
    group = [_trajectory(0.5, parts={"format": 0.5}), _trajectory(1.5, parts={"format": 0.5, "rows": 1.0})]
    values = rollout_metrics([group])
    assert (values["reward"], values["success"]) == (1.0, 0.5)
    assert (values["reward/format"], values["reward/rows"]) == (0.5, 1.0)
    assert Grade(reward=0.5, reason="half", threshold=0.5).success
    with pytest.raises(ValueError, match="give a number from -1e9 to 1e9"):
        Grade(reward=float("nan"), reason="broken")


def test_a_grader_may_say_success_in_place_of_a_reward() -> None:
    assert (Grade(success=True, reason="right").reward, Grade(success=False, reason="wrong").reward) == (1.0, 0.0)
    for both_or_neither in ({}, {"reward": 1.0, "success": True}):
        with pytest.raises(ValueError, match="give one of the two"):
            Grade(reason="x", **both_or_neither)


def _turns(ending: Ending) -> Trajectory:
    """Return a trajectory of two turns of two sampled tokens, with an observation between them."""
    segment = Segment(
        tokens=list(range(8)),
        is_sampled=[False, False, True, True, False, False, True, True],
        logprobs=[0.0] * 8,
        versions=[0] * 8,
        temperature=1.0,
    )
    return draw_trajectory([segment], reward=0.0, ending=ending)


@pytest.mark.parametrize("ending", [Ending.invalid_turn, Ending.turn_too_long])
def test_a_malformed_turn_alone_is_penalised(ending: Ending) -> None:
    group = [_turns(ending), _turns(Ending.answered)]
    assert score([group], K25()).rows == []  # equal rewards have no advantage
    (row,) = score([group], K25(), malformed_penalty=0.5).rows
    assert list(row.advantages) == [0.0] * 6 + [-0.5] * 2


def test_a_malformed_turn_that_a_segment_ends_within_is_penalised_whole() -> None:
    whole = _turns(Ending.invalid_turn)
    (segment,) = whole.segments
    cut = [
        replace(
            segment, **{name: getattr(segment, name)[:7] for name in ("tokens", "is_sampled", "logprobs", "versions")}
        ),
        replace(segment, is_sampled=[False] * 7 + [True]),
    ]
    others = [_turns(Ending.answered)]
    rows = score([[replace(whole, segments=cut), *others]], K25(), malformed_penalty=0.5).rows
    assert [list(row.advantages) for row in rows] == [[0.0] * 6 + [-0.5], [0.0] * 7 + [-0.5]]


def test_another_ending_is_not_penalised() -> None:
    group = [_turns(Ending.stalled), _turns(Ending.max_turns)]
    assert score([group], K25(), malformed_penalty=0.5).rows == []


@pytest.mark.parametrize("advantages", [[0.5, -0.5], [[0.5], [-0.5]], [[[0.5]], [[-0.5]]], []])
def test_advantages_that_are_not_one_number_per_token_are_refused(advantages: Any) -> None:
    class Wrong(K25):
        def advantages(self, group_G: object) -> Any:
            return advantages

    with pytest.raises(ConfigError, match=r"Wrong\.advantages does not return one number per token"):
        score([[_trajectory(1.0), _trajectory(0.0)]], Wrong())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None])
def test_advantages_that_are_no_finite_numbers_are_refused(bad: Any) -> None:
    class Wrong(K25):
        def advantages(self, group_G: Sequence[Trajectory]) -> Any:
            return [constant(trajectory, bad) for trajectory in group_G]

    with pytest.raises(ConfigError, match=rf"Wrong\.advantages returns {bad!r}: return finite numbers"):
        score([[_trajectory(1.0), _trajectory(0.0)]], Wrong(), malformed_penalty=1.0)
