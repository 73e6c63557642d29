"""Config of evaluations. Does not import torch."""

from dataclasses import dataclass, field

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, TEMPERATURE, check_ranges


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of exported weights, and of their masters if they are given."""

    num_tasks: int = 280
    """Number of held-out tasks; each mode runs one trajectory per task. 0 runs no tasks and only measures the loss on
    the texts of `data`, which needs no chat template."""
    first_task: int = 0
    """Index of the first held-out task, of every length."""
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.0])
    """Sampling temperatures; 0 is greedy."""
    longer_calls: list[int] = field(default_factory=lambda: [9, 10])
    """Numbers of tool calls of additional tasks, usually more than in training."""
    longer_tasks: int = 20
    """Held-out tasks per number of calls in longer_calls."""
    vote_lead: int = 0
    """Also run the longer tasks with voting: a turn is sampled until one variant leads all others by this many votes. 0
    switches it off. Each turn needs at least this many samples. Requires longer_calls."""
    vote_samples: int = 12
    """Largest number of samples of a turn in a vote."""
    vote_temperature: float = 1.0
    """Temperature of the samples in a vote."""
    error_free: bool = True
    """Also run greedy decoding with tools that never fail."""
    masters: str | None = None
    """Checkpoint or stage folder of the float32 masters. Their bf16 cast is evaluated beside the export."""
    before: str | None = None
    """Stage folder of an earlier evaluation of the same tasks, for paired differences."""
    codes_before: str | None = None
    """Weights of an earlier stage. The result contains the share of codes and scales that differ from theirs."""
    kl_tasks: int = 64
    """Largest number of trajectories on which the KL divergence between masters and export is measured."""
    other_context: bool = False
    """Evaluate also under another task.context than the one that the weights were trained with."""
    num_traces: int = 8
    """Number of complete trajectories per mode that are stored for inspection."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("kl_tasks", "longer_calls", "vote_samples")
        rest = ("num_tasks", "first_task", "longer_tasks", "num_traces", "vote_lead")
        ranges = {COUNT: counts, NOT_NEGATIVE: rest, TEMPERATURE: ("temperatures", "vote_temperature")}
        check_ranges(self, prefix="eval.", ranges=ranges)
        lists: dict[str, list[float]] = {"temperatures": self.temperatures, "longer_calls": [*self.longer_calls]}
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ConfigError(f"eval.{name} is {values}: give each number once")
        compared = {"masters": self.masters, "before": self.before, "codes_before": self.codes_before}
        for name, value in compared.items():
            if value is not None and not self.num_tasks:
                raise ConfigError(f"eval.{name} is {value} and eval.num_tasks is 0: give tasks to compare on")
        if self.vote_lead > self.vote_samples:
            raise ConfigError(f"eval.vote_lead is {self.vote_lead}: give at most eval.vote_samples={self.vote_samples}")
        if self.vote_lead and not (self.longer_calls and self.longer_tasks):
            raise ConfigError(f"eval.vote_lead is {self.vote_lead} without longer tasks: give eval.longer_calls")
        names = [f"{temperature:g}" for temperature in self.temperatures]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"eval.temperatures is {self.temperatures}, which has {twice[0]} twice (in six digits): remove one"
            )
        if not self.temperatures:
            raise ConfigError(f"eval.temperatures is {self.temperatures}: give one or more, 0 (greedy) or above")
