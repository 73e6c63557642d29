"""What a stage was made with: contents and values, not places, times or code."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetrain.run.record import Record, changes, record_of, stored_record


def record(config: dict[str, Any], folder: Path) -> Record:
    return record_of(config, run_folder=folder, inputs={})


def difference(before: Record, now: Record, **defaults: Any) -> list[str]:
    return changes(before, now, defaults=lambda: defaults)


def test_the_place_of_the_run_does_not_matter(tmp_path: Path) -> None:
    one = record({"init_from": f"{tmp_path}/a/sft", "run": {"folder": "x", "seed": 1}}, tmp_path / "a")
    other = record({"init_from": f"{tmp_path}/b/sft", "run": {"folder": "y", "seed": 1}}, tmp_path / "b")
    assert one == other


def test_contents_of_files_matter_and_times_and_names_do_not(tmp_path: Path) -> None:
    run, text, moved = tmp_path / "run", tmp_path / "notes.txt", tmp_path / "moved.txt"
    run.mkdir()
    text.write_text("one")
    config = {"data": {"path": str(text)}}
    before = record(config, run)
    os.utime(text, (1, 1))
    assert difference(before, record(config, run)) == []
    moved.write_text("one")
    assert difference(before, record({"data": {"path": str(moved)}}, run)) == []
    text.write_text("two")
    assert difference(before, record(config, run)) == [f"data.path: the content of {text} changed"]


def test_a_file_in_a_folder_that_is_renamed_or_changed_is_a_change(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "texts"
    run.mkdir(), folder.mkdir()
    (folder / "a.txt").write_text("one")
    config = {"init_from": f"{folder}/"}
    before = record(config, run)
    (folder / "a.txt").rename(folder / "b.txt")
    assert len(difference(before, record(config, run))) == 1


@pytest.mark.parametrize("added", ["b.jsonl", "deep/b.jsonl"])
def test_a_file_that_a_glob_finds_later_is_a_change(added: str, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "texts"
    run.mkdir(), (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text("one")
    config = {"data": {"sources": {"mine": {"path": f"{folder}/**/*.jsonl"}}}}
    before = record(config, run)
    assert difference(before, record(config, run)) == []
    (folder / added).write_text("two")
    assert len(difference(before, record(config, run))) == 1


@pytest.mark.parametrize("key", ["init_from", "eval.before", "data.path"])
def test_a_folder_without_a_slash_is_a_folder(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir(), (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.safetensors").write_text("one")
    before = record({key: "weights"}, tmp_path / "run")
    (tmp_path / "weights" / "a.safetensors").write_text("two")
    assert len(difference(before, record({key: "weights"}, tmp_path / "run"))) == 1


@pytest.mark.parametrize(("key", "nothing"), [("init_from", None), ("plugins", []), ("data.path", None)])
def test_a_file_that_is_added_or_left_out_is_a_change(key: str, nothing: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "one.py").write_text("one = 1\n")
    given = [str(tmp_path / "one.py")] if nothing == [] else str(tmp_path / "one.py")
    with_it, without = (record({key: value}, tmp_path / "run") for value in (given, nothing))
    assert len(difference(without, with_it)) == len(difference(with_it, without)) == 1


def test_a_data_set_of_megatron_is_named_without_its_endings(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for ending in ("bin", "idx"):
        (tmp_path / f"web.{ending}").write_text("one")
    config = {"data": {"sources": {"web": {"path": f"{tmp_path}/web"}}}}
    before = record(config, tmp_path / "run")
    (tmp_path / "web.bin").write_text("two")
    assert len(difference(before, record(config, tmp_path / "run"))) == 1


def test_a_record_of_a_version_that_hashed_all_files_of_a_stage_is_no_change(tmp_path: Path) -> None:
    run, stage = tmp_path / "run", tmp_path / "pretrain"
    run.mkdir(), (stage / "model").mkdir(parents=True)
    for name in ("config.yaml", "model/a.safetensors", "made_by.json"):
        (stage / name).write_text("one")
    now = record({"init_from": str(stage)}, run)
    assert now.files != now.older
    older = replace(now, files=now.older)
    assert difference(older, record({"init_from": str(stage)}, run)) == []
    (stage / "model" / "a.safetensors").write_text("two")
    assert len(difference(older, record({"init_from": str(stage)}, run))) == 1
    assert set(now.stored()) == {"config", "files", "inputs"}


def test_what_a_stage_notes_of_its_run_is_no_change_of_its_weights(tmp_path: Path) -> None:
    run, stage = tmp_path / "run", tmp_path / "pretrain"
    run.mkdir(), (stage / "model").mkdir(parents=True)
    for name in ("config.yaml", "model/a.safetensors", "made_by.json", ".lock"):
        (stage / name).write_text("one")
    before = record({"init_from": str(stage)}, run)
    (stage / "made_by.json").write_text("two")
    (stage / ".lock").write_text("two")
    assert difference(before, record({"init_from": str(stage)}, run)) == []
    (stage / "model" / "a.safetensors").write_text("two")
    assert len(difference(before, record({"init_from": str(stage)}, run))) == 1


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"train": {"steps": 3}}, {"train": {"steps": 4}}, ["train.steps: 3 -> 4"]),
        ({"train": {"steps": 3}}, {"train": {"steps": 3, "new": 7}}, []),  # its default
        ({"train": {"steps": 3}}, {"train": {"steps": 3, "new": 8}}, ["train.new: 7 -> 8"]),
        ({"train": {"steps": 3, "old": 1}}, {"train": {"steps": 3}}, []),  # exists no more
        ({"data": {"a": {"n": 1}}}, {"data": {"a": {"n": 1}, "b": {"n": 2}}}, ["data.b.n: nothing -> 2"]),
        ({"data": {"a": {"n": 1}, "b": {"n": 2}}}, {"data": {"a": {"n": 1}}}, ["data.b: removed"]),
        ({"data": {"a": {"n": 1}}}, {"data": {"a": {"n": 1, "added": 2}}}, []),  # of a later version
    ],
)
def test_what_changed_is_named(before: dict[str, Any], now: dict[str, Any], found: list[str], tmp_path: Path) -> None:
    assert difference(record(before, tmp_path), record(now, tmp_path), **{"train.new": 7}) == found


def test_a_damaged_record_is_read_from_the_config(tmp_path: Path) -> None:
    assert stored_record(tmp_path) is None
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\nrun: {folder: runs, name: mine}\n")
    for damaged in ("{", "[]", '{"config": {}}'):
        (tmp_path / "started.json").write_text(damaged)
        before = stored_record(tmp_path)
        assert before is not None
        now = record({"train": {"steps": 4}, "run": {"folder": "runs", "name": "mine"}}, Path("runs/mine"))
        assert difference(before, now) == ["train.steps: 3 -> 4"]


def test_an_input_that_was_made_again_is_a_change(tmp_path: Path) -> None:
    before = record_of({}, run_folder=tmp_path, inputs={"sft": "first"})
    now = record_of({"a": 1}, run_folder=tmp_path, inputs={"sft": "second"})
    before = Record(config=now.config, files={}, inputs=before.inputs)
    assert difference(before, now) == ["its input stage sft was run again"]
