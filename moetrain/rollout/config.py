"""Limits and sampling of trajectories. No torch here."""

from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, TEMPERATURE, check_ranges


@dataclass(kw_only=True)
class RolloutConfig:
    """How trajectories are generated. Every limit that fires is recorded in the trajectory and counted."""

    num_slots: int = 128
    """Sequences that are decoded together."""
    max_tokens: int = 1280
    """Tokens of a trajectory, prompt and tool results included."""
    max_turns: int = 16
    """Turns of a trajectory."""
    max_turn_tokens: int = 112
    """Tokens that the model may produce in one turn."""
    max_repeats: int = 6
    """The same call this many times in a row ends a trajectory (a stall)."""
    max_output_tokens: int = 256
    """Tokens of a tool's result that the model is shown: head and tail, with a note between them."""
    call_deadline_s: float = 30.0
    """Seconds after which a tool call is given up; the model reads an error. Holds for tools that do not run inline."""
    environment_deadline_s: float = 120.0
    """Seconds that making, grading or closing an environment may take, before it counts as failed."""
    max_retries: int = 2
    """Repetitions of whatever an environment does that raises `TransientError`."""
    max_replacements: int = 2
    """New attempts for a trajectory that the environment or the clock ended; if all fail, it is not scored."""
    max_seconds: float = 0.0
    """Wall-clock seconds of a trajectory; 0 is no limit. One that fires makes a run's numbers irreproducible."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("num_slots", "max_tokens", "max_turns", "max_turn_tokens", "max_repeats", "max_output_tokens")
        ranges = {
            COUNT: counts,
            POSITIVE: ("call_deadline_s", "environment_deadline_s"),
            NOT_NEGATIVE: ("max_seconds", "max_retries", "max_replacements"),
            TEMPERATURE: ("temperature",),
        }
        check_ranges(self, prefix="rollout.", ranges=ranges)
        if self.max_turn_tokens >= self.max_tokens:
            raise ConfigError(
                f"rollout.max_turn_tokens is {self.max_turn_tokens}: give less than max_tokens={self.max_tokens}"
            )
