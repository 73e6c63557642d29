"""Orders of a ledger as data: a chain in which each order names the next, and what the orders do to the balances."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from moetrain.errors import ConfigError
from moetrain.tasks.config import LONGEST_CHAIN, SHORTEST_CHAIN

_SMALLEST, _LARGEST = 10, 99  # of a balance: two digits at every length of a chain
_LARGEST_NUMBER = 9
_MOST_TRIES = 1000


class OrderKind(StrEnum):
    """What an order asks for."""

    add = "add"
    take = "take"
    move = "move"
    copy = "copy"
    report = "report"


NUM_CALLS = {OrderKind.add: 4, OrderKind.take: 4, OrderKind.move: 7, OrderKind.copy: 3, OrderKind.report: 2}
"""Tool calls of an order: read it, then read, calculate and write each balance."""


@dataclass(frozen=True, kw_only=True)
class Posting:
    """One written balance: that of `target` becomes that of `source`, plus `number` if `op` is `+`, minus if `-`."""

    source: str
    op: str
    number: int
    target: str

    def value(self, balance: int) -> int:
        """Return the balance to write."""
        return balance + {"+": self.number, "-": -self.number, "": 0}[self.op]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One order. other: second account of move and copy. next_key: the order that follows; if `else_key` is given, only
    when the balance written last is even, and `else_key` otherwise.
    """

    key: str
    kind: OrderKind
    account: str
    other: str = ""
    number: int = 0
    next_key: str = ""
    else_key: str = ""

    @property
    def postings(self) -> list[Posting]:
        """The balances that the order writes, in order."""
        account, other, number = self.account, self.other, self.number
        match self.kind:
            case OrderKind.add:
                return [Posting(source=account, op="+", number=number, target=account)]
            case OrderKind.take:
                return [Posting(source=account, op="-", number=number, target=account)]
            case OrderKind.move:
                taken = Posting(source=account, op="-", number=number, target=account)
                return [taken, Posting(source=other, op="+", number=number, target=other)]
            case OrderKind.copy:
                return [Posting(source=account, op="", number=0, target=other)]
        return []

    def follows(self, balance: int) -> str:
        """Return the key of the next order after `balance` was written last."""
        return self.else_key if self.else_key and balance % 2 else self.next_key


def walk(
    start: str, *, orders: Mapping[str, Order], balances: Mapping[str, int]
) -> Iterator[tuple[Order, list[tuple[str, int]]]]:
    """Yield each order of the chain with the (account, balance) pairs that it writes."""
    state, key = dict(balances), start
    while key:
        order = orders[key]
        written = []
        for posting in order.postings:
            state[posting.target] = posting.value(state[posting.source])
            written.append((posting.target, state[posting.target]))
        yield order, written
        key = order.follows(written[-1][1]) if written else ""


def draw_orders(
    stream: random.Random, balances: Mapping[str, int], *, keys: list[str], num_calls: int, branching: float
) -> dict[str, Order]:
    """Return the orders of a chain of `num_calls` calls by key; the first starts it.

    keys: at least twice as many as orders. branching: probability that an order names two orders to follow, of which
    one is wrong. num_calls: one that `check_length` admits.
    """
    chain = None
    while chain is None:  # copies can make all balances equal, which leaves no order that changes one
        chain = _draw_chain(stream, balances, keys=keys, num_calls=num_calls, branching=branching)
    return chain


def _draw_chain(
    stream: random.Random, balances: Mapping[str, int], *, keys: list[str], num_calls: int, branching: float
) -> dict[str, Order] | None:
    """Return the orders of a chain by key; None where the balances leave no order of the next kind."""
    state, unused = dict(balances), list(keys)
    chain: list[Order] = []
    for kind in _draw_kinds(stream, num_calls):
        order = _draw_order(stream, state, kind=kind, key=unused.pop())
        if order is None:
            return None
        for posting in order.postings:
            state[posting.target] = posting.value(state[posting.source])
        last = state[order.postings[-1].target] if order.postings else 0
        chain.append(order)
        chain[-1] = _linked(stream, order, last=last, unused=unused, branching=branching)
    orders = {order.key: order for order in chain}
    for key in sorted({order.else_key for order in chain} | {order.next_key for order in chain}):
        if key and key not in orders:  # the wrong branch: it can be carried out, and ends in a report
            report = _draw_order(stream, state, kind=OrderKind.report, key=key)
            assert report is not None  # it changes no balance
            orders[key] = report
    return orders


def _linked(stream: random.Random, order: Order, *, last: int, unused: list[str], branching: float) -> Order:
    if order.kind is OrderKind.report:
        return order
    right = unused[-1]
    fields = vars(order)
    if stream.random() >= branching:
        return Order(**{**fields, "next_key": right})
    wrong = unused.pop(0)
    first, second = (wrong, right) if last % 2 else (right, wrong)
    return Order(**{**fields, "next_key": first, "else_key": second})


def check_length(num_calls: int) -> None:
    """Raise ConfigError for a number of calls that no chain has."""
    if not SHORTEST_CHAIN <= num_calls <= LONGEST_CHAIN:
        raise ConfigError(
            f"a ledger task of {num_calls} calls cannot be made: give {SHORTEST_CHAIN} to {LONGEST_CHAIN} calls"
        )


def _draw_kinds(stream: random.Random, num_calls: int) -> list[OrderKind]:
    left = num_calls - NUM_CALLS[OrderKind.report]
    kinds: list[OrderKind] = []
    while left:
        fitting = [
            kind
            for kind, calls in NUM_CALLS.items()
            if kind is not OrderKind.report and left - calls >= 0 and left - calls not in (1, 2, 5)
        ]
        kinds.append(stream.choice(fitting))
        left -= NUM_CALLS[kinds[-1]]
    return [*kinds, OrderKind.report]


def _draw_order(stream: random.Random, state: Mapping[str, int], *, kind: OrderKind, key: str) -> Order | None:
    """Return an order whose postings all change a balance, to one of two digits; None when none is found."""
    for _ in range(_MOST_TRIES):
        account, other = stream.sample(sorted(state), 2)
        number = stream.randint(1, _LARGEST_NUMBER)
        order = Order(
            key=key,
            kind=kind,
            account=account,
            other=other if kind in (OrderKind.move, OrderKind.copy) else "",
            number=0 if kind in (OrderKind.copy, OrderKind.report) else number,
        )
        values = {posting.target: posting.value(state[posting.source]) for posting in order.postings}
        if all(_SMALLEST <= value <= _LARGEST and value != state[target] for target, value in values.items()):
            return order
    return None


def draw_balances(stream: random.Random, accounts: list[str]) -> dict[str, int]:
    """Return a balance of two digits for each account."""
    return {account: stream.randint(_SMALLEST, _LARGEST) for account in accounts}
