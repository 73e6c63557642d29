"""The configs of commands that measure and check generation. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.config import StageRun, check_length
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, check_ranges


class DecodePeer(StrEnum):
    """Other programs that generate from the same weights in `bench decode`."""

    transformers = "transformers"


@dataclass(kw_only=True)
class DecodeCase:
    """Sequences that are generated together."""

    batch: int
    """Number of sequences."""
    context: int
    """Tokens of each prompt."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="cases: ", ranges={COUNT: ("batch", "context")})


def _cases() -> list[DecodeCase]:
    short = [DecodeCase(batch=batch, context=128) for batch in (1, 4, 16, 64)]
    return [*short, DecodeCase(batch=1, context=8192), DecodeCase(batch=4, context=8192)]


@dataclass(kw_only=True)
class BenchDecodeRun(StageRun):
    """Measure generation speed of moetrain and its peers in turn, with the same random weights and prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation of the routed experts."""
    cases: list[DecodeCase] = field(default_factory=_cases)
    """Batches and prompt lengths to measure."""
    steps: int = 16
    """Tokens per sequence and turn."""
    repetitions: int = 5
    """Turns per contestant. Speed ratios are computed per turn."""
    peers: list[DecodePeer] = field(default_factory=lambda: list(DecodePeer))
    """Programs to measure besides moetrain."""
    threads: int | None = None
    """Threads per contestant; null takes the cores available to this process."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("steps", "repetitions", "threads")})
        if not self.cases:
            raise ConfigError("cases is empty: give at least one, such as cases=[{batch:1,context:128}]")
        longest = max(case.context for case in self.cases) + 2 + (self.repetitions + 1) * self.steps
        check_length(self.model, name="the longest sequence of cases", length=longest)


@dataclass(kw_only=True)
class VerifyRolloutRun(StageRun):
    """Check that a generated token depends on the weights and the tokens before it only, on tiny random models."""

    prompt_tokens: int = 150
    """Tokens of each prompt."""
    new_tokens: int = 24
    """Tokens to generate after each prompt."""
    fault: str = "none"
    """Fault to inject into batches of several sequences, which the command must then detect: none, stale_page (a
    sequence reads a page of another one), wrong_position (rotary positions are off by one) or other_row (two sequences
    get each other's result)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("prompt_tokens", "new_tokens")})
        if self.fault not in ("none", "stale_page", "wrong_position", "other_row"):
            raise ConfigError(f"fault is {self.fault!r}: give none, stale_page, wrong_position or other_row")
