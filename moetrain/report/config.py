"""What a report shows. No torch here."""

from dataclasses import dataclass, field

from moetrain.ranges import NOT_NEGATIVE, check_ranges


@dataclass(kw_only=True)
class ReportConfig:
    """A page, tables and a JSON file of one run."""

    stages: list[str] = field(default_factory=list)
    """Folders of the stages, in the order to show them; none takes all of the run, each after those it takes."""
    num_trajectories: int = 2
    """Whole trajectories that are shown of each mode of an evaluation: this many right ones and as many wrong ones."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="report.", ranges={NOT_NEGATIVE: ("num_trajectories",)})
