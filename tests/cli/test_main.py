"""The command line: help, exit codes, one line for a mistake, plugins, and no torch before the input is checked."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.commands.schemas import SCHEMAS
from moetrain.config_keys import leaf_keys
from tests.cli.command import ROOT, moetrain


def test_check_composes_every_config_and_recipe_without_torch() -> None:
    code = (
        "import sys\n"
        "from moetrain.cli.main import main\n"
        "code = main(['check'])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for path in [*ROOT.glob("configs/*/*.yaml")]:
        assert f"ok  {path.parent.name}={path.stem}" in lines
    assert any(line.startswith("ok  recipe=k2_nano:") for line in lines)


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_lists_every_key_with_its_docstring(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    for key, _ in leaf_keys(SCHEMAS[command]):
        assert f"  {key} (" in page
    assert "Name" in page


def test_the_overview_separates_each_command_from_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in [*SCHEMAS, "check"]:
        assert any(line.startswith(f"  {command}  ") for line in lines), command
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize(("sent", "message"), [(b"\xff", "not UTF-8 at byte 0"), (b"\n", "standard input is empty")])
def test_a_prompt_from_standard_input_that_is_none_is_refused(
    sent: bytes, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    assert main(["generate", f"init_from={tmp_path}", "prompt=-"]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_type_default_and_docstring_of_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--help"])
    page = capsys.readouterr().out
    assert "  optim.name (muon|adamw) = muon\n      Optimizer of the hidden matrices.\n" in page
    assert "  model.q_lora_rank (int or null) = 96\n" in page
    assert "  model={deepseek_v3,k2_bench,k2_decode,k2_nano," in page


PLUGIN = '''
from dataclasses import dataclass
from moetrain.rl.algorithms.rejection import Rejection
from moetrain.rl.registry import register as register_algorithm
from moetrain.tasks.registry import register

@dataclass(kw_only=True)
class Sums:
    largest: int = 99
    """Largest summand."""

@dataclass(kw_only=True)
class Odd(Rejection):
    width: float
    """Width of the bound."""

register("sums", lambda config, seed: None, options=Sums)
register_algorithm("odd", Odd)
'''


def test_help_shows_the_settings_of_plugins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "sums_and_odd.py"
    path.write_text(PLUGIN)
    code = f"from moetrain.cli.main import main; main(['rl', 'plugins=[{path}]', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "  task.sums.largest (int) = 99\n      Largest summand.\n" in done.stdout
    assert "  rl.options.width, of rl.algorithm=odd (float) = required\n      Width of the bound.\n" in done.stdout
    assert "  rl.options.tau, of rl.algorithm=k2_5 (float) = 0.001\n" in done.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_computes_with_as_many_threads_as_it_is_told(threads: int) -> None:
    code = (
        "from moetrain.cli.main import main\n"
        f"main(['pretrain', 'dry_run=true', 'model=k2_nano_test', 'data=test', 'run.threads={threads}'])\n"
        "import torch\n"
        "print('threads', torch.get_num_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == f"threads {threads}", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretran"], "moetrain: 'pretran' is not a command; did you mean pretrain?\n"),
        (["verify", "export"], "moetrain: verify requires a second word: give one of verify exports, verify hf, "),
        (["sft", "train.stesp=3"], "moetrain: train.stesp: there is no 'stesp' in train; did you mean steps?\n"),
        (["sft", "init_from=nowhere"], "moetrain: init_from is nowhere: there is no such folder\n"),
        (["pretrain", "plugins=[no_such_module]"], "moetrain: plugins: there is no no_such_module; give a module"),
        (
            ["pretrain", "data.sources.x.kind=jsonl", "data.sources.x.path=no.jsonl"],
            "moetrain: no.jsonl does not exist: give a file, a glob or a folder of jsonl files\n",
        ),
        (["pretrain", "--config", "none.yaml"], "moetrain: there is no config file none.yaml\n"),
        (
            ["run", "recipe=k2_nan"],
            "moetrain: recipe is 'k2_nan': no folder with a recipe.yaml; did you mean k2_nano?\n",
        ),
        (["run", "pretrian.train.steps=3"], "'pretrian' is no stage; did you mean pretrain?\n"),
        (
            ["run", "model=k2_nano"],
            "this is a key of a stage; give <stage>.model=k2_nano, such as pretrain.model=k2_nano\n",
        ),
        (["run", "-m"], "moetrain: -m: unknown option; write key=value\n"),
        (["pretrain", "--foo=3"], "moetrain: --foo=3: unknown option; write key=value, or --config FILE directly"),
        (["pretrain", "train.steps=3", "--config", "x"], "moetrain: --config: unknown option"),
        (["run", "again_from=sfd"], "moetrain: again_from is 'sfd': did you mean sft?\n"),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_of_jsonl_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    words = ["data=none", "data.sources.x.kind=jsonl", "data.sources.x.path=mine.jsonl", "run.wandb.mode=disabled"]
    done = moetrain("pretrain", "model=k2_nano_test", "parallel.engine=torch", *words, folder=tmp_path)
    assert done.returncode == 2
    cure = "give one object per line, or one array of them"
    assert done.stderr == f"moetrain: mine.jsonl:2 is not JSON: Expecting value at column 10; {cure}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_a_path_that_no_file_can_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("init_from", "data.tokenizer.path"):
        assert main(["pretrain", f"{word}={'n' * 300}"]) == 2
        said = capsys.readouterr().err
        assert "File name too long" in said
        assert said.count("\n") == 1


def test_checking_a_command_line_says_what_is_right_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "pretrain", "train.steps=5"]) == 0
    words = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["ok  config", "ok  inputs", "ok  folder", "ok  names", "ok  records", "ok  tokens", "ok  resume"]
    assert main(["check", "pretrain", "train.steps=0"]) == 2
    assert capsys.readouterr().out == ""
    assert main(["check", "run", "recipe=k2_nano", "sft.train.steps=50"]) == 0
    assert "ok  sft: config and inputs of `sft`\n" in capsys.readouterr().out
    assert main(["check", "run", "recipe=k2_nano", "sft.train.steps=0"]) == 2
    assert main(["check", "check", "sft"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_is_imported_by_path_and_its_own_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('mine is here')\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    found = moetrain("generate", "plugins=[mine.py]", folder=tmp_path)
    assert "mine is here" in found.stdout
    broken = moetrain("generate", "plugins=[broken]", folder=tmp_path)
    assert broken.returncode == 2
    assert broken.stderr == "moetrain: plugins: broken fails when it is imported: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize(("before", "after"), [(None, "3000"), ("7", "7")])
def test_openmp_spins_briefly_unless_the_user_says_otherwise(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "unset")  # registers what to restore
    monkeypatch.delenv("GOMP_SPINCOUNT") if before is None else monkeypatch.setenv("GOMP_SPINCOUNT", before)
    assert main(["--help"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == after


_LEFT = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but without RANK, MASTER_ADDR, MASTER_PORT: "),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "x"}, "RANK is 'x' in the environment"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3 and WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment"),
        ({"RANK": "0"}, "RANK is 0 in the environment, but without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: "),
        (_LEFT | {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc' in the environment"),
        (_LEFT | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999' in the environment"),
    ],
)
def test_what_a_launcher_left_in_the_environment_is_one_line(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moetrain: {said}") and error.count("\n") == 1
    assert "unset it, or start the ranks with launch/torchrun.sh" in error


def test_a_dry_run_needs_only_the_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["model=k2_nano_test", "data=test", "data.seq_len=64", "parallel.expert=2", "dry_run=true"]
    assert main(["pretrain", *words]) == 0, capsys.readouterr().err


def test_a_run_starts_its_stages_without_the_variables_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "recipe=k2_nano_test", "dry_run=true"]) == 0
    assert not {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()
