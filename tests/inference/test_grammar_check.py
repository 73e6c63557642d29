"""Grammars are tried in a process that may be ended at any time."""

import json
from collections.abc import Iterator

import pytest

from moetrain.errors import ConfigError
from moetrain.inference.grammar_check import GrammarCheck
from tests.even_task import even_tokenizer

BOMB = json.dumps({"allOf": [{"type": "string", "pattern": f"^(a|b){{0,{number}}}a"} for number in range(1, 60)]})
"""Compiling it takes twice as long with each pattern more."""


@pytest.fixture
def check() -> Iterator[GrammarCheck]:
    tokenizer = even_tokenizer()
    made = GrammarCheck(tokenizer, end_id=tokenizer.end_ids[0], num_processes=1, max_seconds=1.0)
    yield made
    made.close()


def test_verdicts_are_right_before_and_after_a_process_was_ended(check: GrammarCheck) -> None:
    assert check.problem(('{"type": "object"}',), "") == ""
    assert check.problem(('{"type": "foo"}',), "") == "Invalid type: foo"
    assert check.problem((), "start: nothing") != ""
    assert check.problem((BOMB,), "") == "compiling it takes more than 1 s, or too much memory"
    assert check.problem(('{"const": 1}',), "") == ""
    process = check._all[0]._process
    assert process is not None
    process.kill()
    process.wait()
    assert check.problem(('{"const": 2}',), "") == ""


def test_a_check_that_was_closed_gives_no_verdict(check: GrammarCheck) -> None:
    assert check.problem(('{"const": 1}',), "") == ""
    check.close()
    with pytest.raises(ConfigError, match="no process could be started"):
        check.problem(('{"const": 2}',), "")
