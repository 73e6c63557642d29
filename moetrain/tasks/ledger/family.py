"""Ledger tasks by number: accounts, balances, orders and phrasing are a function of (seed, split, index)."""

from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.chat.messages import Message, Role
from moetrain.chat.tool_schema import ToolSpec
from moetrain.errors import DataError
from moetrain.runtime import python_stream
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.ledger.demonstrator import demonstrate
from moetrain.tasks.ledger.environment import Ledger, LedgerEnvironment
from moetrain.tasks.ledger.orders import check_length, draw_balances, draw_orders
from moetrain.tasks.ledger.phrases import order_text, question
from moetrain.tasks.names import draw_ids, draw_initials
from moetrain.tasks.protocol import Grade, InlineTask, Split, Task
from moetrain.tools.sql import SQL_TOOLS


@dataclass(frozen=True, kw_only=True)
class LedgerTask(InlineTask):
    """One chain of orders over one ledger."""

    ledger: Ledger
    text: str
    """The question."""
    num_calls: int
    """Tool calls of the right solution."""
    config: TaskConfig

    @property
    def prompt(self) -> list[Message]:
        """The question."""
        return [Message(role=Role.user, content=self.text)]

    def environment(self, stream: int) -> LedgerEnvironment:
        """Return an environment with a new database; `stream` seeds its tools' failures."""
        return LedgerEnvironment(
            self.ledger,
            tool_failure=self.config.tool_failure,
            deadline_s=self.config.ledger.deadline_s,
            stream=stream,
        )


class LedgerFamily:
    """All ledger tasks of one seed."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Store the config and the seed, which determine every task."""
        self._config = config
        self._seed = seed

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The tools get, find, aggregate, calculate and update."""
        return SQL_TOOLS

    @property
    def trained_calls(self) -> tuple[int, int]:
        """Smallest and largest number of calls of the tasks that `task` returns."""
        return self._config.ledger.min_calls, self._config.ledger.max_calls

    def task_of_length(self, split: Split, index: int, *, num_calls: int) -> LedgerTask:
        """Return task `index` among those of `split` that require `num_calls` calls."""
        return self.task(split, index, num_calls=num_calls)

    def task(self, split: Split, index: int, *, num_calls: int | None = None) -> LedgerTask:
        """Return task `index` of `split`, with `num_calls` calls; None cycles from min_calls to max_calls by index."""
        own = self._config.ledger
        stream = python_stream(self._seed, f"ledger/{split.value}", index, num_calls or 0)
        calls = num_calls or own.min_calls + index % (own.max_calls - own.min_calls + 1)
        check_length(calls)  # before identifiers are drawn, of which there are too few for longer chains
        balances = draw_balances(stream, draw_initials(stream, split=split, count=own.accounts))
        keys = draw_ids(stream, count=calls)
        orders = draw_orders(stream, balances, keys=keys, num_calls=calls, branching=own.branching)
        start = next(iter(orders))
        texts = {key: order_text(order, split=split, stream=stream) for key, order in sorted(orders.items())}
        text = question(start, split=split, stream=stream)
        ledger = Ledger(start=start, orders=orders, texts=texts, balances=balances)
        return LedgerTask(ledger=ledger, text=text, num_calls=calls, config=self._config)

    def demonstrate(self, task: Task, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        """Return the demonstrator's conversation and its grade. perfect: no misspelt ids."""
        if not isinstance(task, LedgerTask):
            raise DataError(f"a {type(task).__name__} is not a task of this family: give one that task() returned")
        environment = task.environment(stream)
        messages = demonstrate(
            environment,
            task.ledger,
            misspell=0.0 if perfect else self._config.ledger.misspell,
            stream=python_stream(stream, "ledger/demonstrator"),
        )
        grade = environment.grade(messages[-1].content)
        environment.close()
        return [*task.prompt, *messages], grade
