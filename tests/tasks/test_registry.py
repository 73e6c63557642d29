"""What a plugin registers is checked before a stage starts."""

from collections.abc import Callable
from typing import Any

import pytest

from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import ConfigError
from moetrain.tasks.protocol import InlineTask
from moetrain.tasks.registry import check_family, register
from tests.even_task import EvenFamily
from tests.rollout.scripted import World, WorldFamily, WorldTask, play, words_tokenizer


def test_a_family_of_moetrain_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="registers the task family database, which moetrain has: give another name"):
        register("database", lambda config, seed: EvenFamily())


class _Task(WorldTask):
    @property
    def prompt(self) -> Any:
        return [{"role": "user", "content": "x"}]


class _Silent(WorldTask):
    @property
    def prompt(self) -> Any:
        return []


class _Negative(WorldTask):
    @property
    def num_calls(self) -> int:
        return -1


class _CountingTask(WorldTask):
    def num_calls(self) -> int:
        return 3


def _tool(name: str) -> ToolSpec:
    return ToolSpec(name=name, description="", parameters={"type": "object"})


def _family(**members: Any) -> Any:
    return type("Own", (WorldFamily,), members)(World)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _family(task=None), "Own has no method task: add it"),
        (lambda: _family(tools=lambda self: []), "Own.tools is a method: give a property that returns a list of"),
        (lambda: _family(tools=[{"name": "look"}]), "Own.tools is a list of dict: give a property"),
        (lambda: _family(tools=[_tool("search web")]), "Own.tools has the name 'search web': give text without spaces"),
        (lambda: _family(tools=[_tool("ns:search")]), "Own.tools has the name 'ns:search': give text without spaces"),
        (lambda: _family(tools=[_tool("")]), "Own.tools has the name '': give text without spaces and colons"),
        (
            lambda: _family(tools=[_tool("find"), _tool("find")]),
            "Own.tools has the name find twice: give each tool its",
        ),
        (
            lambda: _family(task_of_length=lambda self, split, index: None, trained_calls=7),
            "Own.trained_calls is int: give a property that returns",
        ),
        (lambda: _family(task=lambda self: None), "Own: its first task cannot be made: TypeError: .*positional"),
        (lambda: _family(task=lambda self, split, index: _Task(make=World)), "whose prompt is a list of dict: give a"),
        (lambda: _family(task=lambda self, split, index: _Silent(make=World)), "whose prompt is empty: give a"),
        (lambda: _family(task=lambda self, split, index: _Negative(make=World)), "whose num_calls is -1: give a"),
        (lambda: _family(task=lambda self, split, index: object()), "AttributeError: 'object' object has no attribute"),
        (lambda: _family(task=lambda self, split, index: _CountingTask(make=World)), "whose num_calls is a method"),
    ],
)
def test_a_family_with_a_wrong_member_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_family(make(), name="own")


def test_a_task_that_cannot_be_made_today_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fails(self: object, split: object, index: int) -> None:
        raise ConnectionError("no free container")

    check_family(_family(task=fails), name="own")
    assert "task.name=own: Own: its first task cannot be made: ConnectionError: no free container" in caplog.text


def test_an_environment_that_delegates_is_accepted() -> None:
    class Proxy:
        def __init__(self, stream: int) -> None:
            self.inner = World(stream)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    (trajectory,) = play([WorldTask(make=Proxy)], words_tokenizer())
    assert trajectory.reward == 1.0


def test_families_that_work_are_accepted() -> None:
    check_family(EvenFamily(), name="even")
    check_family(WorldFamily(World), name="world")


@pytest.mark.parametrize("name", ["call", "grade", "close"])
def test_an_environment_without_a_method_is_named(name: str) -> None:
    lacking = type("Lacking", (World,), {name: None})
    inline = type("InlineWorldTask", (WorldTask, InlineTask), {})
    for task in (WorldTask(make=lacking), inline(make=lacking)):
        with pytest.raises(ConfigError, match=f"the environment Lacking has no method {name}: add it"):
            play([task], words_tokenizer())
