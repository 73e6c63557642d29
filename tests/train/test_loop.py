"""The loop: stopping loses nothing, whatever stops it."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.data.batch import WEIGHT, TokenBatch
from moetrain.errors import CheckpointError, DivergenceError
from moetrain.log import JsonlMetrics
from moetrain.model.config import BalanceConfig
from moetrain.parallel.config import EngineName
from moetrain.parallel.protocol import Objective, ObjectiveResult
from moetrain.train.config import DocumentTrainConfig, NonfinitePolicy
from moetrain.train.document_stage import document_training
from moetrain.train.interrupt import Status
from moetrain.train.loop import Outcome, run_training
from moetrain.train.loss import GlobalCounts
from moetrain.train.nonfinite import SKIPPED
from moetrain.train.step import train_step
from tests.train.toy import losses, toy_batch, toy_engine, toy_stage

STEPS = 6


def _config(*, on_nonfinite: NonfinitePolicy, max_skipped_in_row: int, steps: int = STEPS) -> DocumentTrainConfig:
    return DocumentTrainConfig(
        steps=steps,
        rows_per_step=4,
        rows_per_micro_batch=2,
        checkpoint_every=2,
        validate_every=3,
        on_nonfinite=on_nonfinite,
        max_skipped_in_row=max_skipped_in_row,
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
    on_nonfinite: NonfinitePolicy = NonfinitePolicy.stop,
    max_skipped_in_row: int = 10,
) -> Outcome:
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    stage = toy_stage(
        toy_engine(engine=engine, compute_dtype=compute_dtype, quantised=quantised),
        steps=STEPS,
        batch_at=batch_at,
        identity=identity,
    )
    try:
        config = _config(steps=steps, on_nonfinite=on_nonfinite, max_skipped_in_row=max_skipped_in_row)
        return run_training(document_training(stage, config), config, folder=folder, metrics=metrics)
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


def test_a_progress_line_names_the_folder_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _run(tmp_path / "mine" / "sft")
    assert caplog.messages[-1].startswith(f"{tmp_path / 'mine' / 'sft'} {STEPS}/{STEPS} loss ")


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_saves_at_the_end_of_the_step_and_a_new_start_goes_on(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    before = signal.getsignal(number)
    _run(whole)
    with caplog.at_level(logging.WARNING):
        outcome = _run(stopped, batch_at=_signalled_at(2, number))
    assert outcome.status is Status.interrupted
    assert outcome.step == 3
    assert f"stopped by {number.name} at step 3; started again, this stage resumes there" in caplog.text
    assert checkpoint.steps(stopped / CHECKPOINTS) == [2, 3]
    assert signal.getsignal(number) == before
    _run(stopped)
    _assert_equal_runs(whole, stopped)


def test_a_damaged_checkpoint_is_passed_over_with_a_metric_and_the_same_bits(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    _run(whole)
    with pytest.raises(ConnectionError):
        _run(damaged, batch_at=_killed_at(5))
    shard = damaged / CHECKPOINTS / "step_00000004" / "model-r00000-00001.safetensors"
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
    assert outcome.counters.totals["tokens"] == sum(toy_batch(step).num_tokens for step in range(STEPS))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    def batch_at(step: int) -> TokenBatch:
        batch = toy_batch(step)
        return batch.with_columns({WEIGHT: batch.columns[WEIGHT] * math.nan}) if step == 3 else batch

    with pytest.raises(DivergenceError, match=r"step 4: the loss is nan"):
        _run(tmp_path, batch_at=batch_at)
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [2]


def test_metrics_tell_load_speed_and_validation(tmp_path: Path) -> None:
    from moetrain.log import read_metrics

    _run(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    names = {"loss", "grad_norm", "clip_factor", "lr", "tokens", "maxvio", "dead_experts", "entropy", "router_entropy"}
    assert names | {"maxvio/model.layers.1.mlp", "time/tokens_per_s", "time/mfu"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation/toy" in row] == [3, 6]


def _infected(*steps: int, value: float = math.nan) -> Callable[[int], TokenBatch]:
    """Return toy batches of which those of `steps` give a loss that is not finite."""

    def batch_at(step: int) -> TokenBatch:
        batch = toy_batch(step)
        return batch.with_columns({WEIGHT: batch.columns[WEIGHT] * value}) if step in steps else batch

    return batch_at


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("engine", list(EngineName))
def test_a_step_whose_loss_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, engine: EngineName, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    from moetrain.log import read_metrics

    with caplog.at_level(logging.WARNING):
        _run(tmp_path, engine=engine, batch_at=_infected(1, value=value), on_nonfinite=NonfinitePolicy.skip, steps=2)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "tokens" in row]
    assert [row["skipped_steps"] for row in rows] == [0.0, 1.0]
    assert ["loss" in row for row in rows] == [True, False]
    assert "step 2 is skipped" in caplog.text
    after = _tensors(tmp_path)
    alone = tmp_path / "alone"
    _run(alone, engine=engine, steps=1)
    assert all(torch.equal(after[name], tensor) for name, tensor in _tensors(alone).items())


def test_a_run_with_steps_left_out_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    batch_at = _infected(1, 4)
    _run(whole, batch_at=batch_at, on_nonfinite=NonfinitePolicy.skip)
    with pytest.raises(ConnectionError):
        _run(stopped, batch_at=lambda step: _killed_at(5)(step) and batch_at(step), on_nonfinite=NonfinitePolicy.skip)
    _run(stopped, batch_at=batch_at, on_nonfinite=NonfinitePolicy.skip)
    assert losses(whole / "metrics.jsonl") == losses(stopped / "metrics.jsonl")
    assert len(losses(whole / "metrics.jsonl")) == STEPS - 2
    first, second = _tensors(whole), _tensors(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_steps_left_out_in_a_row_than_allowed_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"step 6: 3 steps in a row .* train.max_skipped_in_row is 2"):
        _run(tmp_path, batch_at=_infected(0, 1, 3, 4, 5), on_nonfinite=NonfinitePolicy.skip, max_skipped_in_row=2)


def test_a_gradient_norm_that_is_not_finite_is_left_out_on_the_same_terms(tmp_path: Path) -> None:
    engine = toy_engine()
    before = engine.gather_state(with_optimizer=True)
    assert before is not None

    def explode(counts: GlobalCounts) -> Objective:
        def objective(model: torch.nn.Module, batch: object) -> ObjectiveResult:
            zero = (engine.model.lm_head.weight * 0.0).sum()
            return ObjectiveResult(loss=torch.sqrt(zero.abs()), counts_LE=torch.ones(2, 4, dtype=torch.int64))

        return objective

    values = train_step(
        engine,
        explode,
        micro_batches=[toy_batch(0)],
        learning_rate=1.0,
        balance=BalanceConfig(),
        step=7,
        on_nonfinite=NonfinitePolicy.skip,
    )
    assert SKIPPED in values and values["loss"] == 0.0
    after = engine.gather_state(with_optimizer=True)
    assert after is not None
    assert all(torch.equal(before[name], after[name]) for name in before)
