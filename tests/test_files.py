"""Files appear whole or not at all, and JSON holds no NaN."""

import json
import math
import os
from pathlib import Path

import pytest

from moetrain.files import read_json_or_empty, to_json, write_json, write_json_lines, write_text


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
