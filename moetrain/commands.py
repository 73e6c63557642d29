"""All commands by name, and what those of `verify` and `bench` can be told. No torch here, and no Hydra."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from moetrain.config import (
    EvalRun,
    ExportRun,
    GenerateRun,
    PretrainRun,
    ReadingRun,
    RecipeRun,
    ReportRun,
    RlRun,
    SftRun,
    StageRun,
    UpcycleRun,
    check_length,
)
from moetrain.errors import ConfigError
from moetrain.kernels.config import Kernels
from moetrain.model.config import BalanceConfig, ModelConfig, Recompute
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.ranges import COUNT, check_ranges


@dataclass(kw_only=True)
class VerifyExportsRun(StageRun):
    """Shows that a quantised export is what was trained: for its masters, for transformers and for our own model."""

    masters: str | None = None
    """Stage or checkpoint that the export of init_from was made of."""
    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens a row."""
    fault: str = "none"
    """A fault to plant, that has to be found: none, code, scale or norm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("num_rows", "num_tokens")})
        if self.fault not in ("none", "code", "scale", "norm"):
            raise ConfigError(f"fault is {self.fault!r}: give none, code, scale or norm")


class LayoutScenario(StrEnum):
    """Where tokens go: as the router says, or all of them to the same experts."""

    routed = "routed"
    unbalanced = "unbalanced"


class LayoutFault(StrEnum):
    """A fault to plant in the sharded runs."""

    none = "none"
    norm_without_experts = "norm_without_experts"
    doubled_count = "doubled_count"
    dropped_token = "dropped_token"


@dataclass(kw_only=True)
class VerifyLayoutsRun(StageRun):
    """Shows that no layout changes a number: ranks x EP x ZeRO x accumulation x recompute against a plain torch loop.

    Starts its own processes. Combinations that do not fit (EP that does not divide the ranks) are left out.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; float32 products."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer; its name is replaced by each of `optimizers`, its rate is constant."""
    world_sizes: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of ranks."""
    experts: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Ranks that share the experts of a layer (EP)."""
    zeros: list[int] = field(default_factory=lambda: [1, 2, 3])
    """ZeRO stages."""
    accumulations: list[int] = field(default_factory=lambda: [1, 2])
    """Micro-batches a rank and step."""
    recomputes: list[Recompute] = field(default_factory=lambda: list(Recompute))
    """What is computed again in the backward pass."""
    optimizers: list[OptimizerName] = field(default_factory=lambda: list(OptimizerName))
    """Rules for the hidden matrices."""
    scenarios: list[LayoutScenario] = field(default_factory=lambda: list(LayoutScenario))
    """Where tokens go."""
    expert_rows: int | None = None
    """Limit of rows that a rank's experts receive at once (parallel.expert_rows) in the sharded runs; null: none."""
    steps: int = 5
    """Optimizer steps of each run; in every second one half of the rows is padding."""
    rows: int = 8
    """Rows a step, over all ranks."""
    seq_len: int = 16
    """Tokens a row."""
    timeout_s: int = 120
    """Seconds after which a collective that hangs is an error."""
    fault: LayoutFault = LayoutFault.none
    """A fault to plant in the sharded runs, that has to be found."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.seq_len < 6:
            raise ConfigError(f"seq_len is {self.seq_len}: give at least 6, two documents and some padding")
        for name in ("world_sizes", "experts", "zeros", "accumulations", "recomputes", "optimizers", "scenarios"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give at least one")
        check_ranges(self, prefix="", ranges={COUNT: ("steps", "expert_rows")})
        if min(self.experts) < 1:
            raise ConfigError(f"experts is {self.experts}: give numbers from 1")
        for zero in self.zeros:
            ParallelConfig(zero=zero)
        if self.fault is not LayoutFault.none and not self.model.num_moe_layers:
            raise ConfigError(f"fault is {self.fault}: a model without experts has no place for it; give none")
        pairs = [(ranks, experts) for ranks in self.world_sizes for experts in self.experts]
        if not any(ranks % experts == 0 and self.model.num_experts % experts == 0 for ranks, experts in pairs):
            raise ConfigError(
                f"experts is {self.experts}: give one that divides one of world_sizes={self.world_sizes} "
                f"and model.num_experts={self.model.num_experts}"
            )
        largest = max(self.world_sizes) * max(self.accumulations)
        if min(*self.world_sizes, *self.accumulations) < 1 or self.rows % largest:
            raise ConfigError(f"rows is {self.rows}: give a multiple of the most micro-batches of a step, {largest}")

    def optim_of(self, name: OptimizerName) -> OptimConfig:
        """Return the optimizer's settings with another rule."""
        return replace(self.optim, name=name)


