"""The whole chain at toy size, as a user runs it; and one stage on two ranks against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.log import read_metrics
from tests.cli.command import ENVIRONMENT, ROOT, moetrain, moetrain_here

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
    assert numbers["graders"]["perfect_demonstrator"] == 1.0
    assert list((run / "rl_eval" / "traces").glob("*.jsonl"))


def test_a_stage_run_again_gives_the_same_numbers(run: Path) -> None:
    before = json.loads((run / "rl_eval" / "eval.json").read_text())
    words = ["run", "recipe=k2_nano_test", "wandb.mode=disabled", "again_from=rl"]
    done = moetrain(*words, folder=run.parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((run / "rl_eval" / "eval.json").read_text()) == before
    assert (run / "rl.previous").is_dir()


def test_weights_of_every_kind_speak(run: Path) -> None:
    for place in ("sft", "rl_export", "rl_export/model"):
        words = [f"init_from={run / place}", "prompt='the list'", "max_new_tokens=4", "temperature=0"]
        done = moetrain_here("generate", *words, folder=ROOT)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.endswith("\n")


def losses_of_one(folder: Path, *words: str) -> list[float]:
    """Return the losses of a run of one process."""
    done = moetrain("pretrain", *TINY, *words, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses_in(folder)


def losses_of_two(folder: Path, *words: str) -> list[float]:
    """Return the losses of a run of two ranks that share the experts."""
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1])}
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "2", "pretrain", *TINY, "parallel.expert=2", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return losses_in(folder)


def losses_in(folder: Path) -> list[float]:
    """Return the losses of the one run in a folder, and remove it."""
    (run,) = (folder / "runs").iterdir()
    losses = [row["loss"] for row in read_metrics(run / "pretrain" / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(folder / "runs")
    return losses


def test_two_ranks_that_share_the_experts_give_the_losses_of_one(tmp_path: Path) -> None:
    one = losses_of_one(tmp_path)
    assert len(one) == 3
    assert losses_of_two(tmp_path) == pytest.approx(one, rel=1e-5)


def test_in_bf16_two_ranks_differ_from_one_by_what_a_reordering_in_one_makes(tmp_path: Path) -> None:
    words = ["train.compute_dtype=bfloat16", "train.rows_per_step=8", "train.steps=10"]
    one = losses_of_one(tmp_path, *words, "train.rows_per_micro_batch=4")
    reordered = [losses_of_one(tmp_path, *words, f"train.rows_per_micro_batch={rows}") for rows in (1, 2)]
    spread = max(abs(loss - other) for losses in reordered for loss, other in zip(losses, one, strict=True))
    assert 0 < spread < 1e-3
    two = losses_of_two(tmp_path, *words, "train.rows_per_micro_batch=4")
    assert two == pytest.approx(one, rel=0, abs=2 * spread)


def test_a_mistake_is_one_line_under_torchrun_too(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "2", "pretrain", "train.stesp=3"]
    environment = {**ENVIRONMENT, "VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "moetrain: train.stesp: there is no 'stesp' in train; did you mean steps?\n"
    assert os.listdir(tmp_path) == []
