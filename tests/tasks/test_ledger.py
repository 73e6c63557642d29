import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from moetrain.chat.messages import Role
from moetrain.errors import ConfigError
from moetrain.tasks.config import LedgerConfig, TaskConfig
from moetrain.tasks.ledger.family import LedgerFamily, LedgerTask
from moetrain.tasks.ledger.orders import OrderKind, walk
from moetrain.tasks.ledger.phrases import _FRAMES, _SLOTS, frames
from moetrain.tasks.names import is_held_out
from moetrain.tasks.protocol import Split

SURE = TaskConfig(tool_failure=0.0)
HORIZONS = [8, 9, 10, 11, 12, 13, 25, 50, 300]


def _family(**settings: float) -> LedgerFamily:
    return LedgerFamily(TaskConfig(name="ledger", tool_failure=0.0, ledger=LedgerConfig(**settings)), 0)  # type: ignore[arg-type]


def _updates(task: LedgerTask) -> Iterator[dict[str, object]]:
    """Yield the arguments of the right updates."""
    ledger = task.ledger
    for _, written in walk(ledger.start, orders=ledger.orders, balances=ledger.balances):
        for account, balance in written:
            yield {"table": "accounts", "id": account, "column": "balance", "value": balance}


@pytest.mark.parametrize("branching", [0.0, 0.7])
@pytest.mark.parametrize("num_calls", HORIZONS)
def test_the_demonstrator_solves_a_chain_of_any_length_in_as_many_calls(num_calls: int, branching: float) -> None:
    family = _family(branching=branching)
    for index in range(5):
        task = family.task_of_length(Split.held_out, index, num_calls=num_calls)
        messages, grade = family.demonstrate(task, index, perfect=True)
        assert grade.success and sum(len(message.tool_calls) for message in messages) == num_calls == task.num_calls


def test_the_demonstrator_solves_every_task_with_tools_that_fail() -> None:
    family = LedgerFamily(TaskConfig(tool_failure=0.3), 1)
    for index in range(50):
        assert family.demonstrate(family.task(Split.train, index), index)[1].success


def test_simple_policies_solve_nothing() -> None:
    family = _family()
    for index in range(100):
        task = family.task(Split.held_out, index)
        last = list(_updates(task))[-1]["value"]
        answers = ["", "0", json.dumps(last), json.dumps(task.ledger.answer), "done"]  # without any call
        assert not any(task.environment(0).grade(answer).success for answer in answers)
        environment = task.environment(0)
        for _ in range(10):  # repeats one right read
            environment.call("get", json.dumps({"table": "orders", "id": task.ledger.start, "column": "text"}))
        assert not environment.grade(json.dumps(task.ledger.answer)).success and environment.progress() == 0


def test_every_skipped_posting_fails_and_progress_ends_before_it() -> None:
    task = _family().task_of_length(Split.train, 3, num_calls=60)
    calls, answer = list(_updates(task)), json.dumps(task.ledger.answer)
    for left_out in range(len(calls)):
        environment = task.environment(0)
        for place, arguments in enumerate(calls):
            if place != left_out:
                environment.call("update", json.dumps(arguments))
        assert not environment.grade(answer).success and environment.progress() == left_out / len(calls)


def test_a_wrong_balance_that_is_corrected_is_right_in_the_end() -> None:
    task = _family().task_of_length(Split.train, 3, num_calls=60)
    environment = task.environment(0)
    for place, arguments in enumerate(_updates(task)):
        if place == 4:
            environment.call("update", json.dumps({**arguments, "value": 7}))
        environment.call("update", json.dumps(arguments))
    assert environment.grade(json.dumps(task.ledger.answer)).success and 0 < environment.progress() < 1


def test_an_update_can_be_repeated() -> None:
    task = _family().task_of_length(Split.train, 5, num_calls=40)
    environment = task.environment(0)
    for arguments in _updates(task):
        for _ in range(3):
            environment.call("update", json.dumps(arguments))
    assert environment.grade(json.dumps(task.ledger.answer)).success and environment.progress() == 1


def test_a_row_that_should_not_have_changed_fails() -> None:
    task = _family().task(Split.train, 0)
    environment = task.environment(0)
    for arguments in _updates(task):
        environment.call("update", json.dumps(arguments))
    wrong = {"table": "orders", "id": task.ledger.start, "column": "text", "value": "x"}
    environment.call("update", json.dumps(wrong))
    assert environment.grade(json.dumps(task.ledger.answer)).reason == "wrong_rows"


