"""Which task family, how hard, and how good its demonstrations are. No torch here."""

from dataclasses import dataclass, field

from moetrain.errors import ConfigError
from moetrain.ranges import BELOW_ONE, COUNT, POSITIVE, check_ranges


@dataclass(kw_only=True)
class DemonstratorConfig:
    """Chances of the scripted expert's slips, a call; fixed before RL is looked at. All 0 and retry 1 is perfect."""

    stop_early: float = 0.03
    """It reports what it has and stops."""
    skip_step: float = 0.03
    """It leaves out a step and goes on with the value it has."""
    wrong_name: float = 0.03
    """It reads another column of the table than the one asked for, and does not notice."""
    unknown_name: float = 0.05
    """It misspells one name of the call: a column, a table, a filter or an id; the tool answers with an error."""
    misspell_again: float = 0.3
    """It misspells a name again when it repeats a call that it misspelt."""
    retry: float = 0.4
    """After an error, its own or the tool's, it makes the call (again) as it should; else it reports what it has."""

    def __post_init__(self) -> None:
        """Check that the chances are chances."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"task.demonstrator.{name} is {value}: give a chance from 0 to 1")


@dataclass(kw_only=True)
class TaskConfig:
    """The tool-use tasks that a model is shown, trained and graded on."""

    name: str = "database"
    """Task family: a name in `tasks.registry`, or one that a plugin registered."""
    min_calls: int = 2
    """Fewest tool calls that a task needs."""
    max_calls: int = 8
    """Most tool calls that a task needs."""
    tool_failure: float = 0.1
    """Chance that a call fails for no fault of the caller (`busy`, `timeout`); the same call may work again."""
    deadline_s: float = 2.0
    """Seconds after which a tool call is stopped."""
    max_output_characters: int = 200
    """Characters of a tool's result that the model is shown."""
    declare_tools: bool = False
    """Begin each conversation with the tools' JSON schemas, some 400 tokens; a nano model learns the tools by use."""
    demonstrator: DemonstratorConfig = field(default_factory=DemonstratorConfig)
    """Slips of the scripted expert whose trajectories are the SFT data."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="task.",
            ranges={
                COUNT: ("min_calls", "max_calls", "max_output_characters"),
                POSITIVE: ("deadline_s",),
                BELOW_ONE: ("tool_failure",),
            },
        )
        if not 1 <= self.min_calls <= self.max_calls:
            raise ConfigError(f"task.min_calls is {self.min_calls}: give 1 to task.max_calls={self.max_calls}")
