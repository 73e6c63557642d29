"""The loop: stopping loses nothing, whatever stops it."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import CheckpointError, DivergenceError
from moetrain.log import JsonlMetrics
from moetrain.parallel.config import EngineName
from moetrain.train import checkpoint
from moetrain.train.config import TrainConfig
from moetrain.train.interrupt import Status
from moetrain.train.loop import CHECKPOINTS, Outcome, run_training
from tests.train.toy import losses, toy_batch, toy_engine, toy_training

STEPS = 6


def _config(*, steps: int = STEPS, checkpoint_every: int = 2) -> TrainConfig:
    return TrainConfig(
        steps=steps, rows_per_step=4, rows_per_micro_batch=2, checkpoint_every=checkpoint_every, validate_every=3
    )


def _run(
    folder: Path,
    *,
    engine: EngineName = EngineName.torch,
    compute_dtype: torch.dtype = torch.float32,
    batch_at: Callable[[int], TokenBatch] = toy_batch,
    identity: str = "toy",
    steps: int = STEPS,
    quantised: bool = False,
) -> Outcome:
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    training = toy_training(
        toy_engine(engine=engine, compute_dtype=compute_dtype, quantised=quantised),
        steps=STEPS,
        batch_at=batch_at,
        identity=identity,
    )
    try:
        return run_training(training, _config(steps=steps), folder=folder, metrics=metrics)
    finally:
        metrics.close()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(folder / CHECKPOINTS)
    assert found.path is not None
    return dict(checkpoint.load(found.path).tensors)


def _assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one / "metrics.jsonl") == losses(other / "metrics.jsonl")
    assert len(losses(one / "metrics.jsonl")) == STEPS
    first, second = _tensors(one), _tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _killed_at(step: int) -> Callable[[int], TokenBatch]:
    """Return toy batches whose source fails at `step`, as a disk or a machine might."""

    def batch_at(index: int) -> TokenBatch:
        if index == step:
            raise ConnectionError("the power went out")
        return toy_batch(index)

    return batch_at


def _signalled_at(step: int, number: signal.Signals) -> Callable[[int], TokenBatch]:
    def batch_at(index: int) -> TokenBatch:
        if index == step:
            os.kill(os.getpid(), number)
        return toy_batch(index)

    return batch_at


@pytest.mark.parametrize(
    ("engine", "compute_dtype", "quantised"),
    [
        (EngineName.torch, torch.float32, False),
        (EngineName.torch, torch.bfloat16, True),
        (EngineName.deepspeed, torch.bfloat16, False),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, engine: EngineName, compute_dtype: torch.dtype, quantised: bool
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _run(whole, engine=engine, compute_dtype=compute_dtype, quantised=quantised)
    with pytest.raises(ConnectionError):
        _run(stopped, engine=engine, compute_dtype=compute_dtype, quantised=quantised, batch_at=_killed_at(5))
    assert checkpoint.steps(stopped / CHECKPOINTS) == [2, 4]
    outcome = _run(stopped, engine=engine, compute_dtype=compute_dtype, quantised=quantised)
    assert outcome.status is Status.finished
    _assert_equal_runs(whole, stopped)


def test_a_checkpoint_of_one_engine_is_continued_by_the_other(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _run(whole)
    with pytest.raises(ConnectionError):
        _run(stopped, batch_at=_killed_at(4))
    _run(stopped, engine=EngineName.deepspeed)
    torch.testing.assert_close(losses(stopped / "metrics.jsonl"), losses(whole / "metrics.jsonl"), rtol=1e-4, atol=1e-5)


def test_sigkill_in_the_middle_of_a_run_changes_nothing_but_the_time(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(whole)
    program = (
        "import sys, time; from pathlib import Path; from tests.train import test_loop, toy\n"
        "def slow(step):\n    time.sleep(0.3)\n    return toy.toy_batch(step)\n"
        "test_loop._run(Path(sys.argv[1]), batch_at=slow)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(killed)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not checkpoint.steps(killed / CHECKPOINTS):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(checkpoint.steps(killed / CHECKPOINTS)) < STEPS
    _run(killed)
    _assert_equal_runs(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_at_the_end_of_the_step_and_a_new_start_goes_on(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _run(whole)
    with caplog.at_level(logging.WARNING):
        outcome = _run(stopped, batch_at=_signalled_at(2, number))
    assert outcome.status is Status.interrupted
    assert outcome.step == 3
    assert f"stopped by {number.name} at step 3; start again to go on" in caplog.text
    assert checkpoint.steps(stopped / CHECKPOINTS) == [2, 3]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    _run(stopped)
    _assert_equal_runs(whole, stopped)


def test_a_damaged_checkpoint_is_passed_over_with_a_metric_and_the_same_bits(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    _run(whole)
    with pytest.raises(ConnectionError):
        _run(damaged, batch_at=_killed_at(5))
    shard = damaged / CHECKPOINTS / "step_00000004" / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    _run(damaged)
    assert '"checkpoint/damaged": 1.0' in (damaged / "metrics.jsonl").read_text()
    _assert_equal_runs(whole, damaged)


def test_a_folder_of_another_configuration_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    _run(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=r"another configuration \(name: toy -> other\)"):
        _run(tmp_path, identity="other")


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    _run(tmp_path)
    outcome = _run(tmp_path, batch_at=_killed_at(0))
    assert outcome.status is Status.finished
    assert outcome.counters.tokens == sum(toy_batch(step).num_tokens for step in range(STEPS))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    def batch_at(step: int) -> TokenBatch:
        batch = toy_batch(step)
        return replace(batch, weights_BT=batch.weights_BT * math.nan) if step == 3 else batch

    with pytest.raises(DivergenceError, match=r"step 3: the loss is nan"):
        _run(tmp_path, batch_at=batch_at)
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [2]


def test_metrics_tell_load_speed_and_validation(tmp_path: Path) -> None:
    from moetrain.log import read_metrics

    _run(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    names = {"loss", "grad_norm", "clip_factor", "lr", "tokens", "maxvio", "dead_experts", "entropy", "router_entropy"}
    assert names | {"maxvio/model.layers.1.mlp", "time/tokens_per_s", "time/mfu"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation/toy" in row] == [3, 6]
