import json
import shutil
from pathlib import Path

import pytest

from moetrain.commands.schemas import SCHEMAS
from moetrain.compose import compose, save_config
from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.report.stages import Kind, read_run
from tests.report.nano_run import STAGES


def test_stages_are_known_by_their_configs_and_go_back_to_the_stage_that_trained_the_weights(finished: Path) -> None:
    run = read_run(finished, [])
    assert {stage.name: (stage.kind, stage.trained_by) for stage in run.stages} == {
        "pretrain": (Kind.training, "pretrain"),
        "sft": (Kind.training, "sft"),
        "sft_export": (Kind.export, "sft"),
        "sft_eval": (Kind.evaluation, "sft"),
        "rl": (Kind.rl, "rl"),
        "rl_export": (Kind.export, "rl"),
        "rl_eval": (Kind.evaluation, "rl"),
        "verify": (Kind.other, "rl"),
    }
    assert all(stage.is_finished for stage in run.stages)


def test_without_a_list_each_stage_comes_after_those_it_takes(own: Path) -> None:
    for name in ("sft.previous", "sft.previous.2"):
        shutil.copytree(own / "sft", own / name)
    (own / "sft.previous.2" / "config.yaml").write_text("run: [")
    order = [stage.name for stage in read_run(own, []).stages]
    assert sorted(order) == sorted(STAGES)
    for earlier, later in [("pretrain", "sft"), ("sft", "rl"), ("sft_eval", "rl_eval"), ("rl_export", "rl_eval")]:
        assert order.index(earlier) < order.index(later)


def test_a_list_of_stages_gives_their_order_and_names_those_that_have_not_begun(own: Path) -> None:
    shutil.rmtree(own / "rl")
    run = read_run(own, [str(own / name) for name in ("sft_eval", "pretrain", "rl")])
    assert [stage.name for stage in run.stages] == ["sft_eval", "pretrain"]
    assert run.missing == ["rl"] and "rl (not begun)" in run.unfinished


def test_weights_that_two_evaluations_share_have_two_names(own: Path) -> None:
    shutil.copytree(own / "rl_eval", own / "again")
    run = read_run(own, [])
    assert [stage.weights for stage in run.evaluations] == ["sft", "rl (again)", "rl (rl_eval)"]


def test_weights_are_led_back_through_stages_that_are_not_shown(finished: Path) -> None:
    run = read_run(finished, [str(finished / "rl_eval")])
    assert run.evaluations[0].weights == "rl"


def test_a_stage_that_has_only_begun_is_there_without_numbers(own: Path) -> None:
    for name in ("summary.json", "done.json", "metrics.jsonl"):
        (own / "sft" / name).unlink()
    (own / "rl_eval" / "eval.json").unlink()
    run = read_run(own, [])
    assert [stage.name for stage in run.stages if not stage.is_finished] == ["sft", "rl_eval"]
    assert [stage.name for stage in run.evaluations] == ["sft_eval"]


def test_folders_of_every_command_are_read(own: Path) -> None:
    for command in (name for name in SCHEMAS if name != "run"):
        stage = command.replace(" ", "_") + "_too"
        (own / stage).mkdir()
        save_config(compose(command, [f"run.folder={own.parent}", f"run.name={own.name}"]), own / stage / "config.yaml")
    counts = {"total": 1, "routed": 1, "active": 1, "active_with_head": 1}
    summary = {"stage": "upcycle_too", "parameters": {"dense": counts, "sparse": counts}, "plan": {}}
    (own / "upcycle_too" / "summary.json").write_text(json.dumps(summary))
    names = {stage.name for stage in read_run(own, []).stages}
    assert {"verify_faults_too", "upcycle_too", "bench_train_too"} <= names


def test_a_folder_without_stages_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no stage with a config\.yaml"):
        read_run(tmp_path / "nowhere", [])


def test_a_file_that_cannot_be_read_is_named(own: Path) -> None:
    (own / "rl_eval" / "eval.json").write_text('{"modes": ')
    with pytest.raises(DataError, match=r"rl_eval/eval\.json is not JSON"):
        read_run(own, [])
    (own / "rl_eval" / "eval.json").write_text("[]")
    with pytest.raises(DataError, match=r"rl_eval/eval\.json: .* is not of type"):
        read_run(own, [])
    (own / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"sft/metrics\.jsonl:2"):
        read_run(own, [])
    (own / "pretrain" / "config.yaml").write_text("a: [1")
    with pytest.raises(DataError, match=r"pretrain/config\.yaml is not YAML"):
        read_run(own, [])
