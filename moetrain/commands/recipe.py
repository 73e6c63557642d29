"""Configs of `run` and `report`, which concern whole runs. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.commands.stage import StageRun, WandbConfig, check_folder_name
from moetrain.ranges import COUNT, POSITIVE, SEED, check_ranges
from moetrain.report.config import ReportConfig


@dataclass(kw_only=True)
class ReportRun(StageRun):
    """Report of a run: an HTML page, tables, and the numbers as JSON. Also works on an unfinished run."""

    report: ReportConfig = field(default_factory=ReportConfig)
    """Content of the report."""


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
