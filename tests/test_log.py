"""Metrics survive a stop, W&B's offline file holds what was written, progress does without a terminal."""

import io
import json
import logging
import math
import struct
import time
from pathlib import Path

import pytest
from rich.console import Console

from moetrain import log
from moetrain.errors import CheckpointError, ConfigError
from moetrain.log import Fanout, JsonlMetrics, WandbMetrics, WandbMode, progress, read_metrics, wandb_mode
from moetrain.report.shapes import validated_metrics


def test_a_run_that_goes_on_writes_each_number_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for steps in (range(1, 6), range(4, 8), range(8, 8)):
        metrics = JsonlMetrics(path)
        for step in steps:
            metrics.write(step, {"reward": 0.5})
            metrics.write(step, {"loss": 5.0 - step})
        metrics.write(7, {"validation/loss": 2.0})
        metrics.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[-1] == {"step": 7, "validation/loss": 2.0} and len(rows) == 15


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    metrics.write(0, {"train/loss": 0.1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "train/loss": 0.1}]
    metrics.close()


def test_a_metric_that_is_not_finite_is_null_in_the_file_and_absent_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path)
    metrics.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    metrics.close()
    assert path.read_text() == '{"step": 1, "train/loss": null, "train/grad_norm": null, "train/lr": 0.5}\n'
    assert validated_metrics(read_metrics(path), place=path) == [{"step": 1, "train/lr": 0.5}]


def test_a_torn_last_line_is_dropped_and_a_broken_one_before_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 1, "a"')
    assert read_metrics(path) == [{"step": 0, "a": 1.0}]
    resumed = JsonlMetrics(path)
    resumed.write(1, {"a": 2.0})
    resumed.close()
    assert path.read_text() == '{"step": 0, "a": 1.0}\n{"step": 1, "a": 2.0}\n'
    path.write_text('{"step": 0, "a": 1.0}\n{"step\n')
    assert read_metrics(path) == [{"step": 0, "a": 1.0}]
    path.write_text('{"step": 0,\n{"step": 1, "a": 1.0}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1 is not a JSON object"):
        JsonlMetrics(path)
    assert path.read_text() == '{"step": 0,\n{"step": 1, "a": 1.0}\n'


@pytest.mark.parametrize(
    "second", ['{"steq": 2, "a": 1.0}', '{"step": null, "a": 1.0}', '{"step": "b"}', '{"step": 7}']
)
def test_a_line_whose_step_is_damaged_is_named_and_costs_no_line_after_it(second: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": 1.0}}\n{second}\n{{"step": 3, "a": 1.0}}\n')
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:[23]: step is not an integer >= [17]"):
        JsonlMetrics(path)
    assert path.read_bytes() == before


def test_a_line_of_the_same_step_stays_when_only_times_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 4, "loss": 1.0, "time/checkpoint_s": 0.1}, {"step": 4, "validation/a": 2.0, "time/s": 0.2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = JsonlMetrics(path)
    again.write(4, {"validation/a": 2.0, "time/checkpoint_s": 0.3})
    again.close()
    assert read_metrics(path) == [lines[0], {"step": 4, "validation/a": 2.0, "time/checkpoint_s": 0.3}]


def test_wandb_offline_file_holds_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    offline = WandbMetrics(tmp_path, project="p", name="n", mode=WandbMode.offline, config={"lr": 0.5})
    lines = JsonlMetrics(tmp_path / "metrics.jsonl")
    both = Fanout([lines, offline])
    both.write(0, {"train/loss": 5.25})
    both.write(1, {"train/loss": 4.5})
    both.close()

    path = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    until = time.monotonic() + 30  # W&B's own process writes the file
    records = _records(path)
    while not any(record.HasField("exit") for record in records) and time.monotonic() < until:
        time.sleep(0.05)
        records = _records(path)
    history = [
        {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [float(row["train/loss"]) for row in history] == [5.25, 4.5]
    assert [int(row["_step"]) for row in history] == [0, 1]
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert config["lr"] == "0.5"


def test_a_server_that_cannot_be_reached_ends_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(log, "_WANDB_TIMEOUT_S", 1.0)
    with caplog.at_level(logging.WARNING, logger="moetrain"):
        metrics = WandbMetrics(
            tmp_path, project="p", name="n", mode=wandb_mode(WandbMode.auto), config={}, group="g", job_type="sft"
        )
    said = [record.message for record in caplog.records if record.name == "moetrain.log"]  # W&B has a log of its own
    assert metrics.fell_back and len(said) == 1 and "wandb sync" in said[0]
    lines = JsonlMetrics(tmp_path / "metrics.jsonl")
    both = Fanout([lines, metrics], first={"wandb/fell_back": 1.0})
    both.write(1, {"loss": 2.0})
    both.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    caplog.clear()
    for step in (2, 3):
        metrics.write(step, {"loss": 1.0})  # W&B refuses what comes after the end
    assert len([record for record in caplog.records if record.name == "moetrain.log"]) == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "wandb/fell_back": 1.0}]


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, WandbMode.offline),
        ({"WANDB_API_KEY": "k"}, WandbMode.online),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, WandbMode.offline),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, WandbMode.disabled),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, WandbMode.offline),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}, WandbMode.disabled),
        ({"WANDB_MODE": "online"}, WandbMode.online),
    ],
)
def test_auto_follows_the_variables_of_wandb(
    variables: dict[str, str], mode: WandbMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(WandbMode.auto) is mode
    assert wandb_mode(WandbMode.offline) is WandbMode.offline
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigError, match="WANDB_MODE is 'sometimes': set offline, online or disabled"):
        wandb_mode(WandbMode.auto)


def _records(path: Path) -> list:
    """W&B's file is a LevelDB log: blocks of 32 KiB of (crc, length, type) + data, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def test_progress_without_a_terminal_is_plain_lines_with_time_left(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO, logger="moetrain"), progress(3, "sft", console=console) as advance:
        for loss in (3.0, 2.0, 1.0):
            advance(f"loss {loss}")
    assert [record.message for record in caplog.records] == ["sft 3/3 loss 1.0, 0:00 left"]


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = io.StringIO()
    with progress(2, "sft", console=Console(file=out, force_terminal=True, width=100)) as advance:
        advance("loss 3.0")
        advance("loss 2.0")
    assert "2/2" in out.getvalue() and "loss 2.0" in out.getvalue()
