"""Config of rollouts: limits and sampling of trajectories. Does not import torch."""

from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.inference.mode import Mode
from moetrain.inference.speculation import Speculation
from moetrain.kernels.config import Kernels
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, TEMPERATURE, check_ranges


@dataclass(kw_only=True)
class RolloutConfig:
    """Limits and sampling of trajectories. A trajectory records the limit that ended it, and the metrics count them."""

    num_slots: int = 128
    """Largest number of sequences that are decoded together."""
    max_tokens: int = 1280
    """Largest number of tokens of a context, including the prompt and tool results. Under `task.context.kind=full` a
    trajectory that reaches it ends. With `discard` and `notes` a new context starts before the limit; with
    `hide_results` the limit can still be reached."""
    max_turns: int = 16
    """Largest number of turns of a trajectory that call tools or answer; notes do not count."""
    max_turn_tokens: int = 112
    """Largest number of tokens that the model produces in one turn."""
    max_think_tokens: int = 0
    """Largest number of tokens of the reasoning of a turn; 0 is no limit beside max_turn_tokens."""
    max_sampled_tokens: int = 0
    """Largest number of tokens that the model produces in a trajectory, in all its contexts; 0 is no limit."""
    max_repeats: int = 6
    """A trajectory ends (as `stalled`) when it makes the same call this many times in a row. Calls that failed through
    no fault of the model do not count."""
    max_output_tokens: int = 256
    """Largest number of tokens of a tool result. A longer one is cut to its head and tail, with a note between them."""
    call_deadline_s: float = 30.0
    """Seconds after which a tool call is abandoned and the model reads an error. Does not apply to tools that run
    inline."""
    environment_deadline_s: float = 120.0
    """Seconds after which making, grading or closing an environment counts as failed."""
    max_retries: int = 2
    """Largest number of times that a method of an environment is called again after `TransientError`."""
    max_replacements: int = 2
    """Largest number of new attempts for a trajectory whose environment failed or that reached max_seconds. If all
    fail, it is not scored."""
    max_seconds: float = 0.0
    """Wall-clock limit of a trajectory in seconds; 0 is no limit. When the limit ends a trajectory, the run is not
    reproducible."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    cache_megabytes: int | None = None
    """Largest size of the cache of latents in MiB; null takes what all sequences need, at most half of the free memory.
    Sequences that do not fit are prefilled again later."""
    mode: Mode = Mode.fast
    """How generation computes. deterministic: the logprob of a sampled token equals the trainer's bit for bit, which
    needs the native kernels in training too and a larger cache. fast: it differs by rounding."""
    kernels: Kernels = Kernels.auto
    """Kernels that generate on a CPU. auto and native: the project's own, which multiply INT4 experts from their codes;
    auto uses torch's where they cannot be compiled."""
    speculation: Speculation = Speculation.auto
    """auto: speculative decoding where few sequences are decoded: tokens copied from earlier in the sequence are
    drafted and verified in one step. The result is the same. off: one token per sequence and step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("num_slots", "max_tokens", "max_turns", "max_turn_tokens", "max_repeats", "max_output_tokens")
        ranges = {
            COUNT: (*counts, "cache_megabytes"),
            POSITIVE: ("call_deadline_s", "environment_deadline_s"),
            NOT_NEGATIVE: ("max_seconds", "max_retries", "max_replacements", "max_think_tokens", "max_sampled_tokens"),
            TEMPERATURE: ("temperature",),
        }
        check_ranges(self, prefix="rollout.", ranges=ranges)
        if self.max_turn_tokens >= self.max_tokens:
            raise ConfigError(
                f"rollout.max_turn_tokens is {self.max_turn_tokens}: give less than max_tokens={self.max_tokens}"
            )
        if self.mode is Mode.deterministic and self.kernels is Kernels.torch:
            raise ConfigError(
                "rollout.mode is deterministic and rollout.kernels is torch: this mode needs the native kernels. "
                "Give rollout.kernels=auto, or rollout.mode=fast"
            )
