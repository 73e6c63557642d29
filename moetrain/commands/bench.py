"""Configs of `bench`, except those of generation. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.commands.stage import StageRun, WeightsRun, check_length
from moetrain.commands.training import DocumentRun
from moetrain.errors import ConfigError
from moetrain.kernels.config import Kernels
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges


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
        _refuse_weights(self)


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
        rates = ("muon_rates", "adamw_rates")
        check_ranges(self, prefix="", ranges={POSITIVE: (*rates, "clip_rate", "clip_threshold")})
        for name in rates:
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give at least one learning rate")
        _refuse_weights(self)


def _refuse_weights(run: DocumentRun) -> None:
    """Raise `ConfigError` if weights are given to a command whose runs all start from random weights."""
    for name, value in (("init_from", run.init_from), ("continue_from", run.continue_from)):
        if value is not None:
            raise ConfigError(f"{name} is {value}: leave it out, because the runs start from random weights")


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
        counts = ("rows", "seq_len", "steps", "repetitions", "warmup_steps", "ranks", "threads")
        check_ranges(self, prefix="", ranges={COUNT: counts, NOT_NEGATIVE: ("profile_steps",)})
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
class BenchDataRun(StageRun):
    """Compare preparing tokens with `datasets.map`, compare bytes after kills, and measure the loader."""

    megabytes: int = 100
    """Size of the synthetic JSONL that is prepared, in 10^6 bytes."""
    files: int = 8
    """Number of files of the synthetic JSONL."""
    peer_megabytes: int = 100
    """Size of the part that datasets.map tokenizes, in whole files."""
    shard_bytes: int = 8 * 2**20
    """Bytes of input per shard."""
    vocab_size: int = 16384
    """Tokens of the tokenizer that is trained for the measurement."""
    kills: int = 3
    """Number of times that a preparation is killed."""
    tokens: int = 100_000_000
    """Random tokens of the folder from which the loader reads."""
    seq_len: int = 2048
    """Tokens per row of the loader."""
    read_seconds: float = 10.0
    """Seconds for which the loader is measured."""
    keep: bool = False
    """Keep the corpus and the prepared folders."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = ("megabytes", "files", "peer_megabytes", "shard_bytes", "vocab_size", "tokens", "seq_len")
        check_ranges(self, prefix="", ranges={COUNT: counts, NOT_NEGATIVE: ("kills",), POSITIVE: ("read_seconds",)})


@dataclass(kw_only=True)
class BenchServeRun(WeightsRun):
    """Measure latencies and throughput of an OpenAI-compatible endpoint under load from concurrent clients.

    With init_from, a server of these weights is started for the measurement. MOETRAIN_API_KEY is the key of url.
    """

    url: str | None = None
    """Base URL of a running endpoint, such as http://127.0.0.1:8000/v1; null starts a server of init_from."""
    model: str | None = None
    """Model to ask for; null takes the first that the endpoint names."""
    clients: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Numbers of clients that send requests at the same time, one after the other. Each has its own row."""
    seconds: float = 10.0
    """Seconds per number of clients, during which new requests are sent."""
    prompt_words: int = 100
    """Words of the user's message."""
    max_tokens: int = 64
    """Largest number of tokens of an answer."""
    with_tools: bool = False
    """Give a tool and require a call of it, so that every token is constrained."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {COUNT: ("clients", "prompt_words", "max_tokens"), POSITIVE: ("seconds",)}
        check_ranges(self, prefix="", ranges=ranges)
        if not self.clients:
            raise ConfigError("clients is empty: give at least one number")
