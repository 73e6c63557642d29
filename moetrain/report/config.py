"""Config of a report. Does not import torch."""

from dataclasses import dataclass, field

from moetrain.ranges import NOT_NEGATIVE, check_ranges


@dataclass(kw_only=True)
class ReportConfig:
    """Report of one run: a page, tables and JSON files."""

    stages: list[str] = field(default_factory=list)
    """Folders of the stages, in the order in which they are shown. Empty shows all stages of the run, each after the
    stages that it depends on."""
    num_trajectories: int = 2
    """Complete trajectories to show per mode of an evaluation: up to this many right ones, and as many wrong ones."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="report.", ranges={NOT_NEGATIVE: ("num_trajectories",)})
