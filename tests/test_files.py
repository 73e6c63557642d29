"""Files appear whole or not at all, and JSON holds no NaN."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from moetrain import files
from moetrain.files import (
    cached_json,
    read_json_or_empty,
    replace_folder,
    to_json,
    write_json,
    write_json_lines,
    write_result,
    write_text,
)


def _strict(text: str) -> object:
    def refuse(name: str) -> object:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_cannot_express_become_null_at_every_depth(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN"}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN"}
    assert _strict(to_json(content)) == expected
    write_json(tmp_path / "x.json", content)
    write_json_lines(tmp_path / "x.jsonl", [content, {"e": 1}])
    assert _strict((tmp_path / "x.json").read_text()) == expected
    assert [_strict(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [expected, {"e": 1}]


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "x.txt"
    write_text(path, "earlier")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "later")
    assert path.read_text() == "earlier" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", [None, "", '{"a": ', "[1]"])
def test_a_cache_that_is_missing_or_torn_is_empty(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cache.json").write_text(text)
    assert read_json_or_empty(tmp_path / "cache.json") == {}


def test_what_is_cached_is_made_once_and_again_when_its_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"b": "ü\n", "a": [1, None]}

    path = tmp_path / "moetrain" / "x-1.json"
    for expected, text in (
        (1, None),
        (1, None),
        (2, "{"),
        (3, '{"sha256": 1, "content": {}}'),
        (4, '{"content": null}'),
    ):
        if text is not None:
            path.write_text(text)
        assert list(cached_json("x-1.json", make).items()) == [("b", "ü\n"), ("a", [1, None])]
        assert len(made) == expected
    path.write_text(path.read_text().replace("null", "7"))  # valid JSON with another content
    assert cached_json("x-1.json", make)["a"] == [1, None]


@pytest.mark.parametrize("folder", ["file", "link"])
def test_without_a_cache_folder_that_can_be_written_nothing_is_stored(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")  # cannot be read as a folder
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "folder")  # reads as if it were empty
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    assert cached_json("x.json", lambda: {"a": (1, 2)}) == {"a": [1, 2]}


def test_a_link_to_a_folder_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").touch()
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "new").touch()
    replace_folder(tmp_path / "partial", tmp_path / "final")
    assert not (tmp_path / "final").is_symlink() and (tmp_path / "final" / "new").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "final"]
    assert (tmp_path / "elsewhere" / "old").is_file()


def test_a_result_that_differs_stands_beside_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert write_result(path, {"tokens": 1}) is None
    assert write_result(path, {"tokens": 1}) is None
    (tmp_path / "config.yaml").write_text("of the first")
    assert write_result(path, {"tokens": 2}) == tmp_path / "bench.json.previous"
    assert json.loads((tmp_path / "bench.json.previous").read_text()) == {"tokens": 1}
    assert (tmp_path / "config.yaml.previous").read_text() == "of the first"
    assert json.loads(path.read_text()) == {"tokens": 2}


def test_what_belongs_to_an_earlier_result_is_kept_with_the_same_ending(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write_result(path, {"solved": 1})
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "greedy.jsonl").write_text("first")
    (tmp_path / "config.yaml").write_text("of the first")
    (tmp_path / "eval.json.previous").symlink_to(tmp_path / "nowhere")
    assert write_result(path, {"solved": 2}, beside=("config.yaml", "traces")) == tmp_path / "eval.json.previous.2"
    assert (tmp_path / "traces.previous.2" / "greedy.jsonl").read_text() == "first"
    assert (tmp_path / "config.yaml.previous.2").read_text() == (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "traces").exists()


def test_a_result_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "verify.json"
    write_result(path, {"rows": 1})

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_result(path, {"rows": 2})
    assert json.loads(path.read_text()) == {"rows": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["verify.json"]
