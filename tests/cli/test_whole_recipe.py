"""The whole chain at toy size, as a user runs it; and one stage on two ranks against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.log import read_metrics
from tests.cli.command import ENVIRONMENT, ROOT, moetrain

STAGES = ["pretrain", "sft", "sft_export", "sft_eval", "rl", "rl_export", "rl_eval", "verify", "report"]
TINY = [
    "model=k2_nano_test",
    "data=test",
    "train.steps=3",
    "train.rows_per_step=4",
    "train.rows_per_micro_batch=2",
    "train.compute_dtype=float32",
    "run.wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of recipes/k2_nano_test."""
    folder = tmp_path_factory.mktemp("whole")
    done = moetrain("run", "recipe=k2_nano_test", "wandb.mode=offline", folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "runs" / "k2_nano_test"


def test_every_stage_of_the_recipe_ends_with_what_the_next_one_takes(run: Path) -> None:
    assert [name for name in STAGES if (run / name / "done.json").is_file()] == STAGES
    for name in ("pretrain", "sft", "rl"):
        assert list((run / name / "checkpoints").glob("step_*"))
        assert (run / name / "tokenizer" / "tokenizer.json").is_file()
        assert read_metrics(run / name / "metrics.jsonl")
        assert list((run / name / "wandb").glob("offline-run-*/*.wandb"))
    for name in ("sft_export", "rl_export"):
        assert json.loads((run / name / "model" / "config.json").read_text())["quantization_config"]
    rows = json.loads((run / "verify" / "verify.json").read_text())["rows"]
    assert rows and all(row["is_kept"] for row in rows)
    assert (run / "report" / "report.html").is_file()


def test_evaluation_of_the_export_stands_beside_the_masters_and_the_earlier_one(run: Path) -> None:
    numbers = json.loads((run / "rl_eval" / "eval.json").read_text())
    assert {"modes", "masters", "divergence", "paired", "language", "graders"} <= numbers.keys()
    assert numbers["graders"]["null_policy"] == 0.0
    assert numbers["graders"]["perfect_expert"] == 1.0
    assert list((run / "rl_eval" / "traces").glob("*.jsonl"))


def test_a_stage_run_again_gives_the_same_numbers(run: Path) -> None:
    before = json.loads((run / "rl_eval" / "eval.json").read_text())
    words = ["run", "recipe=k2_nano_test", "wandb.mode=offline", "again_from=rl"]
    done = moetrain(*words, folder=run.parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((run / "rl_eval" / "eval.json").read_text()) == before
    assert (run / "rl.previous").is_dir()


def test_weights_of_every_kind_speak(run: Path) -> None:
    for place in ("sft", "rl_export", "rl_export/model"):
        words = [f"init_from={run / place}", "prompt='the list'", "max_new_tokens=4", "temperature=0"]
        done = moetrain("generate", *words)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.endswith("\n")


def test_two_ranks_that_share_the_experts_give_the_losses_of_one(tmp_path: Path) -> None:
    one = moetrain("pretrain", *TINY, "run.name=one", folder=tmp_path)
    assert one.returncode == 0, one.stderr[-4000:]
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1])}
    command = [
        "bash",
        str(ROOT / "launch" / "torchrun.sh"),
        "2",
        "pretrain",
        *TINY,
        "parallel.expert=2",
        "run.name=two",
    ]
    two = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert two.returncode == 0, two.stderr[-4000:]
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / "runs" / name / "pretrain" / "metrics.jsonl") if "loss" in row]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_mistake_is_one_line_under_torchrun_too(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "2", "pretrain", "train.stesp=3"]
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "moetrain: train.stesp: there is no 'stesp' in train; did you mean steps?\n"
    assert os.listdir(tmp_path) == []
