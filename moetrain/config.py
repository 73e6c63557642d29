"""Configs of stages and recipes: one root dataclass per command, its sections, and the checks that span sections.

The configs of `verify` and `bench` are in `moetrain.commands`. `moetrain.compose` fills them from YAML and the command
line. This module imports neither torch nor Hydra.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from moetrain.data.config import MIN_VOCAB_SIZE, DataConfig
from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.export.config import ExportConfig
from moetrain.inference.mode import Mode
from moetrain.log import WandbMode
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, POSITIVE, SEED, TEMPERATURE, check_ranges
from moetrain.report.config import ReportConfig
from moetrain.rl.config import RlConfig, check_mode
from moetrain.rollout.config import RolloutConfig
from moetrain.serve.config import ServeConfig
from moetrain.tasks.config import TaskConfig
from moetrain.train.config import Continuation, DocumentTrainConfig, TrainConfig
from moetrain.upcycle.config import UpcycleConfig, plan_upcycling


@dataclass(kw_only=True)
class WandbConfig:
    """Settings of Weights & Biases. metrics.jsonl is written in any case."""

    project: str = "moetrain"
    """W&B project."""
    mode: WandbMode = WandbMode.auto
    """auto follows WANDB_MODE; without it, online when WANDB_API_KEY is set and offline otherwise."""


@dataclass(kw_only=True)
class RunConfig:
    """Name, folder and seed of a run."""

    folder: str = "runs"
    """Folder that contains all runs."""
    name: str = "default"
    """Name of the run. Its stages are in <folder>/<name>/."""
    stage: str = "stage"
    """Name of the stage. Its folder is <folder>/<name>/<stage>/."""
    seed: int = 0
    """Seed of every random stream."""
    threads: int | None = None
    """Compute threads per process; null takes OMP_NUM_THREADS, or all cores. The number of threads changes the order of
    summation, so results are bit-identical only for the same number."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        """Check the seed, the number of threads, and that the names are valid folder names."""
        check_ranges(self, prefix="run.", ranges={SEED: ("seed",), COUNT: ("threads",)})
        for name, value in (("name", self.name), ("stage", self.stage)):
            if not value or "/" in value or value.startswith(".") or not value.isprintable():
                raise ConfigError(f"run.{name} is {value!r}: give the name of a folder, without / and line breaks")
        check_folder_name("run.folder", self.folder)

    @property
    def path(self) -> Path:
        """Folder of the stage: <folder>/<name>/<stage>."""
        return Path(self.folder) / self.name / self.stage


@dataclass(kw_only=True)
class StageRun:
    """Fields of every stage."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name, folder and seed of the run."""
    init_from: str | None = None
    """Weights to start from: the folder of a stage, a checkpoint, an export, or a Hugging Face folder."""
    plugins: list[str] = field(default_factory=list)
    """Python modules, or paths of .py files, that register your own tasks, tools or data formats."""
    dry_run: bool = False
    """Print parameters, memory, tokens and expected time without running the stage."""


@dataclass(kw_only=True)
class TrainingRun(StageRun):
    """Fields of every stage that trains."""

    continue_from: str | None = None
    """Run to continue with its optimizer state, counters and position in the data: the folder of a training stage, or a
    checkpoint. train.continue_as sets how the schedule continues."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps and checkpoints."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Distribution of the model and the batch over ranks."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation-aware training of the routed experts."""
    dither_masters: bool = False
    """With init_from weights whose experts are stored as codes: spread the masters over the cells of their codes, drawn
    from run.seed, instead of setting them to the centres. Codes then change after small steps too."""
    device_tflops: float | None = None
    """Matmul peak of one device in TFLOP/s for the time that dry_run prints; null measures this machine's device. Only
    dry_run reads it."""

    def __post_init__(self) -> None:
        """Check constraints that span sections."""
        check_ranges(self, prefix="", ranges={POSITIVE: ("device_tflops",)})
        self._check_continuation()
        if self.dither_masters and self.init_from is None:
            raise ConfigError(
                "dither_masters is true and init_from is null: give weights with stored codes, or leave it out"
            )
        if self.model.num_experts % self.parallel.expert:
            raise ConfigError(
                f"parallel.expert is {self.parallel.expert}: it must divide model.num_experts={self.model.num_experts}"
            )
        if self.parallel.engine is EngineName.torch and self.parallel.expert > 1:
            raise ConfigError(
                f"parallel.expert is {self.parallel.expert}: parallel.engine=torch runs in one process; give 1"
            )
        if self.quant.enabled:
            check_groups(self.model, self.quant)

    def _check_continuation(self) -> None:
        if self.continue_from is None:
            if self.train.continue_as is not None:
                raise ConfigError(
                    f"train.continue_as is {self.train.continue_as} and continue_from is null: "
                    "give the stage to continue as continue_from"
                )
            return
        if self.init_from is not None:
            raise ConfigError(
                f"init_from is {self.init_from} and continue_from is {self.continue_from}: give init_from to start "
                "from weights, or continue_from to continue a run with its optimizer state"
            )
        if self.train.continue_as is None:
            raise ConfigError(
                "train.continue_as is null: give part or whole. part: this config describes the added steps, "
                "and its schedule starts at the last learning rate. whole: it describes the run from step 0"
            )
        if self.train.continue_as is Continuation.part and self.optim.schedule.initial_ratio:
            raise ConfigError(
                f"optim.schedule.initial_ratio is {self.optim.schedule.initial_ratio}: with train.continue_as=part the "
                "warmup starts at the last learning rate; remove this override"
            )


