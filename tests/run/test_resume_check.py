"""What a stage left is checked before it goes on, so that a launcher starts no rank for what each would refuse."""

import json
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.train import precision

TINY = [
    *("pretrain", "model=k2_nano_test", "data=test"),
    *("train.steps=1", "train.compute_dtype=fastest", "train.kernels=torch"),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of runs that has a stage with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TINY, f"run.folder={folder}", "run.wandb.mode=disabled", "parallel.engine=torch"]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=0.5"], "optim.lr: 0.003 -> 0.5"),
        (["run.seed=3"], "seed: 0 -> 3"),
        (["data.seq_len=64"], "data.seq_len: 512 -> 64"),
    ],
)
def test_another_configuration_is_named(
    words: list[str], message: str, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *TINY, f"run.folder={begun}", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_fastest_dtype_is_not_the_one_that_it_began_with(
    begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        precision, "stored_or_measured_gain", lambda folder: 0.5 if stored_dtype(begun) == "float32" else 2.0
    )
    assert main(["check", *TINY, f"run.folder={begun}"]) == 2
    assert "train.compute_dtype: " in capsys.readouterr().err


def stored_dtype(folder: Path) -> str:
    summary = json.loads((folder / "default" / "pretrain" / "summary.json").read_text())
    return str(summary["compute_dtype"])


@pytest.mark.parametrize("words", [["parallel.zero=3"], ["train.rows_per_micro_batch=1"], ["train.checkpoint_every=7"]])
def test_the_same_configuration_in_another_layout_is_taken(words: list[str], begun: Path) -> None:
    assert main(["check", *TINY, f"run.folder={begun}", *words]) == 0


def test_a_broken_line_of_metrics_is_named(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = begun / "default" / "pretrain" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("{\n" + whole)
    try:
        assert main(["check", *TINY, f"run.folder={begun}"]) == 2
    finally:
        metrics.write_text(whole)
    assert "metrics.jsonl:1 is not a JSON object" in capsys.readouterr().err


RL = [
    *("rl", "model=k2_nano_test", "train.steps=1", "parallel.engine=torch", "run.wandb.mode=disabled"),
    *("rl.tasks_per_step=1", "rl.group_size=2", "rollout.max_turns=2", "rollout.max_turn_tokens=8"),
]


def test_an_rl_stage_that_is_refused_keeps_its_tokenizer_and_takes_other_micro_batches(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = begun / "default" / "pretrain", begun / "default" / "other"
    words = [*TINY, f"run.folder={begun}", "run.stage=other", "~data.sources.dialogues", "parallel.engine=torch"]
    assert main([*words, "run.wandb.mode=disabled"]) == 0
    tokenizers = [(stage / "tokenizer" / "tokenizer.json").read_bytes() for stage in (first, other)]
    assert tokenizers[0] != tokenizers[1]
    assert main([*RL, f"run.folder={begun}", f"init_from={first}"]) == 0
    written = begun / "default" / "rl" / "tokenizer" / "tokenizer.json"
    assert written.read_bytes() == tokenizers[0]
    assert main(["check", *RL, f"run.folder={begun}", f"init_from={first}", "rl.tokens_per_micro_batch=512"]) == 0
    assert main(["check", *RL, f"run.folder={begun}", f"init_from={first}", "rollout.num_slots=3"]) == 0
    capsys.readouterr()
    assert main([*RL, f"run.folder={begun}", f"init_from={other}"]) == 2
    assert "tokenizer: " in capsys.readouterr().err
    assert written.read_bytes() == tokenizers[0]
