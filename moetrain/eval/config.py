"""What is evaluated, on how many held-out tasks. No torch here."""

from dataclasses import dataclass, field

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, TEMPERATURE, check_ranges


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of exported weights, beside the masters they were made of."""

    num_tasks: int = 280
    """Held-out tasks; each mode takes one trajectory of each."""
    first_task: int = 0
    """Number of the first held-out task."""
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.0])
    """Sampling temperatures; 0 is greedy."""
    longer_calls: list[int] = field(default_factory=lambda: [9, 10])
    """Lengths beyond those trained on that are shown too."""
    longer_tasks: int = 20
    """Held-out tasks of each of those lengths."""
    error_free: bool = True
    """Also run greedy with tools that never fail."""
    masters: str | None = None
    """Checkpoint or stage folder of the float32 masters; their bf16 cast is evaluated beside the export."""
    before: str | None = None
    """Stage folder of an earlier evaluation of the same tasks; differences are paired with it."""
    codes_before: str | None = None
    """Weights of an earlier stage; the share of codes and scales that differ from theirs is given."""
    kl_tasks: int = 64
    """Trajectories on which the KL divergence between masters and export is measured."""
    num_traces: int = 8
    """Whole trajectories that are kept for reading."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("num_tasks", "kl_tasks", "longer_calls")
        rest = ("first_task", "longer_tasks", "num_traces")
        ranges = {COUNT: counts, NOT_NEGATIVE: rest, TEMPERATURE: ("temperatures",)}
        check_ranges(self, prefix="eval.", ranges=ranges)
        if not self.temperatures:
            raise ConfigError(f"eval.temperatures is {self.temperatures}: give one or more, 0 (greedy) or above")
