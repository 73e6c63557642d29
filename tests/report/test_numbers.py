import json
from pathlib import Path

from moetrain.report.numbers import mode_title, results, times, validation
from moetrain.report.stages import read_run
from tests.report.nano_run import moved


def test_results_have_no_times_and_no_places(finished: Path, tmp_path: Path) -> None:
    again = moved(finished, tmp_path / "elsewhere", seconds=99.0)
    first, second = (read_run(folder, []) for folder in (finished, again))
    assert json.dumps(results(first)) == json.dumps(results(second))
    assert times(first) != times(second)
    assert str(tmp_path) not in json.dumps(results(second))


def test_results_are_strict_json_without_the_outcome_of_each_task(finished: Path) -> None:
    content = json.loads(json.dumps(results(read_run(finished, [])), allow_nan=False))
    greedy = content["evaluations"]["rl_eval"]["modes"]["greedy"]
    assert greedy["all"]["successes"] == 11
    assert "outcomes" not in greedy
    assert content["evaluations"]["rl_eval"]["modes"]["greedy_longer"]["after_tool_error"]["value"] is None
    assert content["digests"]["rl_export"] == {"export": "of rl"}
    assert content["sizes"]["rl"] == {"format": "int4", "bytes": 300_000, "bf16_bytes": 1_200_000}


def test_a_source_has_the_bigram_of_the_first_stage_that_reads_it(finished: Path) -> None:
    found = validation(read_run(finished, []))
    assert list(found) == ["code", "english", "dialogues"]
    assert found["code"] == {
        "bigram": 1.25,
        "bigram_of": "pretrain",
        "stages": {"pretrain": 0.75, "sft": 0.75},
        "exports": {"sft": 0.8, "rl": 0.8},
    }
    assert found["dialogues"]["bigram_of"] == "sft"


def test_a_stage_that_holds_other_rows_out_is_not_set_beside_the_bigram(finished: Path, tmp_path: Path) -> None:
    run = moved(finished, tmp_path, seconds=1.0)
    file = run / "sft" / "summary.json"
    summary = json.loads(file.read_text())
    summary["validation"]["code"]["characters"] += 1
    file.write_text(json.dumps(summary))
    found = validation(read_run(run, []))
    assert found["code"]["stages"] == {"pretrain": 0.75}
    assert found["dialogues"]["stages"] == {"sft": 0.75}


def test_modes_have_titles() -> None:
    assert mode_title("sampled_t0.6") == "sampled T=0.6"
    assert mode_title("greedy") == "greedy"
