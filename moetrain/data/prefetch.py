"""Reads the batch of the next step while the current one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Prefetch(Generic[_Item]):
    """Returns `read(n)`, and reads n + 1 in another thread meanwhile. An error is raised when its item is asked for."""

    def __init__(self, read: Callable[[int], _Item]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[_Item]] | None = None

    def __call__(self, number: int) -> _Item:
        """Return item `number`."""
        if self._next is not None and self._next[0] == number:
            item = self._next[1].result()
        else:
            item = self._pool.submit(self._read, number).result()  # one thread alone reads, in order
        self._next = number + 1, self._pool.submit(self._read, number + 1)
        return item
