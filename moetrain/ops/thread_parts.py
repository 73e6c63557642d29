"""Runs independent parts of one operation at the same time, each on threads of its own. CPUs only.

torch cuts every product among its threads and waits for the last of them. Where an operation is hundreds of small
products, the waits and wake-ups take as long as the work: one thread for each half of the products meets once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def part_bounds(size: int) -> list[tuple[int, int]]:
    """Return (first, end) of each part of `size` equal things: at most a part a thread, none empty, all alike in size.

    One part in all on one thread, or when there is nothing.
    """
    num_parts = max(1, min(torch.get_num_threads(), size))
    ends = [size * part // num_parts for part in range(num_parts + 1)]
    return list(pairwise(ends))


def run_parts(part: Callable[[int], None], num_parts: int) -> None:
    """Call `part(0)` .. `part(num_parts - 1)` at the same time and wait for all; an error of one is raised here.

    Parts write to memory that no other part touches, without gradient. The threads of this thread are shared out among
    the parts.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // num_parts)
    if num_parts == 1:
        part(0)
        return
    started = [_workers().submit(_on, part, index, share) for index in range(1, num_parts)]
    try:
        _on(part, 0, share)
    finally:
        for future in started:
            future.exception()  # waits
        torch.set_num_threads(threads)
    for future in started:
        future.result()


def _on(part: Callable[[int], None], index: int, threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # of this Python thread
    with torch.no_grad():
        part(index)


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    """Return the threads of all operations, each started when one is first missing."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="parts")