@dataclass(kw_only=True)
class DocumentRun(TrainingRun):
    """Fields of every stage that trains on documents."""

    train: DocumentTrainConfig = field(default_factory=DocumentTrainConfig)
    """Steps, batch and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents to train on, and the tokenizer."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks whose demonstrations the sources of kind dialogues contain."""

    def __post_init__(self) -> None:
        """Check constraints that span sections."""
        super().__post_init__()
        check_length(self.model, name="data.seq_len", length=self.data.seq_len)
        self._check_tokenizer()
        if not any(source.weight > 0 for source in self.data.sources.values()):
            raise ConfigError("data.sources has no source with a weight above 0: add one, or choose data=pretrain")
        before = 0
        for number, change in enumerate(self.data.mix):
            first = change.first_step(self.train.steps)
            if not before < first < self.train.steps:
                raise ConfigError(
                    f"data.mix[{number}] begins at step {first}: give a step after {before} and before "
                    f"train.steps={self.train.steps}"
                )
            before = first

    def _check_tokenizer(self) -> None:
        tokenizer, num_rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.vocab_size is not None and tokenizer.vocab_size > num_rows:
            raise ConfigError(
                f"data.tokenizer.vocab_size is {tokenizer.vocab_size} and model.vocab_size is {num_rows}: "
                "the embedding needs at least one row per token; lower the first or raise the second"
            )
        if self.init_from is None and tokenizer.retrain:
            raise ConfigError(
                "data.tokenizer.retrain is true and init_from is null: without weights there is no tokenizer to "
                "replace; remove data.tokenizer.retrain"
            )
        if self.init_from is None and tokenizer.path is None and num_rows < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size is {num_rows}: a new tokenizer has at least {MIN_VOCAB_SIZE} tokens; give at least "
                "that many, or an existing tokenizer as data.tokenizer.path"
            )


@dataclass(kw_only=True)
class PretrainRun(DocumentRun):
    """Pretraining from random weights, or further pretraining from `init_from`, such as with a longer context."""


@dataclass(kw_only=True)
class SftRun(DocumentRun):
    """Supervised fine-tuning on chats, demonstrations and text; quantisation-aware where `quant.enabled`."""


@dataclass(kw_only=True)
class UpcycleRun(StageRun):
    """Conversion of a dense model into an MoE model with the same output: weights for init_from of pretrain and sft."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the MoE model. Its dense layers and model.intermediate_size must equal those of the dense model."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    """How experts are made from the dense feed-forward layers."""

    def __post_init__(self) -> None:
        """Check that the feed-forward layers divide into the experts."""
        plan_upcycling(self.model, self.upcycle)


@dataclass(kw_only=True)
class RlRun(TrainingRun):
    """Reinforcement learning on multi-step tool use, with rollouts from the quantised weights."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to solve."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits and sampling of trajectories."""
    rl: RlConfig = field(default_factory=RlConfig)
    """RL algorithm, batch size and loss."""

    def __post_init__(self) -> None:
        """Check constraints that span sections."""
        super().__post_init__()
        check_length(self.model, name="rollout.max_tokens", length=self.rollout.max_tokens)
        check_mode(self.rollout, self.train)
        if self.rl.max_staleness and self.rollout.mode is Mode.deterministic:
            raise ConfigError(
                f"rl.max_staleness is {self.rl.max_staleness} with rollout.mode=deterministic: older weights have other"
                " logprobs than the trainer. Give rl.max_staleness=0, or rollout.mode=fast"
            )


def check_folder_name(field: str, folder: str) -> None:
    """Raise `ConfigError` if a folder's path is empty or contains unprintable characters, such as line breaks."""
    if not folder or not folder.isprintable():
        raise ConfigError(f"{field} is {folder!r}: give the path of a folder, such as runs")


