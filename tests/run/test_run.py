"""The runner: a finished stage is skipped while nothing changed, a stopped one goes on, and a folder has one run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moetrain.errors import ConfigError
from moetrain.log import read_metrics
from moetrain.run.runner import prepare, stage_keys
from moetrain.run.stage import lock
from tests.cli.command import ENVIRONMENT, moetrain

RECIPE = """
stages:
  - name: pretrain
    command: pretrain
    overrides:
      - model=k2_nano_test
      - data=test
      - "~data.sources.english"
      - "~data.sources.dialogues"
      - data.sources.maths.kind=maths
      - data.sources.maths.num_documents=100
      - train.steps=3
      - train.checkpoint_every=1
      - train.rows_per_step=2
      - train.rows_per_micro_batch=2
      - parallel.engine=torch
  - name: export
    command: export
    overrides: ["init_from=${stage:pretrain}"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe that has run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine").mkdir()
    (folder / "mine" / "recipe.yaml").write_text(RECIPE)
    done = moetrain("run", "recipe=mine", "wandb.mode=disabled", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def statuses(words: list[str], folder: Path) -> dict[str, str]:
    """Run the recipe, and return the status of each stage as its table says."""
    done = moetrain("run", "recipe=mine", "wandb.mode=disabled", *words, folder=folder)
    assert done.returncode == 0, done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in cells}


def test_a_run_leaves_what_its_stages_promise(finished: Path) -> None:
    stage = finished / "runs" / "mine" / "pretrain"
    assert [row["step"] for row in read_metrics(stage / "metrics.jsonl") if "loss" in row] == [1, 2, 3]
    assert {"config.yaml", "summary.json", "done.json", "checkpoints", "tokenizer"} <= {p.name for p in stage.iterdir()}
    assert (finished / "runs" / "mine" / "export" / "model" / "config.json").is_file()


def flipped(path: Path) -> Path:
    """Flip a bit of the file's middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_weights_that_are_damaged_cost_no_stage_that_is_done(run: Path) -> None:
    copy = shutil.copytree(run / "runs" / "mine" / "pretrain", run / "copy")
    shards = sorted(copy.glob("checkpoints/step_00000003/*.safetensors"))
    flipped(shards[0])
    refused = moetrain("run", "recipe=mine", f"export.init_from={copy}/checkpoints/step_00000003", folder=run)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"moetrain: {shards[0]}: sha256 is ") and refused.stderr.count("\n") == 1
    assert not (run / "runs" / "mine" / "export.previous").exists()
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}


def test_a_stage_that_left_nothing_does_not_take_the_place_of_one_that_did(run: Path) -> None:
    assert statuses(["export.export.format=bf16"], run)["export"] == "done"
    previous = run / "runs" / "mine" / "export.previous" / "model"
    of_int4 = (previous / "config.json").read_bytes()
    stub = run / "runs" / "mine" / "export"  # as a stage leaves it that is refused at its start
    shutil.rmtree(stub / "model")
    for name in ("summary.json", "done.json"):
        (stub / name).unlink()
    assert statuses([], run)["export"] == "done"
    assert (previous / "config.json").read_bytes() == of_int4


def test_another_tokenizer_beside_a_checkpoint_is_found(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    path = stage / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"e": 68', '"e": 69'))
    assert path.read_text() != text
    refused = moetrain("check", "export", f"init_from={stage}", folder=run)
    assert refused.returncode == 2
    assert f"{path}: sha256 is " in refused.stderr and refused.stderr.count("\n") == 1


def test_finished_stages_are_skipped_and_a_change_runs_a_stage_and_those_after_it(run: Path) -> None:
    assert statuses([], run) == {"pretrain": "unchanged", "export": "unchanged", "all": "this time"}
    again = statuses(["export.export.format=bf16"], run)
    assert again == {"pretrain": "unchanged", "export": "done", "all": "this time"}
    assert (run / "runs" / "mine" / "export.previous" / "model").is_dir()


def test_a_stage_begins_anew_when_it_is_told_to(run: Path) -> None:
    marker = run / "runs" / "mine" / "export" / "marker"
    marker.write_text("")
    assert statuses(["again_from=export"], run)["export"] == "done"
    assert not marker.exists()


def test_a_stage_killed_in_the_middle_goes_on_to_the_same_numbers(run: Path) -> None:
    stage = run / "runs" / "mine" / "pretrain"
    wanted = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(stage)
    command = [sys.executable, "-m", "moetrain.cli", "run", "recipe=mine", "wandb.mode=disabled"]
    runner = subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not list(stage.glob("checkpoints/step_*")) and runner.poll() is None:
        time.sleep(0.01)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not (stage / "done.json").exists()
    assert statuses([], run)["pretrain"] == "done"
    found = [(row["step"], row["loss"]) for row in read_metrics(stage / "metrics.jsonl") if "loss" in row]
    assert found == wanted


def test_a_stage_on_two_ranks_ends_with_the_run_that_started_it(run: Path) -> None:
    words = ["recipe=mine", "name=killed", "num_processes=2", "threads=1", "wandb.mode=disabled"]
    words += ["pretrain.train.steps=100000", "pretrain.parallel.engine=deepspeed"]
    command = [sys.executable, "-m", "moetrain.cli", "run", *words]
    runner = subprocess.Popen(command, cwd=run, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    stage = run / "runs" / "killed" / "pretrain"

    def alive() -> int:
        """Return how many processes of the stage there are: its ranks and their launcher."""
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                is_of_stage = b"runs/killed/pretrain" in (process / "cmdline").read_bytes()
                found += is_of_stage and (process / "cwd").resolve() == run.resolve()
        return found

    try:
        while not list(stage.glob("checkpoints/step_*")):
            assert runner.poll() is None
            time.sleep(0.1)
        assert alive() == 3
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == 0


def test_an_error_of_a_stage_is_one_line_and_its_code(run: Path) -> None:
    checkpoint = max((run / "runs" / "mine" / "pretrain" / "checkpoints").iterdir())
    weights = min(checkpoint.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    done = moetrain("export", f"init_from={checkpoint}", "run.name=other", folder=run)
    assert done.returncode == 2
    assert done.stderr.startswith("moetrain: ") and done.stderr.count("\n") == 1
    assert str(weights) in done.stderr
    assert not (run / "runs" / "other" / "export" / "model").exists()


def test_keys_follow_config_inputs_and_files_and_not_the_place(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    keys = stage_keys(prepare(["recipe=mine"]))
    assert stage_keys(prepare(["recipe=mine", f"folder={tmp_path}", "name=x", "wandb.mode=disabled"])) == keys
    other = stage_keys(prepare(["recipe=mine", "export.export.format=bf16"]))
    assert other["pretrain"] == keys["pretrain"] and other["export"] != keys["export"]
    earlier = stage_keys(prepare(["recipe=mine", "seed=1"]))
    assert earlier["pretrain"] != keys["pretrain"] and earlier["export"] != keys["export"]
    text = tmp_path / "mine.txt"
    words = ["recipe=mine", "pretrain.data.sources.own.kind=text", f"pretrain.data.sources.own.path={text}"]
    text.write_text("one")
    one = stage_keys(prepare(words))
    text.write_text("another")
    assert stage_keys(prepare(words))["pretrain"] != one["pretrain"]
    plugin = finished / "plugin.py"
    plugin.write_text("one = 1")
    before = stage_keys(prepare(["recipe=mine", "plugins=[plugin.py]"]))
    plugin.write_text("one = 100")
    assert stage_keys(prepare(["recipe=mine", "plugins=[plugin.py]"]))["pretrain"] != before["pretrain"]
    plugin.unlink()


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()}"), lock(tmp_path):
        pass
    with lock(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_a_dry_run_writes_nothing(finished: Path, tmp_path: Path) -> None:
    done = moetrain("run", f"recipe={finished / 'mine'}", "dry_run=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "memory, a rank" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert json.loads((finished / "runs" / "mine" / "pretrain" / "summary.json").read_text())["steps"] == 3
