"""The stages of recipes/marathon, at toy size: contexts with notes in SFT, RL, evaluation and report."""

import json
from pathlib import Path

from tests.cli.command import moetrain


def test_the_stages_of_the_marathon_work_together(tmp_path: Path) -> None:
    done = moetrain("run", "recipe=marathon_test", "wandb.mode=disabled", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "marathon_test"
    numbers = json.loads((run / "rl_eval" / "eval.json").read_text())
    assert numbers["task"]["context"] == {"kind": "notes", "min_calls": 1, "max_calls": 8}
    assert {"greedy", "greedy_longer", "voted_longer"} <= numbers["modes"].keys()
    assert numbers["modes"]["voted_longer"]["samples_per_turn"] >= 2
    assert set(numbers["modes"]["greedy_longer"]["by_calls"]) == {"25", "300"}
    assert numbers["graders"]["perfect_demonstrator"] == 1.0 and numbers["graders"]["null_policy"] == 0.0
    rows = [json.loads(line) for line in (run / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert any("staleness_max" in row for row in rows)
    assert not (run / "rl" / "collection").exists(), "the last checkpoint contains all trajectories"
    assert "success by tool calls" in (run / "report" / "report.html").read_text()
