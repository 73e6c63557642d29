"""The demonstrator: carries out a chain of orders. Its reasoning before each call holds all that it has to remember.

For example `42 + 7 for "blen", next "k3f"`: the value read, what is done with it, and the order that follows. The next
reasoning is a function of the last one and the last result, so that a model can go on from a note of it alone.
"""

import json
import random
from collections.abc import Mapping

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.tasks.ledger.environment import ACCOUNTS, BALANCE, ORDERS, TEXT, Ledger, LedgerEnvironment
from moetrain.tasks.ledger.orders import Order, OrderKind, Posting


class _Demonstrator:
    """One demonstration in progress."""

    def __init__(self, environment: LedgerEnvironment, *, misspell: float, stream: random.Random) -> None:
        self.messages: list[Message] = []
        self._environment = environment
        self._misspell = misspell
        self._stream = stream
        self._num_calls = 0

    def act(self, thought: str, name: str, **arguments: str | int) -> str:
        """Call a tool, again after an error, and return its result."""
        identity = arguments.get("id")
        if isinstance(identity, str) and len(identity) > 1 and self._stream.random() < self._misspell:
            cut = self._stream.randrange(len(identity))
            wrong = {**arguments, "id": identity[:cut] + identity[cut + 1 :]}
            self._call(thought, name, wrong, is_learned=False)
        while True:
            text = self._call(thought, name, arguments, is_learned=True)
            if not text.startswith("error: "):
                return text

    def _call(self, thought: str, name: str, arguments: Mapping[str, str | int], *, is_learned: bool) -> str:
        written = json.dumps(arguments, separators=(",", ":"))
        call = ToolCall(name=name, arguments=written, id=call_id(name, self._num_calls))
        self._num_calls += 1
        text = self._environment.call(name, written).text
        self.messages += [
            Message(role=Role.assistant, reasoning=thought, tool_calls=[call], is_learned=is_learned),
            Message(role=Role.tool, name=name, tool_call_id=call.id, content=text),
        ]
        return text


def demonstrate(
    environment: LedgerEnvironment, ledger: Ledger, *, misspell: float, stream: random.Random
) -> list[Message]:
    """Return the demonstrator's turns and the tools' results, up to its final answer.

    misspell: probability that it misspells an id that it reads or writes, and notices the error. Such a turn is not
    learned.
    """
    demonstrator = _Demonstrator(environment, misspell=misspell, stream=stream)
    key, thought = ledger.start, f'next "{ledger.start}"'
    while True:
        demonstrator.act(thought, "get", table=ORDERS, id=key, column=TEXT)
        order = ledger.orders[key]
        if order.kind is OrderKind.report:
            thought = f'report "{order.account}"'
            answer = demonstrator.act(thought, "get", table=ACCOUNTS, id=order.account, column=BALANCE)
            return [*demonstrator.messages, Message(role=Role.assistant, reasoning=f"answer {answer}", content=answer)]
        balance = 0
        for place, posting in enumerate(order.postings):
            balance = _post(demonstrator, order, posting, rest=_rest(order, place))
        key = order.follows(balance)
        thought = _next(order, balance)


def _next(order: Order, balance: int) -> str:
    """Return the reasoning before an order is read; `balance` was written last."""
    found = f"{balance} is {'odd' if balance % 2 else 'even'}, " if order.else_key else ""
    return f'{found}next "{order.follows(balance)}"'


def _post(demonstrator: _Demonstrator, order: Order, posting: Posting, *, rest: str) -> int:
    """Read a balance, calculate the new one and write it; return it."""
    start = f"{_words(posting)}{rest}"
    balance = demonstrator.act(start, "get", table=ACCOUNTS, id=posting.source, column=BALANCE)
    if posting.op:
        sum_ = f"{balance} {posting.op} {posting.number}"
        thought = f'{sum_} for "{posting.target}"{rest}'
        balance = demonstrator.act(thought, "calculate", expression=sum_)
    thought = f'{balance} for "{posting.target}"{rest}'
    demonstrator.act(thought, "update", table=ACCOUNTS, id=posting.target, column=BALANCE, value=int(balance))
    return int(balance)


def _words(posting: Posting) -> str:
    if not posting.op:
        return f'"{posting.source}" to "{posting.target}"'
    return f'{posting.op} {posting.number} for "{posting.target}"'


def _rest(order: Order, place: int) -> str:
    """Return what remains of an order after its posting number `place`, in the words of the reasoning."""
    later = "".join(f", then {_words(posting)}" for posting in order.postings[place + 1 :])
    branch = f' if even, "{order.else_key}" if odd' if order.else_key else ""
    return f'{later}, next "{order.next_key}"{branch}'
