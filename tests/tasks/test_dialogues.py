"""Demonstrations of environments that fail now and then."""

import asyncio

import pytest

from moetrain.chat.messages import Message, Role
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.errors import DataError
from moetrain.eval.runner import check_graders
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.dialogues import demonstration, dialogue_texts
from moetrain.tasks.protocol import Grade
from tests.even_task import EvenFamily


class Unreliable(EvenFamily):
    """A family whose demonstrations fail for two tasks of three, or for all."""

    def __init__(self, *, every: int) -> None:
        self.every = every
        self.num_made = 0

    def demonstrate(self, task: object, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        self.num_made += 1
        if self.num_made % self.every:
            raise ConnectionError("no free container")
        return [Message(role=Role.user, content="hello")], Grade(reward=1.0, reason="right")


def test_demonstrations_that_fail_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(dialogue_texts(Unreliable(every=3), template=KIMI_K2, count=9, seed=0))) == 3
    assert "6 of 9 demonstrations failed and are left out; last error: ConnectionError: no free" in caplog.text


def test_a_family_none_of_whose_demonstrations_can_be_made_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 4 demonstrations of Unreliable could be made: ConnectionError"):
        list(dialogue_texts(Unreliable(every=100), template=KIMI_K2, count=4, seed=0))


class Slow(EvenFamily):
    """A family whose demonstrator awaits its tools."""

    async def demonstrate(self, task: object, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        await asyncio.sleep(0)
        return [Message(role=Role.user, content="hello")], Grade(reward=float(perfect), reason="right")


def test_a_demonstrator_may_be_a_coroutine() -> None:
    assert len(list(dialogue_texts(Slow(), template=KIMI_K2, count=3, seed=0))) == 3
    assert demonstration(Slow(), None, stream=0, perfect=True)[1].success
    rates = check_graders(Slow(), first_task=0, num_tasks=2, seed=0, config=RolloutConfig())
    assert rates["perfect_demonstrator"] == 1.0
