"""What stages and recipes can be told: one root dataclass a command, its sections, and the checks that span sections.

Those of `verify` and `bench` are in `moetrain.commands`. `moetrain.compose` fills them from YAML and the command line.
No torch here, and no Hydra.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from moetrain.data.config import MIN_VOCAB_SIZE, DataConfig
from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.export.config import ExportConfig
from moetrain.log import WandbMode
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, SEED, TEMPERATURE, check_ranges
from moetrain.report.config import ReportConfig
from moetrain.rl.config import RlConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.config import TaskConfig
from moetrain.train.config import Continuation, ReadingConfig, TrainConfig
from moetrain.upcycle.config import UpcycleConfig, plan_upcycling


@dataclass(kw_only=True)
class WandbConfig:
    """Where Weights & Biases writes; metrics.jsonl is written in any case."""

    project: str = "moetrain"
    """W&B project."""
    mode: WandbMode = WandbMode.auto
    """auto follows WANDB_MODE; without it, online when WANDB_API_KEY is set and offline otherwise."""


@dataclass(kw_only=True)
class RunConfig:
    """Name, place and seed of a run."""

    folder: str = "runs"
    """Folder of all runs."""
    name: str = "default"
    """Name of the run: its stages lie in <folder>/<name>/."""
    stage: str = "stage"
    """Name of the stage's folder in it."""
    seed: int = 0
    """Seed of every random stream."""
    threads: int | None = None
    """Threads that a process computes with; null takes OMP_NUM_THREADS, or all cores. Sums are added in another order
    with another number of them, so results are equal to the last digit only where this is."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        """Check that the names are names of folders, the seed and the number of threads."""
        check_ranges(self, prefix="run.", ranges={SEED: ("seed",), COUNT: ("threads",)})
        for name, value in (("name", self.name), ("stage", self.stage)):
            if not value or "/" in value or value.startswith(".") or not value.isprintable():
                raise ConfigError(f"run.{name} is {value!r}: give the name of a folder, without a slash")
        check_folder_name("run.folder", self.folder)

    @property
    def path(self) -> Path:
        """Folder of the stage: <folder>/<name>/<stage>."""
        return Path(self.folder) / self.name / self.stage


@dataclass(kw_only=True)
class StageRun:
    """What every stage has."""

    run: RunConfig = field(default_factory=RunConfig)
    """Name, place and seed."""
    init_from: str | None = None
    """Where the weights come from: the folder of a stage, a checkpoint, an export, or a Hugging Face folder."""
    plugins: list[str] = field(default_factory=list)
    """Modules, or paths of .py files, that register tasks, tools or data formats of one's own."""
    dry_run: bool = False
    """Print parameters, memory, tokens and expected time, and stop."""


@dataclass(kw_only=True)
class TrainingRun(StageRun):
    """What the stages that train have in common."""

    continue_from: str | None = None
    """Run to continue with its optimizer state, counters and place in the data: the folder of a stage that trained, or
    a checkpoint. train.continue_as says how the schedule continues."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps and checkpoints."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation-aware training of the routed experts."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        self._check_continuation()
        if self.model.num_experts % self.parallel.expert:
            raise ConfigError(
                f"parallel.expert is {self.parallel.expert}: it must divide model.num_experts={self.model.num_experts}"
            )
        if self.parallel.engine is EngineName.torch and self.parallel.expert > 1:
            raise ConfigError(f"parallel.expert is {self.parallel.expert}: the plain engine is one process, give 1")
        if self.quant.enabled:
            for name in ("hidden_size", "moe_intermediate_size"):
                width = getattr(self.model, name)
                if width % self.quant.group_size:
                    raise ConfigError(
                        f"quant.group_size is {self.quant.group_size}: it must divide model.{name}={width}"
                    )

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
                "train.continue_as is null: say how the run continues. part: this config describes the added steps, "
                "and its schedule starts at the last learning rate. whole: it describes the run from step 0"
            )
        if self.train.continue_as is Continuation.part and self.optim.schedule.initial_ratio:
            raise ConfigError(
                f"optim.schedule.initial_ratio is {self.optim.schedule.initial_ratio}: with train.continue_as=part the "
                "warmup starts at the last learning rate; leave it out"
            )


@dataclass(kw_only=True)
class ReadingRun(TrainingRun):
    """What the stages that learn from documents have in common."""

    train: ReadingConfig = field(default_factory=ReadingConfig)
    """Steps, batch and checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the model reads."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks whose demonstrations are the sources of kind dialogues."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        super().__post_init__()
        check_length(self.model, name="data.seq_len", length=self.data.seq_len)
        self._check_tokenizer()
        if not any(source.weight > 0 for source in self.data.sources.values()):
            raise ConfigError("data.sources has no source with a weight above 0: choose some, such as data=pretrain")
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
                "a model has at least as many rows as its tokenizer has tokens; lower the first or raise the second"
            )
        if self.init_from is None and tokenizer.retrain:
            raise ConfigError(
                "data.tokenizer.retrain is true and init_from is null: there are no weights whose tokenizer to replace"
            )
        if self.init_from is None and tokenizer.path is None and num_rows < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size is {num_rows}: a tokenizer that is trained has at least {MIN_VOCAB_SIZE} tokens; "
                "give more, or name a tokenizer as data.tokenizer.path"
            )


