"""The environment of one trajectory: a ledger in a new SQLite database, five tools, and a grader of every row."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from moetrain.errors import ToolError
from moetrain.runtime import python_stream
from moetrain.tasks.ledger.orders import Order, walk
from moetrain.tasks.protocol import Grade, Observation
from moetrain.tools.sql import SqlTools

ORDERS, TEXT = "orders", "text"
ACCOUNTS, BALANCE = "accounts", "balance"
_BUSY, _LOST = 0.5, 0.75  # of the failures: the first half is `busy`; half of the timeouts come after the work


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A ledger as data: orders by key with their texts, the balances at the start, and the key of the first order."""

    start: str
    orders: Mapping[str, Order]
    texts: Mapping[str, str]
    balances: Mapping[str, int]

    def postings(self) -> list[tuple[str, int]]:
        """Return each account and balance that the chain writes, in order."""
        chain = walk(self.start, orders=self.orders, balances=self.balances)
        return [pair for _, written in chain for pair in written]

    @property
    def answer(self) -> int:
        """The balance that the last order asks for."""
        *_, (report, _) = walk(self.start, orders=self.orders, balances=self.balances)
        return {**self.balances, **dict(self.postings())}[report.account]


class LedgerEnvironment:
    """The ledger of one trajectory."""

    def __init__(self, ledger: Ledger, *, tool_failure: float, deadline_s: float, stream: int) -> None:
        """Open a new database. tool_failure: probability that a call fails; `stream` seeds the failures."""
        self._ledger = ledger
        self._tool_failure = tool_failure
        self._failures = python_stream(stream, "ledger/tool_failures")
        self._postings = ledger.postings()
        self._last = dict(ledger.balances)
        self._num_made, self._num_right = 0, 0
        self._is_off = False
        self._connection = _open(ledger)
        self._tools = SqlTools(self._connection, deadline_s=deadline_s)

    def call(self, name: str, arguments: str) -> Observation:
        """Carry out one call. After `busy` nothing has been done; after `timeout` the work may have been done."""
        draw = self._failures.random() / self._tool_failure if self._tool_failure else 1.0
        if draw < _BUSY:
            return Observation(text="error: busy", is_error=True, is_transient=True)
        observation = self._done(name, arguments) if draw >= _LOST else None
        if draw >= 1 and observation is not None:
            return observation
        return Observation(text="error: timeout", is_error=True, is_transient=True)

    def _done(self, name: str, arguments: str) -> Observation:
        try:
            observation = Observation(text=self._tools.call(name, arguments))
        except ToolError as error:
            observation = Observation(text=f"error: {error}", is_error=True)
        self._follow_chain()
        return observation

    def _balances(self) -> dict[str, int]:
        return dict(self._connection.execute(f"SELECT id, {BALANCE} FROM {ACCOUNTS} ORDER BY rowid"))

    def _follow_chain(self) -> None:
        """Count the postings of the chain that have been made in their order, also after a balance that was wrong."""
        balances = self._balances()
        changed = [(account, balance) for account, balance in balances.items() if balance != self._last[account]]
        self._last = balances
        if not changed:
            return
        is_next = self._num_made < len(self._postings) and changed == [self._postings[self._num_made]]
        self._num_made += is_next
        self._is_off |= not is_next
        self._num_right += not self._is_off

    def grade(self, answer: str) -> Grade:
        """Compare every row with the rows after the whole chain, what was written with it, and the answer."""
        ledger = self._ledger
        texts = dict(self._connection.execute(f"SELECT id, {TEXT} FROM {ORDERS}"))
        if self._balances() != {**ledger.balances, **dict(self._postings)} or texts != ledger.texts:
            return Grade(reward=0.0, reason="wrong_rows" if self._num_made or self._is_off else "unchanged")
        if self._num_made < len(self._postings):
            return Grade(reward=0.0, reason="skipped")
        if answer.strip() != json.dumps(ledger.answer):
            return Grade(reward=0.0, reason="wrong_answer" if answer.strip() else "no_answer")
        return Grade(reward=1.0, reason="right")

    def progress(self) -> float:
        """Return the share of the chain's postings that were made before a balance was wrong for the first time."""
        return self._num_right / max(len(self._postings), 1)

    def has_erred(self) -> bool:
        """Return whether a balance was wrong."""
        return self._is_off

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


def _open(ledger: Ledger) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA journal_mode=OFF")
    connection.execute(f"CREATE TABLE {ORDERS} (id TEXT PRIMARY KEY, {TEXT} TEXT)")
    connection.execute(f"CREATE TABLE {ACCOUNTS} (id TEXT PRIMARY KEY, {BALANCE} INTEGER)")
    connection.executemany(f"INSERT INTO {ORDERS} VALUES (?, ?)", ledger.texts.items())
    connection.executemany(f"INSERT INTO {ACCOUNTS} VALUES (?, ?)", ledger.balances.items())
    return connection
