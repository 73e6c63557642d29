"""Steps, batch and checkpoints of one training stage. No torch here."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.kernels.config import Kernels
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges


class ComputeDtype(StrEnum):
    """Precision of the matrix products; masters, router and loss are float32 always."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    fastest = "fastest"
    """The faster of the two on this machine."""


class Continuation(StrEnum):
    """What the config of a stage with `continue_from` describes. part: the steps that are added; warmup, decay, ramp
    and mixes run over them, from the learning rate of the last step. whole: the run from its step 0, as if it had been
    started with this config."""

    part = "part"
    whole = "whole"


class NonfinitePolicy(StrEnum):
    """What a step does whose loss or gradient norm is not a finite number: end the run, or leave the step out."""

    stop = "stop"
    skip = "skip"


@dataclass(kw_only=True)
class RampConfig:
    """A part of the batch-size ramp."""

    steps: int
    """Optimizer steps that it takes."""
    rows: int
    """Rows of each of them, as train.rows_per_step counts."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.batch_ramp: {name} is {getattr(self, name)}: give at least 1")


@dataclass(kw_only=True)
class TrainConfig:
    """Steps, precision and checkpoints: what every training stage has."""

    steps: int = 400
    """Optimizer steps; with continue_as=part those that are added, with whole those of the whole run."""
    continue_as: Continuation | None = None
    """What this config describes when the stage continues another (continue_from): part, the steps that are added, or
    whole, the run from its beginning."""
    compute_dtype: ComputeDtype = ComputeDtype.bfloat16
    """Precision of the matrix products. fastest is bfloat16 with the native kernels; without them both are measured
    when the run begins: many CPUs multiply float32 faster, those without bf16 instructions tens of times. Accelerators
    use bfloat16."""
    kernels: Kernels = Kernels.auto
    """What computes in bfloat16 on a CPU: native, the project's own C++, or torch. auto is native on a CPU with AVX2
    and without AMX where there is a C++ compiler. Results differ by rounding alone."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of it are kept as well; 0 keeps the newest alone."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    on_nonfinite: NonfinitePolicy = NonfinitePolicy.stop
    """A loss or gradient norm that is not finite: stop ends the run; skip drops the step's gradient, leaves weights,
    momentum and balance bias as they are, counts the step in `skipped_steps`, and continues with the next batch."""
    max_skipped_in_row: int = 10
    """Maximum number of consecutive skipped steps (on_nonfinite=skip); one more ends the run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("steps", "checkpoint_every", "keep_checkpoints", "log_every", "max_skipped_in_row")
        check_ranges(self, prefix="train.", ranges={COUNT: counts, NOT_NEGATIVE: ("keep_every",)})
        if self.kernels is Kernels.native and self.compute_dtype is ComputeDtype.float32:
            raise ConfigError(
                "train.kernels is native, which multiplies bfloat16, and train.compute_dtype is float32: "
                "change one of them, or give train.kernels=auto"
            )


@dataclass(kw_only=True)
class ReadingConfig(TrainConfig):
    """What the stages that read documents, pretraining and SFT, have besides."""

    rows_per_step: int = 16
    """Rows of data.seq_len tokens per optimizer step, over all ranks and micro-batches."""
    batch_ramp: list[RampConfig] = field(default_factory=list)
    """Smaller (or larger) batches at the beginning: parts in order, each so many steps of so many rows;
    train.rows_per_step holds after the last of them."""
    rows_per_micro_batch: int = 16
    """Rows that one rank holds in memory at once."""
    validate_every: int = 100
    """Steps between validations; 0 validates only at the end."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        counts = ("rows_per_step", "rows_per_micro_batch")
        check_ranges(self, prefix="train.", ranges={COUNT: counts, NOT_NEGATIVE: ("validate_every",)})
        sizes = [("rows_per_step", self.rows_per_step), *(("batch_ramp: rows", part.rows) for part in self.batch_ramp)]
        for name, rows in sizes:
            if rows % self.rows_per_micro_batch and rows > self.rows_per_micro_batch:
                raise ConfigError(
                    f"train.{name} is {rows}: give a multiple of train.rows_per_micro_batch={self.rows_per_micro_batch}"
                )
        ramp_steps = sum(part.steps for part in self.batch_ramp)
        if ramp_steps > self.steps:
            raise ConfigError(
                f"train.batch_ramp takes {ramp_steps} steps, train.steps is {self.steps}: shorten the ramp"
            )

    def rows_before(self, step: int) -> int:
        """Return the rows of all steps before optimizer step `step`, from 0: the number of its first row in the run."""
        rows = 0
        for part in self.batch_ramp:
            taken = min(step, part.steps)
            rows += taken * part.rows
            step -= taken
        return rows + step * self.rows_per_step

    @property
    def most_rows(self) -> int:
        """Rows of the largest step."""
        return max([self.rows_per_step, *(part.rows for part in self.batch_ramp)])
