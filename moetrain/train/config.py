"""Config of the steps, batches and checkpoints of one training stage. Imports no torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.kernels.config import Kernels
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges


class ComputeDtype(StrEnum):
    """Precision of the matrix products; master weights, router and loss are always float32."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    fastest = "fastest"
    """The faster of the two on this machine."""


class Continuation(StrEnum):
    """What the config of a stage with `continue_from` describes. part: only the added steps; warmup, decay, ramp and
    mixes apply to them, and the learning rate starts from that of the last step. whole: the entire run from step 0, as
    if it had been started with this config.
    """

    part = "part"
    whole = "whole"


class NonfinitePolicy(StrEnum):
    """What happens when a step's loss or gradient norm is not finite: stop the run, or skip the step."""

    stop = "stop"
    skip = "skip"


@dataclass(kw_only=True)
class RampConfig:
    """One phase of the batch-size ramp."""

    steps: int
    """Number of optimizer steps of this phase."""
    rows: int
    """Rows per optimizer step in this phase, counted like train.rows_per_step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.batch_ramp: {name} is {getattr(self, name)}: give at least 1")


@dataclass(kw_only=True)
class MtpConfig:
    """The loss of multi-token prediction; it applies to models with model.num_mtp_layers above 0."""

    weight: float = 0.3
    """Weight of the mean loss of the modules (lambda of arXiv 2412.19437, eq. 25; DeepSeek-V3: 0.3). In RL the modules
    learn the sampled tokens, from detached hidden states. model.num_mtp_layers=0 leaves the modules out."""
    late_weight: float = 0.1
    """Weight in the last part of training (DeepSeek-V3: 0.1)."""
    late_share: float = 0.324
    """Share of the steps, at the end of training, with late_weight (DeepSeek-V3: the last 4.8T of 14.8T tokens)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="train.mtp.", ranges={POSITIVE: ("weight", "late_weight"), SHARE: ("late_share",)})

    def at(self, step: int, *, steps: int) -> float:
        """Return the weight in optimizer step `step` (from 0) of `steps`."""
        return self.weight if step < steps - round(self.late_share * steps) else self.late_weight


@dataclass(kw_only=True)
class TrainConfig:
    """Steps, precision and checkpoints: the settings of every training stage."""

    steps: int = 400
    """Number of optimizer steps. With continue_as=part: of the added steps; with whole: of the entire run."""
    continue_as: Continuation | None = None
    """What this config describes when the stage continues another one (continue_from): part, only the added steps, or
    whole, the entire run from step 0."""
    compute_dtype: ComputeDtype = ComputeDtype.bfloat16
    """Precision of the matrix products. fastest selects bfloat16 with the native kernels; without them it measures both
    when the run starts, because many CPUs multiply float32 faster (CPUs without bf16 instructions by a factor of ten or
    more). On accelerators it selects bfloat16."""
    kernels: Kernels = Kernels.auto
    """Kernels for bfloat16 on a CPU: native (the project's own C++) or torch. auto selects native on a CPU with AVX2
    if a C++ compiler is installed. Results differ only by rounding."""
    checkpoint_every: int = 100
    """Steps between checkpoints; a last one is always written at the end."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0 keeps only the newest."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    on_nonfinite: NonfinitePolicy = NonfinitePolicy.stop
    """What to do when a loss or gradient norm is not finite: stop ends the run; skip drops the step's gradient, leaves
    weights, momentum and balance bias unchanged, counts it in `skipped_steps`, and continues with the next batch."""
    max_skipped_in_row: int = 10
    """Maximum number of consecutive skipped steps (on_nonfinite=skip), and in RL of steps in which every environment
    failed; one more ends the run."""
    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Multi-token prediction."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("steps", "checkpoint_every", "keep_checkpoints", "log_every", "max_skipped_in_row")
        check_ranges(self, prefix="train.", ranges={COUNT: counts, NOT_NEGATIVE: ("keep_every",)})
        if self.kernels is Kernels.native and self.compute_dtype is ComputeDtype.float32:
            raise ConfigError(
                "train.kernels is native, which supports only bfloat16, but train.compute_dtype is float32: "
                "change one of them, or give train.kernels=auto"
            )


@dataclass(kw_only=True)
class DocumentTrainConfig(TrainConfig):
    """Additional settings of the stages that read documents: pretraining and SFT."""

    rows_per_step: int = 16
    """Rows of data.seq_len tokens per optimizer step, over all ranks and micro-batches."""
    batch_ramp: list[RampConfig] = field(default_factory=list)
    """Smaller (or larger) batches at the start of training: a list of phases, each with a number of steps and of rows
    per step. After the last phase, train.rows_per_step applies."""
    rows_per_micro_batch: int = 16
    """Maximum number of rows per micro-batch and rank."""
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
                f"train.batch_ramp takes {ramp_steps} steps, but train.steps is {self.steps}: shorten the ramp"
            )

    def rows_before(self, step: int) -> int:
        """Return the rows of all steps before step `step` (from 0): the index of its first row in the run."""
        rows = 0
        for part in self.batch_ramp:
            taken = min(step, part.steps)
            rows += taken * part.rows
            step -= taken
        return rows + step * self.rows_per_step

    @property
    def most_rows(self) -> int:
        """Number of rows of the largest step."""
        return max([self.rows_per_step, *(part.rows for part in self.batch_ramp)])
