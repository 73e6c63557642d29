"""Limits and sampling of trajectories. No torch here."""

from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.ranges import COUNT, NOT_NEGATIVE, TEMPERATURE, check_ranges


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
    max_seconds: float = 0.0
    """Wall-clock seconds of a trajectory; 0 is no limit. One that fires makes a run's numbers irreproducible."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("num_slots", "max_tokens", "max_turns", "max_turn_tokens", "max_repeats")
        ranges = {COUNT: counts, NOT_NEGATIVE: ("max_seconds",), TEMPERATURE: ("temperature",)}
        check_ranges(self, prefix="rollout.", ranges=ranges)
        if self.max_turn_tokens >= self.max_tokens:
            raise ConfigError(
                f"rollout.max_turn_tokens is {self.max_turn_tokens}: give less than max_tokens={self.max_tokens}"
            )
