"""Which task family, how hard, and how good its demonstrations are. No torch here."""

from dataclasses import dataclass, field
from typing import Any

from moetrain.errors import ConfigError
from moetrain.ranges import BELOW_ONE, COUNT, POSITIVE, check_ranges


@dataclass(kw_only=True)
class DemonstratorConfig:
    """Chances of the demonstrator's mistakes, per call; fixed before RL is looked at. All 0 and retry 1 is perfect."""

    stop_early: float = 0.03
    """It reports what it has and stops."""
    skip_step: float = 0.03
    """It leaves out a step and continues with the value it has."""
    wrong_name: float = 0.03
    """It reads another column of the table than the one asked for, and does not notice."""
    unknown_name: float = 0.05
    """It misspells a column; the tool answers with an error."""
    retry: float = 0.4
    """After an error, its own or the tool's, it makes the correct call; otherwise it reports what it has."""

    def __post_init__(self) -> None:
        """Check that the chances are chances."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"task.database.demonstrator.{name} is {value}: give a chance from 0 to 1")


@dataclass(kw_only=True)
class DatabaseConfig:
    """Questions over a SQLite database that is drawn for each task."""

    min_calls: int = 2
    """Fewest tool calls that a task needs."""
    max_calls: int = 8
    """Most tool calls that a task needs."""
    deadline_s: float = 2.0
    """Seconds after which a statement is stopped. These tools run inline, where rollout.call_deadline_s cannot hold."""
    demonstrator: DemonstratorConfig = field(default_factory=DemonstratorConfig)
    """Mistakes of the demonstrator whose trajectories are the SFT data."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="task.database.",
            ranges={COUNT: ("min_calls", "max_calls"), POSITIVE: ("deadline_s",)},
        )
        if not 1 <= self.min_calls <= self.max_calls:
            raise ConfigError(
                f"task.database.min_calls is {self.min_calls}: give 1 to task.database.max_calls={self.max_calls}"
            )


@dataclass(kw_only=True)
class TaskConfig:
    """The tool-use tasks that a model is shown, trained and graded on."""

    name: str = "database"
    """Task family: a name in `tasks.registry`, or one that a plugin registered."""
    tool_failure: float = 0.1
    """Chance that a call fails for no fault of the caller (`busy`, `timeout`); the same call may work again."""
    declare_tools: bool = False
    """Begin each conversation with the tools' JSON schemas, some 400 tokens; a nano model learns the tools by use."""
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    """Settings of the family `database`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a plugin's family, checked against the dataclass that it registered; task.<name>.<field>=<value> and
    task.options.<field>=<value> are the same."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, prefix="task.", ranges={BELOW_ONE: ("tool_failure",)})

    @property
    def min_calls(self) -> int:
        """Fewest calls of a task, for families without settings of their own: those of `database`."""
        return self.database.min_calls

    @property
    def max_calls(self) -> int:
        """Most calls of a task, for families without settings of their own: those of `database`."""
        return self.database.max_calls

    @property
    def demonstrator(self) -> DemonstratorConfig:
        """Mistakes of the demonstrator, for families without settings of their own: those of `database`."""
        return self.database.demonstrator
