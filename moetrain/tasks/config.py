"""Config of the tasks: family, difficulty, and mistakes of the demonstrator. Does not import torch."""

from dataclasses import dataclass, field
from typing import Any

from moetrain.chat.context import ContextPolicy
from moetrain.errors import ConfigError
from moetrain.ranges import BELOW_ONE, COUNT, POSITIVE, check_ranges

SHORTEST_CHAIN = 8
"""Fewest calls of a ledger task: every number of calls from here on can be drawn."""
LONGEST_CHAIN = 5000
"""Most calls of a ledger task: there are 6,760 keys of orders."""
_MOST_ACCOUNTS = 16  # their names begin with different letters
_FEWEST_ACCOUNTS = 4  # with fewer, an order may have no accounts whose new balances have two digits


@dataclass(kw_only=True)
class DemonstratorConfig:
    """Probabilities of the demonstrator's mistakes. With all 0 and `retry` 1 it makes none."""

    stop_early: float = 0.01
    """Per step: it reports its present value and stops."""
    skip_step: float = 0.0
    """Per step: it skips the step and continues with its present value."""
    wrong_name: float = 0.0
    """Per step: it uses another column of the table than the one asked for, and does not notice."""
    unknown_name: float = 0.05
    """Per step: it misspells a column, and the tool answers with an error. The misspelt turn is not learned."""
    retry: float = 0.4
    """After an error, its own or the tool's: it makes the correct call. Otherwise it reports its present value."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"task.database.demonstrator.{name} is {value}: give a probability from 0 to 1")


@dataclass(kw_only=True)
class DatabaseConfig:
    """Questions over a SQLite database that is drawn for each task."""

    min_calls: int = 2
    """Smallest number of tool calls that a task requires."""
    max_calls: int = 8
    """Largest number of tool calls that a task requires."""
    last_line: int = 17
    """Largest line number of a question. Short questions are padded with steps that are not asked for, up to this many
    lines, so that training covers the line numbers and the length of long questions."""
    deadline_s: float = 2.0
    """Seconds after which an SQL statement is stopped. rollout.call_deadline_s does not apply to tools that run inline,
    such as these."""
    demonstrator: DemonstratorConfig = field(default_factory=DemonstratorConfig)
    """Mistakes of the demonstrator whose trajectories are the SFT data."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="task.database.",
            ranges={COUNT: ("min_calls", "max_calls", "last_line"), POSITIVE: ("deadline_s",)},
        )
        if not 1 <= self.min_calls <= self.max_calls:
            raise ConfigError(
                f"task.database.min_calls is {self.min_calls}: give 1 to task.database.max_calls ({self.max_calls})"
            )


@dataclass(kw_only=True)
class LedgerConfig:
    """Chains of orders over the balances of a ledger: the next order is known when the present one is carried out."""

    min_calls: int = 8
    """Smallest number of tool calls that a task requires."""
    max_calls: int = 16
    """Largest number of tool calls that a task requires."""
    accounts: int = 8
    """Number of accounts, whose names begin with different letters."""
    branching: float = 0.0
    """Probability that an order names two next orders, of which the balance just written selects one."""
    misspell: float = 0.03
    """Per call that names a row: the demonstrator misspells its id, reads the error and repeats the call. The misspelt
    turn is not learned."""
    deadline_s: float = 2.0
    """Seconds after which an SQL statement is stopped. rollout.call_deadline_s does not apply to tools that run inline,
    such as these."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(
            self,
            prefix="task.ledger.",
            ranges={
                COUNT: ("min_calls", "max_calls", "accounts"),
                POSITIVE: ("deadline_s",),
                BELOW_ONE: ("misspell",),
            },
        )
        if not 0 <= self.branching <= 1:
            raise ConfigError(f"task.ledger.branching is {self.branching}: give a probability from 0 to 1")
        if not SHORTEST_CHAIN <= self.min_calls <= self.max_calls:
            raise ConfigError(
                f"task.ledger.min_calls is {self.min_calls}: give {SHORTEST_CHAIN} to task.ledger.max_calls "
                f"({self.max_calls})"
            )
        if self.max_calls > LONGEST_CHAIN:
            raise ConfigError(f"task.ledger.max_calls is {self.max_calls}: give at most {LONGEST_CHAIN}")
        if not _FEWEST_ACCOUNTS <= self.accounts <= _MOST_ACCOUNTS:
            raise ConfigError(f"task.ledger.accounts is {self.accounts}: give {_FEWEST_ACCOUNTS} to {_MOST_ACCOUNTS}")


_FAMILIES = {"database": DatabaseConfig, "ledger": LedgerConfig}


@dataclass(kw_only=True)
class TaskConfig:
    """Tool-use tasks for demonstrations, RL and evaluation."""

    name: str = "database"
    """Task family: a name in `tasks.registry`, or one that a plugin registered."""
    tool_failure: float = 0.1
    """Probability that a tool call fails through no fault of the caller (`busy`, `timeout`). A repeat may succeed."""
    declare_tools: bool = False
    """Begin each conversation with the tools' JSON schemas, about 400 tokens. Without them a model learns the tools
    from demonstrations."""
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    """Settings of the family `database`."""
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    """Settings of the family `ledger`."""
    context: ContextPolicy = field(default_factory=ContextPolicy)
    """What the model reads of a long conversation, in demonstrations, rollouts, evaluation and chat."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a plugin's family, checked against the dataclass that it registers. task.<name>.<field>=<value> and
    task.options.<field>=<value> have the same effect."""

    def __post_init__(self) -> None:
        """Check ranges, and that no settings of another family are given."""
        check_ranges(self, prefix="task.", ranges={BELOW_ONE: ("tool_failure",)})
        for family in _FAMILIES if self.name in _FAMILIES else ():
            settings = vars(getattr(self, family))
            given = [name for name, value in vars(_FAMILIES[family]()).items() if settings[name] != value]
            if given and family != self.name:
                raise ConfigError(
                    f"task.{family}.{given[0]} is given, and task.name is {self.name}: leave it out, because the "
                    f"settings of {family} have no effect"
                )
