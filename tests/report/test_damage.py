"""A file of a stage that was damaged in any place: the report is still whole, or one error names the file."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.report.config import ReportConfig
from moetrain.report.stages import read_run
from moetrain.report.write import write_report

_CASES = 10  # a file
_WRONG: list[Any] = [None, "?", [], {}, 3, True, [{}]]
FILES = [
    *("sft/config.yaml", "rl_eval/config.yaml", "sft/summary.json", "sft_eval/eval.json", "rl_eval/eval.json"),
    *("rl_export/summary.json", "rl_export/model/moetrain.json", "verify/verify.json", "sft/done.json"),
    *("sft/metrics.jsonl", "rl/metrics.jsonl", "rl_eval/traces/greedy.jsonl"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_value_of_another_kind_is_shown_or_named(own: Path, name: str) -> None:
    path = own / name
    content = _read(path)
    places = list(_places(content))
    chosen = random.Random(name)
    for _ in range(_CASES):
        place, wrong = chosen.choice(places), chosen.choice([*_WRONG, _GONE])
        _write(path, _changed(content, place, wrong))
        try:
            write_report(read_run(own, []), ReportConfig(), folder=own / "report")
        except (CheckpointError, ConfigError, DataError) as error:
            assert name in str(error) and "\n" not in str(error), (place, wrong)


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_no_text_are_named(own: Path, name: str) -> None:
    path = own / name
    whole = path.read_bytes()
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])
    with pytest.raises((CheckpointError, DataError), match=name):
        write_report(read_run(own, []), ReportConfig(), folder=own / "report")


_GONE = object()


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in children:
        yield from _places(value, (*place, key))


def _changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = deepcopy(content)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if value is _GONE:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return changed


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def _write(path: Path, content: Any) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content), encoding="utf-8")


def test_a_validation_that_is_not_finite_is_shown(own: Path) -> None:
    path = own / "sft" / "summary.json"
    summary = json.loads(path.read_text())
    for row in summary["validation"].values():
        row["nats_per_character"] = None  # how NaN is written
    path.write_text(json.dumps(summary))
    write_report(read_run(own, []), ReportConfig(), folder=own / "report")
    assert "nan" in (own / "report" / "report.html").read_text()
