import json
import random
from dataclasses import dataclass, replace
from string import ascii_uppercase

import pytest

from moetrain.chat.messages import Role
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.tasks import registry
from moetrain.tasks.config import DatabaseConfig, DemonstratorConfig, TaskConfig
from moetrain.tasks.database.family import DatabaseFamily, DatabaseTask
from moetrain.tasks.database.phrases import frames
from moetrain.tasks.database.steps import StepKind
from moetrain.tasks.dialogues import dialogue_texts
from moetrain.tasks.names import is_held_out
from moetrain.tasks.protocol import Split

_SURE = TaskConfig(tool_failure=0.0)


def _solve(task: DatabaseTask, *, keep_last: bool = True) -> tuple[object, str]:
    environment = task.environment(0)
    value: str | int = task.program.start
    for step in task.program.steps if keep_last else task.program.steps[:-1]:
        result = json.loads(environment.call(step.kind.value, step.arguments(value)).text)
        value = value if step.kind is StepKind.update else result
    return environment, json.dumps(value)


def _updating_task() -> DatabaseTask:
    family = DatabaseFamily(_SURE, 0)
    tasks = (family.task(Split.train, index) for index in range(100))
    return next(task for task in tasks if task.program.steps[-1].kind is StepKind.update)


def test_the_perfect_demonstrator_solves_every_task_and_the_null_policy_none() -> None:
    family = DatabaseFamily(TaskConfig(), 3)
    for index in range(200):
        task = family.task(Split.held_out, index)
        assert family.demonstrate(task, index, perfect=True)[1].success
        assert not task.environment(index).grade("").success


def test_a_task_is_a_function_of_seed_split_and_index() -> None:
    first, again = (DatabaseFamily(TaskConfig(), 5).task(Split.train, 17) for _ in range(2))
    assert first == again
    assert first != DatabaseFamily(TaskConfig(), 6).task(Split.train, 17)


def test_a_task_needs_as_many_calls_as_it_says() -> None:
    family = DatabaseFamily(_SURE, 0)
    for calls in range(1, 11):
        task = family.task(Split.train, 4, num_calls=calls)
        messages, grade = family.demonstrate(task, 0, perfect=True)
        assert grade.success and sum(len(message.tool_calls) for message in messages) == calls == task.num_calls


def test_held_out_tasks_share_no_name_and_no_phrase_with_training() -> None:
    family = DatabaseFamily(_SURE, 0)
    names = {
        split: {
            name for i in range(100) for t in family.task(split, i).tables.values() for name in (t.name, *t.columns[1:])
        }
        for split in Split
    }
    assert all(is_held_out(name) == (split is Split.held_out) for split in Split for name in names[split])
    for name in ("get", "find", "aggregate", "update", "+", "-", "*", "opening", "closing"):
        trained, held_out = (set(frames(name, split)) for split in Split)
        assert trained and held_out and not trained & held_out


def test_short_questions_have_the_letters_and_the_length_of_long_ones() -> None:
    family = DatabaseFamily(_SURE, 0)
    firsts, lengths = set(), set()
    for index in range(300):
        task = family.task(Split.train, index)
        lines = task.text.split("\n")
        letter = task.lines[0].split()[1][:-1]
        first = ord(letter) - ord("A") + 1
        assert f"step {letter}" in lines[0] and lines[first : first + len(task.lines)] == task.lines
        assert [line.split()[1] for line in lines[1:]] == [f"{each}:" for each in ascii_uppercase[: len(lines) - 1]]
        firsts.add(first)
        lengths.add(len(lines) - 1)
    assert firsts == set(range(1, 16)) and max(lengths) == 17
    longest = family.task_of_length(Split.train, 0, num_calls=16)
    assert longest.text.split("\n")[1:] == longest.lines and len(longest.lines) == 17
    names = [line.split()[1] for line in family.task_of_length(Split.train, 0, num_calls=60).lines]
    assert names[24:30] == ["Y:", "Z:", "AA:", "AB:", "AC:", "AD:"] and names[52] == "BA:" and len(set(names)) == 61


def test_the_grader_fails_a_row_that_should_not_have_changed() -> None:
    task = DatabaseFamily(_SURE, 0).task(Split.train, 0)
    environment, answer = _solve(task)
    table = next(iter(task.tables.values()))
    link = next(iter(table.links))
    call = {"table": table.name, "id": table.ids[0], "column": link, "value": "zzz"}
    environment.call("update", json.dumps(call))  # type: ignore[attr-defined]
    grade = environment.grade(answer)  # type: ignore[attr-defined]
    assert not grade.success and grade.reason == "wrong_rows"


def test_the_grader_fails_a_claim_without_the_update() -> None:
    task = _updating_task()
    environment, answer = _solve(task, keep_last=False)
    grade = environment.grade(answer)  # type: ignore[attr-defined]
    assert not grade.success and grade.reason == "unchanged"


def test_the_grader_fails_a_wrong_answer_and_takes_the_right_one() -> None:
    environment, answer = _solve(DatabaseFamily(_SURE, 0).task(Split.train, 1))
    assert not environment.grade('"nothing"').success  # type: ignore[attr-defined]
    assert environment.grade(answer).success  # type: ignore[attr-defined]


def test_tool_failures_have_the_stated_rate_and_no_effect() -> None:
    family = DatabaseFamily(replace(_SURE, tool_failure=0.3), 0)
    task = family.task(Split.train, 2)
    environment = task.environment(9)
    step = task.program.steps[0]
    failed = sum(
        environment.call(step.kind.value, step.arguments(task.program.start)).is_transient for _ in range(1000)
    )
    assert 250 < failed < 350


