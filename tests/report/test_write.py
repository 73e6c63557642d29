import json
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.errors import ConfigError
from moetrain.report.config import ReportConfig
from moetrain.report.stages import read_run
from moetrain.report.write import write_report
from tests.report.nano_run import moved


def test_the_numbers_of_two_equal_runs_are_the_same_files(finished: Path, tmp_path: Path) -> None:
    again = moved(finished, tmp_path / "elsewhere", seconds=77.0)
    for name, folder in (("first", finished), ("second", again)):
        write_report(read_run(folder, []), ReportConfig(), folder=tmp_path / name)
    for name in ("results.json", "results.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "report.html",
        "results.json",
        "results.md",
        "times.json",
    ]


def test_half_a_surrogate_pair_in_an_edited_trace_ends_no_report(own: Path) -> None:
    path = own / "rl_eval" / "traces" / "greedy.jsonl"
    trace = json.loads(path.read_text().splitlines()[0])
    trace["text"] = trace["text"].replace("<|im_middle|>", "<|im_middle|>half \ud83d", 1)
    path.write_text(json.dumps(trace) + "\n")
    assert main(["report", f"run.folder={own.parent}", f"run.name={own.name}"]) == 0
    assert "half ?" in (own / "report" / "report.html").read_text()


def test_the_command_prints_the_tables_and_where_the_files_lie(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"run.folder={own.parent}", f"run.name={own.name}"]) == 0
    said = capsys.readouterr().out
    for text in (
        "Validation loss",
        "Held-out success",
        "INT4 beside",
        "Exported size",
        "report.html",
        "rl_export/model",
    ):
        assert text in said
    assert (own / "report" / "report.html").is_file()
    # The report is no stage of what it reports.
    assert "report" not in [stage.name for stage in read_run(own, []).stages]


def test_a_run_that_is_not_there_ends_with_code_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", f"run.folder={tmp_path}", "run.name=nowhere"]) == 2
    assert "nowhere has no stage" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_trajectories_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_trajectories is -1"):
        ReportConfig(num_trajectories=-1)
