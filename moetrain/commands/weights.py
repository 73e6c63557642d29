"""Configs of the commands that read trained weights: `export`, `eval`, `generate`, `chat`, `serve` and `upcycle`.

Imports neither torch nor Hydra.
"""

from dataclasses import dataclass, field

from moetrain.commands.stage import WeightsRun
from moetrain.data.config import DataConfig
from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.export.config import ExportConfig
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, NOT_NEGATIVE, TEMPERATURE, check_ranges
from moetrain.rollout.config import RolloutConfig
from moetrain.serve.config import ServeConfig
from moetrain.tasks.config import TaskConfig
from moetrain.upcycle.config import UpcycleConfig, plan_upcycling


@dataclass(kw_only=True)
class UpcycleRun(WeightsRun):
    """Conversion of a dense model into an MoE model with the same output: weights for init_from of pretrain and sft."""

    advice = "give the stage, checkpoint or Hugging Face folder of a dense model"
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the MoE model. Its dense layers and model.intermediate_size must equal those of the dense model."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    """How experts are made from the dense feed-forward layers."""

    def __post_init__(self) -> None:
        """Check that the feed-forward layers divide into the experts."""
        plan_upcycling(self.model, self.upcycle)


@dataclass(kw_only=True)
class ExportRun(WeightsRun):
    """Export to a folder that transformers loads: quantised routed experts, tokenizer, chat template and config."""

    advice = "give the stage or checkpoint to export"
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation of weights that were trained without it. Weights trained with quantisation keep their own."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Format of the export."""


@dataclass(kw_only=True)
class EvalRun(WeightsRun):
    """Evaluation of exported weights on held-out tasks."""

    advice = "give the export to evaluate"
    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to solve."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits of trajectories. eval.temperatures replaces rollout.temperature."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Number of tasks, temperatures and comparisons."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents on whose validation split the language-model loss is measured; without sources it is not measured."""

    def __post_init__(self) -> None:
        """Refuse settings without effect, and a limit on reasoning together with a vote, which compares whole turns."""
        if self.rollout.temperature != RolloutConfig().temperature:
            raise ConfigError(
                f"rollout.temperature is {self.rollout.temperature}: give eval.temperatures=[...], which replaces it"
            )
        tokenizer = self.data.tokenizer
        for name in ("path", "vocab_size", "retrain"):
            if value := getattr(tokenizer, name):
                raise ConfigError(
                    f"data.tokenizer.{name} is {value}: leave it out, because the tokenizer is that of init_from"
                )
        if self.eval.vote_lead and self.rollout.max_think_tokens:
            raise ConfigError(
                f"eval.vote_lead is {self.eval.vote_lead} with rollout.max_think_tokens: a vote compares whole turns; "
                "leave one of them out"
            )


@dataclass(kw_only=True)
class GenerateRun(WeightsRun):
    """Generation: prints how a checkpoint or an export continues a prompt, or answers it with chat=true."""

    advice = "give the folder of the weights"
    prompt: str = ""
    """Text to continue. `-` reads it from standard input: `prompt=- < prompt.txt`."""
    chat: bool = False
    """Treat the prompt as a user message and print the answer."""
    max_new_tokens: int = 64
    """Maximum number of tokens to generate."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("max_new_tokens",), TEMPERATURE: ("temperature",)})


@dataclass(kw_only=True)
class ChatRun(WeightsRun):
    """Chat with a model at a terminal. Thinking, calls and results are shown as they happen.

    Each line of standard input is a message. Ctrl-C ends a turn, a second one ends the chat. With task=NAME or
    task_index=N the model acts as an agent in the environment of a task, and its grade is shown.
    """

    advice = "give the folder of the weights to chat with"
    system: str = ""
    """System message at the beginning; empty for none."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    max_turn_tokens: int = 512
    """Largest number of tokens of a turn."""
    task_index: int | None = None
    """Number of a held-out task to act in, from 0; null is a chat. A command line with task= takes the first."""
    num_calls: int | None = None
    """Number of tool calls that the task requires; null is the family's choice."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Family and settings of the task."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {
            COUNT: ("max_turn_tokens", "num_calls"),
            TEMPERATURE: ("temperature",),
            NOT_NEGATIVE: ("task_index",),
        }
        check_ranges(self, prefix="", ranges=ranges)
        if self.num_calls is not None and self.task_index is None:
            raise ConfigError(f"num_calls is {self.num_calls} without task_index: give the number of the task")
        if self.system and self.task_index is not None:
            raise ConfigError("system is given with task_index: the task has its own prompt; leave one of them out")


@dataclass(kw_only=True)
class ServeRun(WeightsRun):
    """Server of a checkpoint or an export, for clients of OpenAI's API (chat completions with tools, completions)."""

    advice = "give the folder of the weights to serve"
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Address, key and limits."""