_NO_SLIPS = {
    "stop_early": 0.0,
    "skip_step": 0.0,
    "wrong_name": 0.0,
    "unknown_name": 0.0,
    "retry": 1.0,
}


def _share_of_slips(name: str, chances: dict[str, float]) -> float:
    """Return the share of one-call demonstrations that have slip `name`, of those that can have it."""
    database = DatabaseConfig(demonstrator=DemonstratorConfig(**_NO_SLIPS | chances))
    family = DatabaseFamily(replace(_SURE, database=database), 0)
    found = []
    for index in range(200):
        task = family.task(Split.train, index, num_calls=1)
        messages, _ = family.demonstrate(task, index)
        calls = [json.loads(call.arguments) for message in messages for call in message.tool_calls]
        right = json.loads(task.program.steps[0].arguments(task.program.start))
        failed = any(message.role is Role.tool and message.content.startswith("error") for message in messages)
        columns = {column for table in task.tables.values() for column in table.columns}
        if name in ("stop_early", "skip_step"):
            found.append(not calls)
        elif "column" not in right:
            continue
        elif name == "retry":
            found.append(len(calls) > 1)
        else:
            found.append(calls[0] != right and (failed if name == "unknown_name" else calls[0]["column"] in columns))
    return sum(found) / len(found)


@pytest.mark.parametrize("name", ["stop_early", "skip_step", "wrong_name", "unknown_name", "retry"])
def test_slips_are_as_frequent_as_the_config_says(name: str) -> None:
    chances = {"unknown_name": 1.0} if name == "retry" else {}
    for chance in (0.0, 0.3, 1.0):
        share = _share_of_slips(name, chances | {name: chance})
        assert share == chance if chance in (0.0, 1.0) else abs(share - chance) < 0.13  # 4 standard deviations


def test_a_recovered_error_is_thought_of_as_a_retry() -> None:
    mistakes = DemonstratorConfig(stop_early=0, skip_step=0, wrong_name=0, unknown_name=1.0, retry=1)
    family = DatabaseFamily(replace(_SURE, database=DatabaseConfig(demonstrator=mistakes)), 0)
    task = family.task(Split.train, 0, num_calls=1)
    messages, grade = family.demonstrate(task, 0)
    assert grade.success
    start = json.dumps(task.program.start)
    assert [m.reasoning for m in messages if m.reasoning] == [
        f"{start}\n{task.lines[0]}",
        f"retry {start}\n{task.lines[0]}",
        f"{messages[-1].content}\n{task.lines[1]}",
    ]
    assert [m.is_learned for m in messages if m.role is Role.assistant] == [False, True, True]
    assert "error: no column" in messages[2].content


def test_an_unknown_family_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"task.name is nope: give one of database"):
        registry.build(replace(_SURE, name="nope"), 0)


def test_failures_and_mistakes_are_independent_of_those_of_the_next_task() -> None:
    """Each draws from a named stream: the mistakes at one task are not the tool failures at the next."""
    family = DatabaseFamily(TaskConfig(tool_failure=0.5), 0)
    task = family.task(Split.train, 0)
    step = task.program.steps[0]

    def failures(stream: int) -> list[bool]:
        environment = task.environment(stream)
        calls = [environment.call(step.kind.value, step.arguments(task.program.start)) for _ in range(64)]
        return [observation.is_transient for observation in calls]

    assert failures(7) == failures(7) != failures(8)
    raw = random.Random(7)  # what the mistakes at task 6 were drawn from
    same = [(fails := raw.random() < 0.5, fails and raw.choice(["busy", "timeout"]))[0] for _ in range(64)]
    assert failures(7) != same


def test_another_seed_demonstrates_with_other_mistakes() -> None:
    family = DatabaseFamily(TaskConfig(), 0)
    first, again, other = (list(dialogue_texts(family, template=KIMI_K2, count=40, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


@dataclass(kw_only=True)
class _Options:
    size: int = 3
    share: float = 0.5


class _OwnFamily(DatabaseFamily):
    """A family with settings of its own."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.own = _Options(**config.options)
        if self.own.size > 9:
            raise KeyError("size")


def test_the_options_of_a_plugin_are_checked_against_its_dataclass() -> None:
    registry.register("own", _OwnFamily, options=_Options)

    def build(**options: object) -> _Options:
        family = registry.build(TaskConfig(name="own", options=options), 0)
        assert isinstance(family, _OwnFamily)
        return family.own

    assert build() == _Options() and build(size=5, share=1) == _Options(size=5, share=1)
    for options, message in [
        ({"sice": 5}, r"task\.options\.sice: task\.name=own has the options size, share"),
        ({"size": "five"}, r"task\.options\.size is 'five': give a value of type int"),
        ({"size": True}, r"task\.options\.size is True: give a value of type int"),
        ({"size": 10}, r"task\.name is own: the family cannot be constructed: KeyError: 'size'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(**options)
    with pytest.raises(ConfigError, match=r"task\.options\.size: task\.name=database has no options"):
        registry.build(TaskConfig(options={"size": 1}), 0)


def test_keys_that_moved_are_refused_with_the_new_ones() -> None:
    for key in ("min_calls", "max_calls", "deadline_s"):
        with pytest.raises(ConfigError, match=rf"task\.{key}: .*did you mean task\.database\.{key}\?"):
            compose("rl", [f"task.{key}=3"])
    assert compose("rl", ["task.name=own", "task.options.size=4"]).task.options == {"size": 4}
    run = compose("rl", ["task.name=own", "task.database.max_calls=5"])  # a plugin's family may use it
    assert run.task.database.max_calls == 5


def test_options_that_are_no_dataclass_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task family plain is registered with options=<class 'dict'>: give a data"):
        registry.register("plain", _OwnFamily, options=dict)
