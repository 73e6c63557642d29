"""What a recipe says of its stages: the time that is left, and how a stage that is refused is continued."""

import json
import os
from pathlib import Path

from moetrain.commands.recipe import RecipeRun, ReportRun
from moetrain.compose import compose
from moetrain.run.recipe import Stage
from moetrain.run.runner import Prepared, _refusal, _time_left


def finish(folder: Path, seconds: float, *, time: int) -> None:
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": seconds}))
    os.utime(folder / "done.json", (time, time))


def test_the_time_left_is_what_the_stages_took_last_or_unknown(tmp_path: Path) -> None:
    stages = [
        Stage(name=name, composed=dict, command="report", config=ReportRun(), inputs=[], processes=1)
        for name in ("sft", "export")
    ]
    prepared = Prepared(run=RecipeRun(), folder=tmp_path, stages=stages)
    assert _time_left(prepared, 0) == "unknown"
    finish(tmp_path / "sft.previous", 10, time=1)
    finish(tmp_path / "sft.previous.2", 70, time=2)
    assert _time_left(prepared, 0) == "unknown"  # export has never finished
    finish(tmp_path / "export", 5, time=3)
    assert (_time_left(prepared, 0), _time_left(prepared, 1), _time_left(prepared, 2)) == (
        "about 1:15",
        "about 0:05",
        "about 0:00",
    )


def test_a_stage_that_trains_takes_longer_with_more_steps(tmp_path: Path) -> None:
    config = compose("pretrain", ["model=k2_nano_test", "data=test", "train.steps=300"])
    stage = Stage(name="pretrain", composed=dict, command="pretrain", config=config, inputs=[], processes=1)
    prepared = Prepared(run=RecipeRun(), folder=tmp_path, stages=[stage])
    finish(tmp_path / "pretrain.previous", 10, time=1)
    assert _time_left(prepared, 0) == "about 0:10"  # its config is not there
    for content, left in (("train: {steps: 3}", "about 16:40"), ("train: {steps: none}", "about 0:10")):
        (tmp_path / "pretrain.previous" / "config.yaml").write_text(content)
        assert _time_left(prepared, 0) == left


def test_a_stage_that_never_finished_takes_what_the_recipe_states_scaled_to_this_machine(tmp_path: Path) -> None:
    stages = [
        Stage(name=name, composed=dict, command="report", config=ReportRun(), inputs=[], processes=1, seconds=seconds)
        for name, seconds in (("pretrain", 40), ("sft", 200), ("rl", 100))
    ]
    prepared = Prepared(run=RecipeRun(), folder=tmp_path, stages=stages)
    assert _time_left(prepared, 0) == "about 5:40"
    finish(tmp_path / "pretrain", 80, time=1)  # half as fast as the machine of the recipe
    assert _time_left(prepared, 1) == "about 10:00"
    finish(tmp_path / "sft", 220, time=2)
    assert _time_left(prepared, 2) == "about 2:05"


def test_a_refusal_says_how_to_continue_where_that_is_possible(tmp_path: Path) -> None:
    sft, export = (
        Stage(name=name, composed=dict, command=name, config=config, inputs=[], processes=1)
        for name, config in (("sft", compose("sft", ["data=test"])), ("export", compose("export", ["init_from=x"])))
    )
    prepared = Prepared(run=RecipeRun(), folder=tmp_path, stages=[sft, export])
    for change in ("train.steps: 3 -> 5", "optim.lr: 0.1 -> 0.2", "data.mix: [] -> [1]"):
        said = str(_refusal(prepared, sft, [change]))
        assert "continue_from=${stage:sft} and train.continue_as=part or whole" in said
        assert "\n" not in said
    assert "continue_from" not in str(_refusal(prepared, sft, ["model.hidden_size: 1 -> 2"]))
    assert "continue_from" not in str(_refusal(prepared, export, ["train.steps: 3 -> 5"]))