@dataclass(kw_only=True)
class VerifyHfRun(StageRun):
    """Shows that transformers computes our logits from our weights: tiny models in every shape, or one folder.

    With init_from, a Hugging Face folder of bf16 or fp32 weights, that folder is compared in place of the tiny models.
    """

    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens a row."""
    fault: str = "none"
    """A fault to plant, that has to be found: none, norm or expert."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_rows", "num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.fault not in ("none", "norm", "expert"):
            raise ConfigError(f"fault is {self.fault!r}: give none, norm or expert")


@dataclass(kw_only=True)
class BenchBalanceRun(ReadingRun):
    """Trains one model with several ways to balance its experts, on the same tokens, and compares loads and losses."""

    methods: dict[str, BalanceConfig] = field(default_factory=dict)
    """What is compared, by name: each takes the place of model.balance. Their steps alternate, so all of their models
    are in memory at once."""
    tail_share: float = 0.25
    """Share of the steps, the last ones, over which loads and training loss are averaged."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods is empty: name at least one, such as methods.mine.bias_rule=sign")
        if not 0 < self.tail_share <= 1:
            raise ConfigError(f"tail_share is {self.tail_share}: give a share above 0, up to 1")


@dataclass(kw_only=True)
class BenchOptimizersRun(ReadingRun):
    """Compares Muon with AdamW at equal tokens, each at its best rate, and attention logits with and without QK-Clip.

    Name, rate and threshold of `optim` are set by the runs; the rest of it is the same for all.
    """

    muon_rates: list[float] = field(default_factory=lambda: [0.01])
    """Learning rates that Muon is tried at."""
    adamw_rates: list[float] = field(default_factory=lambda: [0.01])
    """Learning rates that AdamW is tried at."""
    clip_rate: float = 0.1
    """Learning rate of the two runs with Muon that show the clip: too high, so that logits grow."""
    clip_threshold: float = 30.0
    """QK-Clip's threshold in the second of them."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for name in ("muon_rates", "adamw_rates"):
            rates = getattr(self, name)
            if not rates or min(rates) <= 0:
                raise ConfigError(f"{name} is {rates}: give at least one learning rate, all above 0")
        for name in ("clip_rate", "clip_threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: give a number above 0")


@dataclass(kw_only=True)
class DataRun(ReadingRun):
    """Shows what a stage would read: the size of each source, and records as they are rendered and learned.

    Takes the overrides of `pretrain` and `sft`; those that are not about data change nothing. Learned parts are green,
    or between ⟦ and ⟧ where the output has no colour. Writes nothing.
    """

    records: int = 1
    """Records shown of each source."""
    characters: int = 4000
    """Characters shown of a record at most."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_ranges(self, prefix="", ranges={COUNT: ("records", "characters")})


class Peer(StrEnum):
    """Who else trains the same model in `bench train`: transformers' DeepseekV3 with its loop over experts or with
    grouped products, and the same model under DeepSpeed's AutoEP."""

    transformers_eager = "transformers_eager"
    transformers_grouped_mm = "transformers_grouped_mm"
    deepspeed_autoep = "deepspeed_autoep"


