"""What a command line names is checked before anything starts: by itself, in a recipe, and before ranks start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.compose import compose
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import ConfigError, DataError
from moetrain.run import inputs
from moetrain.run.inputs import check_inputs, check_names
from tests.cli.command import ENVIRONMENT, ROOT

RECIPE = """
stages:
  - {name: pretrain, command: pretrain, overrides: [model=k2_nano_test, data=test]}
  - {name: sft, command: sft, overrides: [model=k2_nano_test, data=test, "init_from=${stage:pretrain}"]}
  - {name: eval, command: eval, overrides: ["init_from=${stage:sft}", "eval.masters=${stage:pretrain}"]}
"""


WITHOUT_A_DEMONSTRATOR = """
from moetrain.tasks.registry import register
from tests.even_task import EvenFamily

class Judged:
    def __init__(self, config, seed):
        self._inner = EvenFamily()
        self.tools, self.task = self._inner.tools, self._inner.task

register("judged", Judged)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a recipe and bad files in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "broken.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    (tmp_path / "boom.py").write_text("1 / 0\n")
    (tmp_path / "file").write_text("")
    train_tokenizer(["some words " * 9], vocab_size=275).save(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft.data.sources.x.kind=jsonl", "sft.data.sources.x.path=nope.jsonl"], "nope.jsonl does not exist"),
        (["sft.data.sources.x.kind=jsonl", "sft.data.sources.x.path=broken.jsonl"], "broken.jsonl:2 is not JSON"),
        (["sft.data.sources.x.format=nope"], "data.sources.*.format is nope"),
        (["sft.task.name=nope"], "task.name is nope: give one of database"),
        (["eval.eval.before=nope"], "eval.before is nope: there is no such folder"),
        (["eval.eval.codes_before="], "eval.codes_before is empty: give a folder, or null"),
        (["num_processes=2", "pretrain.parallel.expert=4"], "parallel.expert is 4: it must divide the number of"),
        (["plugins=[boom.py]"], "boom.py fails when it is imported: ZeroDivisionError"),
        (["folder=file"], "cannot be written: file is a file"),
    ],
)
def test_a_recipe_meets_a_mistake_of_any_stage_before_the_first_one_starts(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    for command in (["check", "run"], ["run"], ["run", "dry_run=true"]):
        assert main([*command, "recipe=mine", *words]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl"], "init_from is null: RL starts from weights"),
        (["eval"], "init_from is null: give the export to evaluate"),
        (["export"], "init_from is null: give the stage or checkpoint to export"),
        (["pretrain", "init_from="], "init_from is empty: give a folder, or null"),
        (["pretrain", "init_from=file"], "init_from is file: this is a file"),
        (["pretrain", "task.name=nope"], "task.name is nope: give one of database"),
        (["pretrain", "data.sources.english.format=nope"], "data.sources.*.format is nope: give one of messages"),
        (["pretrain", "run.folder=file"], "cannot be written: file is a file"),
    ],
)
def test_check_and_dry_run_find_what_the_run_would(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (["check", *words], [*words, "dry_run=true"]):
        assert main(line) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.tokenizer.path=mine"], "mine/tokenizer.json does not exist: give the folder of a tokenizer"),
        (
            ["data.tokenizer.path=words", "model.vocab_size=270"],
            "model.vocab_size is 270, the tokenizer in words has 275 tokens: set model.vocab_size to 275 or more",
        ),
        (
            ["data.tokenizer.path=words", "data.tokenizer.vocab_size=300"],
            "data.tokenizer.vocab_size is 300, the tokenizer in words has 275 tokens: remove data.tokenizer.vocab_size",
        ),
    ],
)
def test_check_reads_the_tokenizer_that_is_named(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "pretrain", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["abc", "pretrain"], "torchrun.sh: RANKS is 'abc': give a whole number from 1"),
        (["0", "pretrain"], "torchrun.sh: RANKS is '0': give a whole number from 1"),
        (["2", "pretrain", "parallel.expert=4"], "moetrain: parallel.expert is 4: it must divide the number of proc"),
        (["2", "report"], "moetrain: 2 ranks were started, but this command runs in one process: "),
        (["2", "export", "init_from=mine"], "moetrain: 2 ranks were started, but this command runs in one process"),
        (["2", "pretrain", "parallel.engine=torch"], "parallel.engine is torch, which runs in one process, not 2"),
        (
            ["2", "pretrain", "data.sources.x.kind=jsonl", "data.sources.x.path=broken.jsonl"],
            "moetrain: broken.jsonl:2 is not JSON: Expecting value at column 10",
        ),
    ],
)
def test_torchrun_starts_no_rank_for_bad_input(words: list[str], message: str, folder: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *words]
    environment = {**ENVIRONMENT, "VENV": sys.prefix}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_text_that_does_not_fit_in_memory_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("some words " * 10_000)  # 110 KB, about 880 KB in memory
    words = ["data=none", "data.sources.web.kind=text", f"data.sources.web.path={tmp_path}/a.txt"]
    run = compose("pretrain", words)
    monkeypatch.setattr(inputs, "available_memory", lambda: 400_000)
    with pytest.raises(
        ConfigError, match=r"data\.sources\.web has 0\.00011 GB of text, .* moetrain prepare tokenises it"
    ):
        check_inputs(run)
    check_inputs(compose("prepare", words))
    assert not caplog.text
    monkeypatch.setattr(inputs, "available_memory", lambda: 2_000_000)
    check_inputs(run)
    assert "data.sources.web has 0.00011 GB of text" in caplog.text
    caplog.clear()
    monkeypatch.setattr(inputs, "available_memory", lambda: 20_000_000)
    check_inputs(run)
    assert not caplog.text