@dataclass(kw_only=True)
class PretrainRun(ReadingRun):
    """Pretraining: from random weights, or going on with a longer context."""


@dataclass(kw_only=True)
class SftRun(ReadingRun):
    """Supervised fine-tuning on dialogues, with INT4 quantisation-aware training."""


@dataclass(kw_only=True)
class UpcycleRun(StageRun):
    """From a dense model to experts, with the same output at the start: weights for init_from of pretrain and sft."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the sparse model; its dense layers and model.intermediate_size are those of the dense one."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    """What the experts are made of."""

    def __post_init__(self) -> None:
        """Check that the feed-forward layers divide into the experts."""
        plan_upcycling(self.model, self.upcycle)


@dataclass(kw_only=True)
class RlRun(TrainingRun):
    """Reinforcement learning on multi-step tool use, rolled out from the quantised weights."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to solve."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits and sampling of trajectories."""
    rl: RlConfig = field(default_factory=RlConfig)
    """How trajectories become an update."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        super().__post_init__()
        check_length(self.model, name="rollout.max_tokens", length=self.rollout.max_tokens)


def check_folder_name(field: str, folder: str) -> None:
    """Raise `ConfigError` when the path of a folder is empty or holds a line break or the like."""
    if not folder or not folder.isprintable():
        raise ConfigError(f"{field} is {folder!r}: give the path of a folder, such as runs")


def check_length(model: ModelConfig, *, name: str, length: int) -> None:
    """Raise `ConfigError` when sequences are longer than the model is declared for."""
    longest = model.max_position_embeddings
    if length > longest:
        raise ConfigError(f"{name} is {length}: give at most model.max_position_embeddings={longest}")


@dataclass(kw_only=True)
class ExportRun(StageRun):
    """Export to a folder that transformers loads: quantised routed experts, tokenizer, chat template and config."""

    quant: QuantConfig = field(default_factory=QuantConfig)
    """Format and grid of the experts, for weights that were trained without one; others keep theirs."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """What is written."""


@dataclass(kw_only=True)
class EvalRun(StageRun):
    """Evaluation of exported weights on held-out tasks."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to solve."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Limits of trajectories; eval.temperatures takes the place of rollout.temperature."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is evaluated."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents whose validation split tells how much language was kept; without sources that is left out."""


@dataclass(kw_only=True)
class ReportRun(StageRun):
    """The report of a run: a page, tables, and the numbers as JSON. Works on a run that is not finished, too."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """What is shown."""


@dataclass(kw_only=True)
class GenerateRun(StageRun):
    """What a checkpoint or an export says to a prompt."""

    prompt: str = ""
    """Text to continue. `-` reads it from standard input: `prompt=- < prompt.txt`."""
    chat: bool = False
    """Take the prompt as a user's message and answer it."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("max_new_tokens",), TEMPERATURE: ("temperature",)})


class OnChange(StrEnum):
    """What a run does with a stage that has begun with another config or other inputs.

    refuse: say what changed, and stop. rerun: move its results and those of the stages after it aside, and run them
    again. keep: take its results as they are.
    """

    refuse = "refuse"
    rerun = "rerun"
    keep = "keep"


@dataclass(kw_only=True)
class RecipeRun:
    """All stages of a recipe, one after the other; a stage that is done and unchanged is skipped.

    `<stage>.<key>=<value>` overrides a key of one stage.
    """

    recipe: str = "k2_nano"
    """Name of a recipe that comes with moetrain, or the path of a folder with a recipe.yaml."""
    folder: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Name of the run; null takes the recipe's."""
    seed: int = 0
    """Seed of every random stream of every stage."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases, for every stage."""
    plugins: list[str] = field(default_factory=list)
    """Plugins of every stage, beside those that the recipe names."""
    num_processes: int | None = None
    """Ranks on this machine for the stages that train or evaluate; null takes what the recipe says."""
    threads: int | None = None
    """Threads of every process (run.threads); null takes what the recipe says."""
    again_from: str | None = None
    """Run this stage and those after it again; what is there stays as <stage>.previous."""
    on_change: OnChange = OnChange.refuse
    """What to do with a stage that has begun with another config or other inputs: refuse the run and show the changes;
    rerun the stage and those after it, what is there stays as <stage>.previous; keep its results."""
    dry_run: bool = False
    """Print what each stage would take, and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={SEED: ("seed",), COUNT: ("num_processes", "threads")})
        check_folder_name("folder", self.folder)