@dataclass(kw_only=True)
class BenchTrainRun(StageRun):
    """Measures training steps of ours and of peers in turn: same weights, data, dtypes and optimizer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape that everyone trains."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of everyone; peers have AdamW only."""
    rows: int = 8
    """Rows a step, over all ranks."""
    seq_len: int = 512
    """Tokens a row; a row is one document."""
    kernels: Kernels = Kernels.auto
    """What ours computes with, as train.kernels of a stage."""
    steps: int = 2
    """Steps that a contestant takes in each of its turns."""
    repetitions: int = 5
    """Turns of each contestant; the ratios are taken turn by turn."""
    warmup_steps: int = 3
    """Steps before the first turn, and for each setting that a peer may choose from."""
    peers: list[Peer] = field(default_factory=lambda: list(Peer))
    """Who is measured beside ours."""
    threads: int | None = None
    """Threads of all ranks of a contestant together; null takes the cores that this process may use."""
    ranks: int = 1
    """Above 1, ours and AutoEP also run as that many ranks that share the threads: expert- and data-parallel."""
    profile_steps: int = 2
    """Steps of ours that are profiled at the end; 0 leaves the profile out."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("rows", "seq_len", "steps", "repetitions", "warmup_steps", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.profile_steps < 0:
            raise ConfigError(f"profile_steps is {self.profile_steps}: give 0 or more")
        if self.threads is not None and self.threads < self.ranks:
            raise ConfigError(f"threads is {self.threads}: give at least one to each of the {self.ranks} ranks")
        check_length(self.model, name="seq_len", length=self.seq_len)
        for name, number in (("rows", self.rows), ("model.num_experts", self.model.num_experts)):
            if number % self.ranks:
                raise ConfigError(f"ranks is {self.ranks}: it must divide {name}={number}")
        if self.peers and self.optim.name is not OptimizerName.adamw:
            raise ConfigError(f"optim.name is {self.optim.name}: peers have adamw only; give that, or peers=[]")


@dataclass(kw_only=True)
class VerifyFaultsRun(StageRun):
    """Kills, damages and hangs real runs, and shows that what goes on is bit for bit what was never stopped."""

    model: str = "k2_nano_test"
    """Choice of model= of the runs."""
    kills: int = 30
    """Kills in all: a third inside a save, a sixth around its final rename, a fifth in a collective; rest in a step."""
    ranks: int = 2
    """Ranks of the runs on several; 1 leaves them out, and with them collectives, hangs and elastic restarts."""
    others: bool = True
    """Whether to also fill the disk, spoil a batch, hang a rank, and restart elastically."""
    overrides: list[str] = field(default_factory=list)
    """Further keys of the `pretrain` command line of every run."""
    fault: str = "none"
    """A fault to plant, that has to be found: none, step (goes on one step too far) or weight (one row is changed)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.kills < 1:
            raise ConfigError(f"kills is {self.kills}: give at least 1")
        if self.ranks < 1:
            raise ConfigError(f"ranks is {self.ranks}: give at least 1")
        if self.fault not in ("none", "step", "weight"):
            raise ConfigError(f"fault is {self.fault!r}: give none, step or weight")


SCHEMAS: dict[str, type] = {
    "run": RecipeRun,
    "pretrain": PretrainRun,
    "data": DataRun,
    "upcycle": UpcycleRun,
    "sft": SftRun,
    "rl": RlRun,
    "export": ExportRun,
    "eval": EvalRun,
    "report": ReportRun,
    "verify exports": VerifyExportsRun,
    "verify hf": VerifyHfRun,
    "verify faults": VerifyFaultsRun,
    "verify layouts": VerifyLayoutsRun,
    "bench balance": BenchBalanceRun,
    "bench optimizers": BenchOptimizersRun,
    "bench train": BenchTrainRun,
    "generate": GenerateRun,
}
"""Root schema of each command; `configs/<command>.yaml` is its primary config."""