def chats(path: Path) -> list[str]:
    turns = [{"role": "user", "name": "ann", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    source = ["data=none", "data.sources.s.kind=jsonl", f"data.sources.s.path={path}", "data.sources.s.format=messages"]
    return ["model=k2_nano_test", *source]


def test_records_that_the_chat_template_refuses_are_found_before_training(tmp_path: Path) -> None:
    words = chats(tmp_path / "a.jsonl")
    inputs.check_records(compose("pretrain", words))  # the default template has names
    with pytest.raises(DataError, match=r"a.jsonl:1: .*name"):
        inputs.check_records(compose("pretrain", [*words, "data.tokenizer.template=chatml"]))
    dropping = [*words, "data.tokenizer.template=chatml", "data.sources.s.unreadable=drop"]
    inputs.check_records(compose("pretrain", dropping))


def test_a_tokenizer_that_an_earlier_stage_will_write_is_not_read(tmp_path: Path) -> None:
    words = [*chats(tmp_path / "a.jsonl"), f"data.tokenizer.path={tmp_path / 'later' / 'tokenizer'}"]
    inputs.check_records(compose("pretrain", words))


@pytest.mark.parametrize(
    ("command", "words", "calls"),
    [
        ("eval", ["eval.longer_calls=[50,300]"], 300),
        ("eval", ["eval.longer_tasks=0"], 16),
        ("rl", [], 16),
        ("eval", ["eval.longer_calls=[50,300]", "rollout.max_turns=600"], None),
        ("eval", ["eval.num_tasks=0", "data=language"], None),
    ],
)
def test_too_few_turns_for_the_tasks_are_a_warning(
    command: str, words: list[str], calls: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    check_names(compose(command, ["task=marathon", "init_from=x", *words]))
    said = [record.message for record in caplog.records if "rollout.max_turns" in record.message]
    assert len(said) == (calls is not None)
    assert not said or f"rollout.max_turns is 16, and tasks of {calls} calls need {calls + 1} turns" in said[0]  # type: ignore[operator]


@pytest.mark.parametrize("words", [["eval.longer_calls=[50,5]"], ["eval.longer_calls=[100000]"]])
def test_a_length_that_the_family_cannot_make_is_refused_first(words: list[str]) -> None:
    words = ["task=marathon", "init_from=x", *words]
    with pytest.raises(ConfigError, match=r"a ledger task of (5|100000) calls cannot be made: give 8 to 5000 calls"):
        check_names(compose("eval", words))
    check_names(compose("eval", [*words, "eval.longer_tasks=0"]))
    check_names(compose("eval", [*words, "eval.num_tasks=0", "data=language"]))


@pytest.mark.parametrize("command", ["eval", "sft"])
def test_dialogues_of_a_family_without_a_demonstrator_are_refused_first(command: str, tmp_path: Path) -> None:
    plugin = tmp_path / "judged.py"
    plugin.write_text(WITHOUT_A_DEMONSTRATOR)
    words = ["init_from=x", f"plugins=[{plugin}]", "task.name=judged"]
    check_names(compose("eval", [*words, "data=language"]))
    with pytest.raises(ConfigError, match=r"source of kind dialogues, but Judged has no demonstrate"):
        check_names(compose(command, [*words, "data=test"]))
