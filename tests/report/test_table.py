import io
import json
import shutil
from pathlib import Path

from rich.console import Console

from moetrain.report.stages import read_run
from moetrain.report.table import length_table, markdown, rate_text, show, tables, validation_table


def test_the_tables_tell_what_the_run_did(finished: Path) -> None:
    by_title = {table.title.split(",")[0]: table for table in tables(read_run(finished, []))}
    loss = by_title["Validation loss"]
    assert loss.header == ["source", "bigram", "after pretrain", "after sft", "sft, exported", "rl, exported"]
    assert loss.rows[1] == ["english", "1.2500", "0.7500", "-", "0.9000", "0.9000"]
    success = by_title["Held-out success"]
    assert success.header[1:] == [
        "after sft, sampled T=1",
        "after sft, greedy",
        "after rl, sampled T=1",
        "after rl, greedy",
    ]
    rows = {row[0]: row[1:] for row in success.rows}
    assert rows["2"] == rows["all"] == ["50.0 [25-75]", "50.0 [25-75]", "91.7 [65-99]", "91.7 [65-99]"]
    assert rows["after tool error"][3].startswith("100.0 ")
    assert rows["9, longer"] == rows["all longer"] == ["-", "0.0 [0-66]", "-", "0.0 [0-66]"]
    assert any("null policy 0 %, the perfect demonstrator 100 %" in note for note in success.notes)
    assert by_title["Against the earlier evaluation"].rows[0][:2] == ["rl greedy", "+41.7"]
    int4 = by_title["INT4 beside the bf16 masters"]
    assert int4.rows[3][:3] == ["rl greedy", "91.7 [65-99]", "91.7 [65-99]"]
    assert "KL(bf16 || INT4) 0.0001" in int4.notes[0]
    assert int4.notes[1].endswith("2.5 % of the codes and 5 % of the scales differ from those of sft_export")
    lengths = length_table(read_run(finished, []))
    assert lengths is not None and lengths.rows[0][0] == "sft sampled T=1" and len(lengths.rows[0]) == 4
    assert lengths.header[-1] == "sampled tokens"
    assert by_title["Exported size"].rows[1] == ["rl", "int4", "0.30 MB", "1.20 MB", "0.250"]


def test_the_titles_name_the_format_of_the_weights_and_no_row_is_of_failures_that_never_happened(own: Path) -> None:
    for path in own.glob("*/eval.json"):
        numbers = json.loads(path.read_text())
        numbers["weights_format"] = "mxfp4"
        for summary in numbers["modes"].values():
            summary["after_tool_error"] |= {"count": 0, "value": None}
        path.write_text(json.dumps(numbers))
    by_title = {table.title.split(",")[0]: table for table in tables(read_run(own, []))}
    success = by_title["Held-out success"]
    assert success.title == "Held-out success, MXFP4 weights"
    assert not {"after tool error", "without tool error"} & {row[0] for row in success.rows}
    assert by_title["MXFP4 beside the bf16 masters"].header[1] == "MXFP4"


def test_votes_are_told_with_their_samples_per_turn(own: Path) -> None:
    path = own / "rl_eval" / "eval.json"
    numbers = json.loads(path.read_text())
    numbers["modes"]["voted_longer"] = numbers["modes"]["greedy"] | {"samples_per_turn": 3.2}
    path.write_text(json.dumps(numbers))
    lengths = length_table(read_run(own, []))
    assert lengths is not None and lengths.header[-1] == "samples per turn"
    assert {row[0]: row[-1] for row in lengths.rows if row[-1] != "1"} == {
        "rl each turn voted on, longer chains": "3.20"
    }


def test_a_rate_without_tasks_is_no_rate() -> None:
    assert rate_text({"count": 0, "value": float("nan"), "low": 0.0, "high": 1.0}) == "-"
    assert rate_text(None) == "-"


def test_a_run_that_stopped_early_has_the_tables_of_what_it_did(own: Path) -> None:
    for path in own.iterdir():
        if path.name != "pretrain":
            shutil.rmtree(path)
    made = tables(read_run(own, []))
    assert [table.title.split(",")[0] for table in made] == ["Validation loss"]
    assert made[0].header == ["source", "bigram", "after pretrain"]


def test_no_number_is_cut_on_a_narrow_terminal(finished: Path) -> None:
    written = io.StringIO()
    made = tables(read_run(finished, []))
    show(made, Console(file=written, width=60))
    text = written.getvalue()
    assert "continued" in text
    assert all(len(line) <= 60 for line in text.splitlines())
    assert all(cell in text for table in made for row in table.rows for cell in row[1:])


def test_markdown_keeps_every_cell_in_its_column(finished: Path) -> None:
    table = validation_table(read_run(finished, []))
    assert table is not None
    table.rows[0][0] = "a|b"
    lines = markdown(table).splitlines()
    assert lines[4] == "| a\\|b | 1.2500 | 0.7500 | 0.7500 | 0.8000 | 0.8000 |"
    assert lines[3].count("---") == len(table.header)
