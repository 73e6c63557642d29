"""Steps, batch and checkpoints of one training stage. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError


class ComputeDtype(StrEnum):
    """Precision of the matrix products; masters, router and loss are float32 always."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True)
class TrainConfig:
    """One training stage."""

    steps: int = 400
    """Optimizer steps."""
    rows_per_step: int = 16
    """Rows of data.seq_len tokens an optimizer step, over all ranks and micro-batches."""
    rows_per_micro_batch: int = 16
    """Rows that one rank holds in memory at once."""
    compute_dtype: ComputeDtype = ComputeDtype.bfloat16
    """Precision of the matrix products."""
    validate_every: int = 100
    """Steps between validations; 0 validates only at the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in (
            "steps",
            "rows_per_step",
            "rows_per_micro_batch",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}: give at least 1")
        if self.rows_per_step % self.rows_per_micro_batch and self.rows_per_step > self.rows_per_micro_batch:
            raise ConfigError(
                f"train.rows_per_step is {self.rows_per_step}: give a multiple of "
                f"train.rows_per_micro_batch={self.rows_per_micro_batch}"
            )