def check_length(model: ModelConfig, *, name: str, length: int) -> None:
    """Raise `ConfigError` if `length`, the value of `name`, is above model.max_position_embeddings."""
    longest = model.max_position_embeddings
    if length > longest:
        raise ConfigError(f"{name} is {length}: give at most model.max_position_embeddings={longest}")


def check_groups(model: ModelConfig, quant: QuantConfig) -> None:
    """Raise `ConfigError` when the rows of the experts do not divide into whole groups that share a scale."""
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(model, name)
        if width % quant.group_size:
            raise ConfigError(f"quant.group_size is {quant.group_size}: it must divide model.{name}={width}")


@dataclass(kw_only=True)
class ExportRun(StageRun):
    """Export to a folder that transformers loads: quantised routed experts, tokenizer, chat template and config."""

    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation of weights that were trained without it. Weights trained with quantisation keep their own."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Format of the export."""


@dataclass(kw_only=True)
class EvalRun(StageRun):
    """Evaluation of exported weights on held-out tasks."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to solve."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits of trajectories. eval.temperatures replaces rollout.temperature."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Number of tasks, temperatures and comparisons."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents on whose validation split the language-model loss is measured; without sources it is not measured."""

    def __post_init__(self) -> None:
        """Refuse settings without effect, and a limit on thoughts in a vote, which compares whole turns."""
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
class ReportRun(StageRun):
    """Report of a run: an HTML page, tables, and the numbers as JSON. Also works on an unfinished run."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """Content of the report."""


@dataclass(kw_only=True)
class GenerateRun(StageRun):
    """Generation: prints how a checkpoint or an export continues a prompt, or answers it with chat=true."""

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
class ServeRun(StageRun):
    """Server of a checkpoint or an export, for clients of OpenAI's API (chat completions with tools, completions)."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    """Address, key and limits."""


class OnChange(StrEnum):
    """What a recipe does with a stage that was started with another config or other inputs.

    refuse: print what changed, and stop. rerun: move the results of this stage and all later stages aside, and run them
    again. keep: use the results as they are.
    """

    refuse = "refuse"
    rerun = "rerun"
    keep = "keep"


@dataclass(kw_only=True)
class RecipeRun:
    """Run all stages of a recipe in order. A stage that is done and unchanged is skipped.

    `<stage>.<key>=<value>` overrides a key of one stage.
    """

    recipe: str = "k2_nano"
    """Name of a recipe of moetrain, or the path of a folder with a recipe.yaml."""
    folder: str = "runs"
    """Folder that contains all runs."""
    name: str | None = None
    """Name of the run; null takes the name of the recipe."""
    seed: int = 0
    """Seed of every random stream of every stage."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases, for every stage."""
    plugins: list[str] = field(default_factory=list)
    """Plugins of every stage, in addition to those of the recipe."""
    num_processes: int | None = None
    """Ranks on this machine for the stages that train or evaluate; null takes the value in the recipe."""
    threads: int | None = None
    """Threads per process (run.threads); null takes the value in the recipe."""
    again_from: str | None = None
    """Run this stage and all later ones again. Their earlier results are kept as <stage>.previous."""
    on_change: OnChange = OnChange.refuse
    """What to do with a stage that was started with another config or other inputs. refuse: print the changes and stop.
    rerun: run this stage and all later ones again, and keep the earlier results as <stage>.previous. keep: use its
    results as they are."""
    dry_run: bool = False
    """Print parameters, memory, tokens and expected time of each stage without running it."""
    device_tflops: float | None = None
    """Matmul peak of one device in TFLOP/s for the time that dry_run prints, for every stage; null takes each stage's
    value."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="",
            ranges={SEED: ("seed",), COUNT: ("num_processes", "threads"), POSITIVE: ("device_tflops",)},
        )
        check_folder_name("folder", self.folder)
