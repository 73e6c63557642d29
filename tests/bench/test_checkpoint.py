"""`bench checkpoint` at the smallest size: what it reports follows from what it measures."""

import json
from pathlib import Path

import pytest

from moetrain.bench.checkpoint import render
from moetrain.cli.main import main


def test_a_checkpoint_is_written_read_and_saved_beside_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=k2_nano_test", "parallel.engine=torch", "repetitions=2", "steps=2", "turns=2", "rows=2"]
    assert main(["bench", "checkpoint", *words, "seq_len=16", f"run.folder={tmp_path}", "run.name=x"]) == 0
    folder = tmp_path / "x" / "bench_checkpoint"
    report = json.loads((folder / "bench.json").read_text())
    assert report["bytes"] > 3 * 4 * 50_000, "weights and two moments in float32"
    for seconds in report["seconds"].values():
        assert len(seconds["write"]) == len(seconds["read"]) == 2
        assert min(seconds["write"] + seconds["read"]) > 0
    assert all(wait < total for wait, total in zip(report["waited_s"], report["saving_s"], strict=True))
    assert not (folder / "files").exists()
    assert "a save every 2 steps takes" in capsys.readouterr().out


def test_rates_and_shares_are_those_of_the_measured_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    report = {
        "bytes": 200_000_000,
        "seconds": {
            "moetrain": {"write": [1.0, 2.0, 1.0], "read": [0.5, 0.5, 0.5]},
            "torch.distributed.checkpoint": {"write": [2.0, 2.0, 2.0], "read": [0.25, 0.25, 0.25]},
        },
        "steps": 10,
        "plain_s": [10.0, 10.0, 10.0],
        "saving_s": [10.1, 10.2, 10.3],
        "waited_s": [0.1, 0.1, 0.1],
    }
    for table in render(report):
        Console(width=150).print(table)
    said = capsys.readouterr().out
    assert "200 (100 - 200)" in said and "400 (400 - 400)" in said
    assert "2.00 (1.00 - 2.00)" in said and "0.50 (0.50 - 0.50)" in said
    assert "a save every 10 steps takes  2.0 %" in said
