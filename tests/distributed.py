"""Runs a function on several gloo processes of this machine, as torchrun would, and brings back what each returned."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from moetrain.runtime import free_port

TIMEOUT_S = 180.0  # a launch takes 10 s on an idle machine; a hang must end all the same


def run_ranks(function: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
    """Return `function(**arguments)` of each rank, in rank order.

    `function` is importable by name; what goes in and out is picklable. Raises AssertionError with the trace of the
    first rank that failed, or when the ranks are not done in 180 s; no process is left behind.
    """
    # Ranks are forked from one process that has imported torch and DeepSpeed: each rank would take seconds to do so.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moetrain.parallel.deepspeed_engine"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        target = (function, arguments, rank, world_size, port, sender)
        processes.append(context.Process(target=_run_rank, args=target, daemon=True))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    try:
        return _collect(pipes, deadline=time.monotonic() + TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        assert time.monotonic() < deadline, f"ranks {sorted(set(range(len(pipes))) - results.keys())} hang"
        for rank, pipe in enumerate(pipes):
            if rank in results or not pipe.poll(0.02):
                continue
            try:
                result, failure = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure = "the process died"
            assert failure is None, f"rank {rank}: {failure}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    function: Callable[..., Any], arguments: dict[str, Any], rank: int, world_size: int, port: int, sender: Connection
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        outcome = (function(**arguments), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
