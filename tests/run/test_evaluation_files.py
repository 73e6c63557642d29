"""Files of an evaluation: numbers and trajectories that belong together, whatever ran in the folder before."""

import json
from pathlib import Path

from moetrain.run.evaluation_files import EvaluationFiles
from tests.even_task import even_tokenizer
from tests.rollout.test_journal import finished_trajectory


def _evaluate(folder: Path, number: int, *, is_killed: bool = False) -> EvaluationFiles:
    """Evaluate two modes on task `number`; a mode that was finished is not run again."""
    files = EvaluationFiles(folder, num_traces=4)
    for mode in ("greedy", "sampled_t0.5"):
        key = files.finished.key_of([mode, number])
        if files.finished.get(key) is None:
            files.keep_traces(f"{mode}.{key}", [finished_trajectory(number)], tokenizer=even_tokenizer())
            files.finished.add(key, {"task": number})
        if is_killed:
            return files
    files.publish({"task": number})
    return files


def _tasks(folder: Path) -> dict[str, list[int]]:
    return {
        path.stem: [json.loads(line)["task"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def test_numbers_and_trajectories_are_of_the_same_evaluation(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("first")
    _evaluate(tmp_path, 1)
    assert _tasks(tmp_path / "traces") == {"greedy": [1], "sampled_t0.5": [1]}
    _evaluate(tmp_path, 2, is_killed=True)
    assert json.loads((tmp_path / "eval.json").read_text()) == {"task": 1}
    assert _tasks(tmp_path / "traces") == {"greedy": [1], "sampled_t0.5": [1]}
    _evaluate(tmp_path, 3, is_killed=True)  # of other settings: its trajectories are not those of the next one
    _evaluate(tmp_path, 2)
    assert json.loads((tmp_path / "eval.json").read_text()) == {"task": 2}
    assert _tasks(tmp_path / "traces") == {"greedy": [2], "sampled_t0.5": [2]}
    assert json.loads((tmp_path / "eval.json.previous").read_text()) == {"task": 1}
    assert _tasks(tmp_path / "traces.previous") == {"greedy": [1], "sampled_t0.5": [1]}
    assert (tmp_path / "config.yaml.previous").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.yaml", "config.yaml.previous", "eval.json", "eval.json.previous", "traces", "traces.previous"),
    ]


def test_an_evaluation_with_the_same_numbers_replaces_its_files(tmp_path: Path) -> None:
    for _ in range(2):
        _evaluate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "traces"]
    assert _tasks(tmp_path / "traces") == {"greedy": [1], "sampled_t0.5": [1]}
