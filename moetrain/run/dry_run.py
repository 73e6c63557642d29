"""`dry_run=true`: prints parameters, memory, tokens and expected time of a stage without running it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from moetrain.commands.training import DocumentRun, RlRun, TrainingRun
from moetrain.files import user_path
from moetrain.log import duration
from moetrain.plan.stage import UTILISATION, StagePlan, plan_stage
from moetrain.run.resume_check import train_of

_DAY_S = 24 * 3600
_DAYS_PER_YEAR = 365.25


def show(name: str, run: Any, *, world_size: int, device_tflops: float | None = None) -> None:
    """Print the plan of a training stage on `world_size` ranks. For other stages, print that the input is valid.

    device_tflops: matmul peak of one device, in place of the value in the stage's config.
    """
    plan = plan_of(run, world_size=world_size)
    if plan is None:
        print(f"{name}: the input is valid; the command does not train, so there is no plan to print")
        return
    table = Table("quantity", "value", title=f"{name}, dry run")
    for what, how_much in [*_rows(plan), *_time_rows(plan, run, world_size=world_size, tflops=device_tflops)]:
        table.add_row(what, how_much)
    Console().print(table)


def plan_of(run: Any, *, world_size: int) -> StagePlan | None:
    """Return the plan of a stage on `world_size` ranks, or None for a stage that does not train."""
    if not isinstance(run, TrainingRun):
        return None
    if isinstance(run, RlRun):
        trajectories = run.rl.tasks_per_step * run.rl.group_size
        seq_len = run.rollout.max_tokens
        tokens = (run.train.steps - _steps_taken(run)) * trajectories * seq_len
        # A longer row is a micro-batch of its own.
        in_memory = max(run.rl.tokens_per_micro_batch, run.rollout.max_tokens)
    else:
        assert isinstance(run, DocumentRun)
        seq_len = run.data.seq_len
        tokens = (run.train.rows_before(run.train.steps) - run.train.rows_before(_steps_taken(run))) * seq_len
        in_memory = min(run.train.rows_per_micro_batch, run.train.most_rows) * seq_len
    return plan_stage(
        run.model,
        optim=run.optim,
        parallel=run.parallel,
        world_size=world_size,
        tokens=tokens,
        seq_len=seq_len,
        tokens_in_memory=in_memory,
    )


def _steps_taken(run: TrainingRun) -> int:
    """Return how many of `train.steps` the continued run has taken; 0 if its folder does not exist yet.

    Raises `CheckpointError` if the run cannot be continued.
    """
    if run.continue_from is None or not user_path(run.continue_from).exists():
        return 0
    # These imports load torch, which only the dry run of a continued run needs.
    from moetrain.run.document_stage import sections_of
    from moetrain.run.rl_stage import rl_start_point
    from moetrain.run.weights import read_weights
    from moetrain.train.stages import document_start_point

    origin = read_weights(run.continue_from)
    if isinstance(run, RlRun):
        start_point = rl_start_point(run, origin)
    else:
        assert isinstance(run, DocumentRun)
        start_point = document_start_point(sections_of(run), origin)
    return start_point.step - start_point.first_step


def _rows(plan: StagePlan) -> list[tuple[str, str]]:
    counts = plan.parameters
    return [
        ("parameters", f"{counts.total:,}"),
        ("of routed experts", f"{counts.routed:,}"),
        ("active per token, with the head", f"{counts.active_with_head:,}"),
        ("tokens, at most", f"{plan.tokens:,}"),
        ("operations", f"{plan.flops:.3g} FLOPs"),
        ("parameters in memory, per rank", _bytes(plan.bytes_parameters)),
        ("gradients", _bytes(plan.bytes_gradients)),
        ("optimizer", _bytes(plan.bytes_optimizer)),
        ("activations, approximately", _bytes(plan.bytes_activations)),
        ("memory per rank", _bytes(plan.bytes_total)),
        ("peak per rank while the engine is built", _bytes(plan.bytes_start)),
    ]


def _time_rows(
    plan: StagePlan, run: TrainingRun, *, world_size: int, tflops: float | None
) -> Iterator[tuple[str, str]]:
    """Yield the peak of one device, given or measured, and the time on `world_size` devices of that peak."""
    tflops = run.device_tflops if tflops is None else tflops
    if tflops is None:
        device, peak = _measured_peak(run)
        yield f"matmul peak measured here, one {device} device", f"{peak / 1e9:,.0f} GFLOP/s"
    else:
        peak = tflops * 1e12
        yield "matmul peak of one device, from device_tflops", f"{peak / 1e9:,.0f} GFLOP/s"
    seconds = plan.seconds(world_size * peak)
    yield f"time at {UTILISATION:.0%} of {world_size} x this peak, at most", time_in_words(seconds)


def _measured_peak(run: TrainingRun) -> tuple[str, float]:
    """Return the type of this machine's device and its matmul peak in FLOP/s."""
    # These imports load torch, which only the dry run of a training stage needs.
    from moetrain.runtime import default_device
    from moetrain.train.peak import measure_peak
    from moetrain.train.precision import DTYPES, expected_precision

    device = default_device()
    dtype, library = expected_precision(train_of(run), device=device, folder=run.run.path)
    return device.type, measure_peak(dtype=DTYPES[dtype], device=device, library=library)


def time_in_words(seconds: float) -> str:
    """Return a duration as h:mm:ss, or in days or years if it takes longer than two days."""
    days = seconds / _DAY_S
    if days < 2:
        return duration(seconds)
    return f"{days:,.1f} days" if days < 2 * _DAYS_PER_YEAR else f"{days / _DAYS_PER_YEAR:,.1f} years"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
