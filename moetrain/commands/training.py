"""Configs of the stages that train: `pretrain`, `sft` and `rl`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field

from moetrain.commands.stage import WeightsRun, check_groups, check_length
from moetrain.data.config import MIN_VOCAB_SIZE, DataConfig, SourceKind
from moetrain.errors import ConfigError
from moetrain.inference.mode import Mode
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import POSITIVE, check_ranges
from moetrain.rl.config import RlConfig, check_mode
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.config import TaskConfig
from moetrain.train.config import Continuation, DocumentTrainConfig, TrainConfig


@dataclass(kw_only=True)
class TrainingRun(WeightsRun):
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
    """With init_from weights whose experts are stored as codes: start each master at a random point of its quantisation
    cell (drawn from run.seed) instead of the cell's centre, so that small updates can change codes too."""
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
        prepared = [name for name, source in self.data.sources.items() if source.kind is SourceKind.prepared]
        if tokenizer.shrink_model and prepared:
            raise ConfigError(
                f"data.tokenizer.shrink_model is true, and data.sources.{prepared[0]} is prepared: its tokenizer is "
                "used, and the model keeps its rows; leave shrink_model out, or give model.vocab_size"
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
class RlRun(TrainingRun):
    """Reinforcement learning on multi-step tool use, with rollouts from the quantised weights."""

    advice = "RL starts from weights that solve some tasks; give those of an SFT stage"
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
