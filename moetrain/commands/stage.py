"""The fields of every stage, and checks that several commands make. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from pathlib import Path

from moetrain.errors import ConfigError
from moetrain.log import WandbMode
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.ranges import COUNT, SEED, check_ranges


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
    plugins: list[str] = field(default_factory=list)
    """Python modules, or paths of .py files, that register your own tasks, tools or data formats."""
    dry_run: bool = False
    """Print parameters, memory, tokens and expected time without running the stage."""


@dataclass(kw_only=True)
class WeightsRun(StageRun):
    """Fields of a command that reads weights."""

    advice = ""
    """What to give as `init_from`; empty where the command also works without."""
    init_from: str | None = None
    """Weights to start from: the folder of a stage, a checkpoint, an export, or a Hugging Face folder."""

    def require_weights(self) -> str:
        """Return `init_from`. Raises `ConfigError` with the advice if it is null."""
        if self.init_from is None:
            raise ConfigError(f"init_from is null: {self.advice}")
        return self.init_from


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
