"""What a task family's own grader says of a policy that does nothing and of the demonstrator."""

from typing import Any

import pytest

from moetrain.chat.messages import Message
from moetrain.eval.runner import check_graders
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.protocol import Grade, Split
from tests.even_task import EvenFamily, EvenTask

CONFIG = RolloutConfig()


class Unreliable(EvenFamily):
    """A family whose demonstrator fails for every second task, or for all."""

    def __init__(self, *, works_at: int) -> None:
        self.works_at = works_at
        self.num_made = 0

    def demonstrate(self, task: object, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        self.num_made += 1
        if self.num_made % self.works_at:
            raise ConnectionError("no free container")
        return [], Grade(reward=1.0, reason="right")


def test_a_demonstrator_that_fails_is_left_out_of_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    found = check_graders(Unreliable(works_at=2), first_task=0, num_tasks=6, seed=0, config=CONFIG)
    assert found["perfect_demonstrator"] == 1.0
    assert "graders: the demonstrator failed: ConnectionError: no free container" in caplog.text


def test_a_demonstrator_that_always_fails_has_no_rate() -> None:
    found = check_graders(Unreliable(works_at=100), first_task=0, num_tasks=3, seed=0, config=CONFIG)
    assert "perfect_demonstrator" not in found


class Patchy(EvenFamily):
    """A family that cannot make every second task."""

    def task(self, split: Split, index: int) -> EvenTask:
        if index % 2:
            raise FileNotFoundError(f"question {index}")
        return super().task(split, index)


def test_a_task_that_cannot_be_made_is_left_out_of_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    assert check_graders(Patchy(), first_task=0, num_tasks=6, seed=0, config=CONFIG)["num_tasks"] == 3
    assert "making the task: FileNotFoundError: question 5" in caplog.text


def test_a_grader_that_an_empty_answer_satisfies_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    found = check_graders(EvenFamily(), first_task=0, num_tasks=3, seed=0, config=CONFIG)
    assert found["null_policy"] == 1.0  # an empty answer has an even length
    assert "graders: an empty answer solves 100 % of 3 tasks" in caplog.text


class Wrong(EvenFamily):
    """A family whose demonstrator returns a number where a grade belongs, or does not solve its tasks."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def demonstrate(self, task: object, stream: int, *, perfect: bool = False) -> Any:
        return self.returned


def test_after_tasks_in_a_row_that_fail_the_others_are_not_tried(caplog: pytest.LogCaptureFixture) -> None:
    found = check_graders(Unreliable(works_at=100), first_task=0, num_tasks=40, seed=0, config=CONFIG)
    assert "perfect_demonstrator" not in found and caplog.text.count("graders: the demonstrator failed") == 5
    assert "5 tasks in a row failed: the others are not tried" in caplog.text


def test_a_demonstrator_that_solves_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    wrong = Wrong(([], Grade(reward=0.0, reason="wrong")))
    found = check_graders(wrong, first_task=0, num_tasks=3, seed=0, config=CONFIG)
    assert found["perfect_demonstrator"] == 0.0
    assert "graders: the demonstrator without mistakes solves only 0 %" in caplog.text


@pytest.mark.parametrize("returned", [None, ([], 1.0), [[], Grade(reward=1.0, reason="right")]])
def test_a_demonstrator_that_returns_no_grade_is_one_that_fails(
    returned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = check_graders(Wrong(returned), first_task=0, num_tasks=3, seed=0, config=CONFIG)
    assert "perfect_demonstrator" not in found
    assert "does not return a list of messages and a Grade" in caplog.text
