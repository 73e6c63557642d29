"""Faults cost time and no more; a planted fault is found. The whole measurement is `moetrain verify faults`."""

from pathlib import Path

import pytest

from moetrain.compose import compose
from moetrain.errors import BoundError, ConfigError
from moetrain.verify.faults import Phase, Request, shares, verify_faults
from moetrain.verify.recipe_faults import comparison_rows, recipe_rows
from moetrain.verify.table import check_rows


def _request(*, kills: int, planted: str, collection_kills: int = 0, recipe_kills: int = 0) -> Request:
    return Request(
        model="k2_nano_test",
        kills=kills,
        collection_kills=collection_kills,
        recipe="marathon_test",
        recipe_kills=recipe_kills,
        ranks=1,
        with_others=False,
        overrides=("parallel.engine=torch",),
        planted=planted,
        seed=0,
    )


def test_kills_inside_a_save_and_around_its_rename_change_no_bit(tmp_path: Path) -> None:
    rows = verify_faults(tmp_path, _request(kills=2, planted="none", collection_kills=1))
    check_rows(rows)
    names = {"kills in a save that did not land", "1 process: metrics lines that differ"}
    assert names | {"1 process: trajectories lost or collected twice"} <= {row.name for row in rows}


_RECIPE = """stages:
  - name: sft
    command: sft
    overrides: [model=k2_nano_test, data=test, train.steps=3, train.rows_per_step=2, train.rows_per_micro_batch=2]
  - name: export
    command: export
    overrides: ["init_from=${stage:sft}"]
"""


def test_a_recipe_that_is_killed_in_each_stage_writes_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
    rows = recipe_rows(tmp_path, recipe=str(tmp_path), kills=2, seed=0, advance=lambda _: None)
    check_rows(rows)
    assert rows[0].note.endswith("landed in sft 1, export 1")


def test_a_file_or_a_metric_of_a_recipe_that_differs_is_found(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        stage = tmp_path / name / "rl"
        stage.mkdir(parents=True)
        (stage / "metrics.jsonl").write_text(f'{{"step": 1, "reward": 0.5, "time/step_s": {len(name)}}}\n')
        (stage / "done.json").write_text(name)  # contains times
        (stage / "traces").mkdir()
        (stage / "traces" / "greedy.jsonl").write_text("{}")
    assert [row.value for row in comparison_rows(tmp_path / "whole", tmp_path / "killed")] == [0, 0]
    (tmp_path / "killed" / "rl" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n')
    (tmp_path / "killed" / "rl" / "traces" / "greedy.jsonl").write_text("{} ")
    assert [row.value for row in comparison_rows(tmp_path / "whole", tmp_path / "killed")] == [1, 1]


def test_a_run_that_goes_on_at_the_wrong_step_is_found(tmp_path: Path) -> None:
    with pytest.raises(BoundError, match="1 process: metrics lines that differ"):
        check_rows(verify_faults(tmp_path, _request(kills=1, planted="step")))


def test_thirty_kills_are_spread_as_promised() -> None:
    assert shares(30, ranks=2) == {Phase.save: 10, Phase.rename: 5, Phase.collective: 6, Phase.step: 9}
    assert sum(shares(7, ranks=1).values()) == 7


def test_a_fault_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fault is 'moon': there are none, step, weight"):
        compose("verify faults", ["fault=moon"])