def test_tools_fail_at_the_stated_rate_and_a_timeout_may_have_done_the_work() -> None:
    task = LedgerFamily(TaskConfig(tool_failure=0.4), 0).task(Split.train, 0)
    update = json.dumps(next(iter(_updates(task))))
    texts, done = [], []
    for stream in range(1000):
        environment = task.environment(stream)
        observation = environment.call("update", update)
        texts.append(observation.text)
        done.append(environment.progress() > 0)
        assert observation.is_transient == observation.text.startswith("error")
    assert 350 < sum(text.startswith("error") for text in texts) < 450
    after = {text: {done[place] for place, found in enumerate(texts) if found == text} for text in set(texts)}
    assert after == {'"ok"': {True}, "error: busy": {False}, "error: timeout": {True, False}}


def test_the_balance_just_written_decides_between_two_orders() -> None:
    family = _family(branching=1.0)
    for index in range(30):
        ledger = family.task_of_length(Split.train, index, num_calls=30).ledger
        chain = [order for order, _ in walk(ledger.start, orders=ledger.orders, balances=ledger.balances)]
        off_chain = ledger.orders.keys() - {order.key for order in chain}
        assert all({order.next_key, order.else_key} & off_chain for order in chain[:-1])
        assert chain[-1].kind is OrderKind.report


def test_held_out_tasks_share_no_name_and_no_phrase_with_training() -> None:
    family = _family()
    for split in Split:
        for index in range(50):
            names = family.task(split, index).ledger.balances
            assert all(is_held_out(name) == (split is Split.held_out) for name in names)
    for name in ("add", "take", "move", "copy", "report", "then", "branch", "question"):
        trained, held_out = ({text for texts in frames(name, split) for text in texts} for split in Split)
        assert trained and held_out and not trained & held_out
        assert all(len(texts) > 1 for split in Split for texts in frames(name, split))


def test_training_contains_every_word_of_the_phrasings_in_most_of_its_places() -> None:
    for name, texts in _FRAMES.items():
        for frame in texts:
            slots = re.findall(r"<\w+>", frame)
            by_word: dict[tuple[str, str], Counter[Split]] = defaultdict(Counter)
            for words in itertools.product(*(_SLOTS[slot] for slot in slots)):
                text = frame
                for slot, word in zip(slots, words, strict=True):
                    text = text.replace(slot, word, 1)
                split = next(split for split in Split if " ".join(text.split()) in _texts(name, split))
                for slot, word in zip(slots, words, strict=True):
                    by_word[slot, word][split] += 1
            for place, counts in by_word.items():
                assert counts[Split.train] >= counts.total() / 2, f"{name}: {frame!r}: {place} is hardly trained"


def _texts(name: str, split: Split) -> set[str]:
    return {text for texts in frames(name, split) for text in texts}


def test_a_task_is_a_function_of_seed_split_and_index() -> None:
    first, again = (LedgerFamily(SURE, 5).task(Split.train, 17) for _ in range(2))
    assert first == again != LedgerFamily(SURE, 6).task(Split.train, 17)


def test_a_misspelt_id_is_an_error_that_is_noticed_and_not_learned() -> None:
    family = _family(misspell=0.9)
    messages, grade = family.demonstrate(family.task(Split.train, 0), 0)
    turns = [message for message in messages if message.role is Role.assistant]
    wrong = [message for message in turns if not message.is_learned]
    assert grade.success and len(wrong) > 3
    for message in wrong:
        result = messages[messages.index(message) + 1].content
        assert result.startswith("error: no row") or result in ("error: busy", "error: timeout")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_calls": 7}, r"task\.ledger\.min_calls is 7: give 8 to task\.ledger\.max_calls \(16\)"),
        ({"min_calls": 20}, r"task\.ledger\.min_calls is 20: give 8 to task\.ledger\.max_calls \(16\)"),
        ({"accounts": 3}, r"task\.ledger\.accounts is 3: give 4 to 16"),
        ({"branching": 1.5}, r"task\.ledger\.branching is 1\.5: give a probability from 0 to 1"),
    ],
)
def test_settings_that_no_ledger_has_are_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        LedgerConfig(**settings)  # type: ignore[arg-type]


def test_a_long_chain_over_few_accounts_can_always_be_drawn() -> None:
    family = _family(accounts=4)
    for index in range(60):
        task = family.task_of_length(Split.train, index, num_calls=300)
        assert family.demonstrate(task, 0, perfect=True)[1].success


@pytest.mark.parametrize("num_calls", [5, 5001, 1_000_000])
def test_a_length_that_no_chain_has_is_refused(num_calls: int) -> None:
    with pytest.raises(ConfigError, match=f"a ledger task of {num_calls} calls cannot be made: give 8 to 5000 calls"):
        _family().task_of_length(Split.train, 0, num_calls=num_calls)
