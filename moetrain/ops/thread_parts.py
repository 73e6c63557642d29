"""Runs independent parts of one operation in parallel, each on its own threads. CPUs only.

torch splits every product over its threads and waits for the last one. For an operation of hundreds of small products,
this synchronisation takes as long as the work. Here each thread computes its share of the products, and the threads
synchronise once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def part_bounds(size: int) -> list[tuple[int, int]]:
    """Return (first, end) per part of `size` equal items: at most one part per thread, none empty, about equal in size.

    Returns a single part if there is one thread or no items.
    """
    num_parts = max(1, min(torch.get_num_threads(), size))
    ends = [size * part // num_parts for part in range(num_parts + 1)]
    return list(pairwise(ends))


def run_parts(part: Callable[[int], None], num_parts: int) -> None:
    """Call `part(0)` .. `part(num_parts - 1)` in parallel and wait for all; an error in one is raised here.

    Parts run without gradient and must write to separate memory. The calling thread's torch threads are divided among
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
        torch.set_num_threads(threads)  # the setting applies to this Python thread
    with torch.no_grad():
        part(index)


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    """Return the thread pool shared by all operations; it starts threads on demand."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="parts")
