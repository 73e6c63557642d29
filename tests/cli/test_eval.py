"""`moetrain eval`: an earlier evaluation that cannot be paired with is refused before anything runs."""

import json
from pathlib import Path

import pytest

from moetrain.cli.eval import main
from moetrain.compose import compose, save_config
from moetrain.errors import CheckpointError

GOOD = json.dumps({"modes": {"greedy": {"outcomes": [True, False, True, True]}}})


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"modes": ', [], r"eval\.json: not readable as JSON"),
        ('{"modes": 3}', [], r"eval\.before: .*eval\.json holds no outcomes; run that evaluation again"),
        (GOOD, ["eval.num_tasks=4"], r"before evaluated other tasks \(eval\.num_tasks: 4 -> 2\); give the same ones"),
        (GOOD, ["eval.num_tasks=2", "task.max_calls=3"], r"evaluated other tasks \(task\.max_calls: 3 -> 8\)"),
        (None, [], r"eval\.before: there is no .*eval\.json; give the folder of an evaluation that is done"),
    ],
)
def test_an_earlier_evaluation_that_cannot_be_paired_is_refused(
    content: str | None, settings: list[str], message: str, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    before.mkdir()
    save_config(compose("eval", settings), before / "config.yaml")
    if content is not None:
        (before / "eval.json").write_text(content)
    words = [f"init_from={tmp_path}", f"eval.before={before}", "eval.num_tasks=2", f"run.folder={tmp_path / 'runs'}"]
    with pytest.raises(CheckpointError, match=message):
        main(compose("eval", words))
    assert not (tmp_path / "runs").exists()
