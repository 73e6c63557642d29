"""A rank that hangs is named, with its step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from moetrain.parallel.watchdog import RankStatus, hang_message
from moetrain.runtime import free_port

PROGRAM = """
import os, signal, sys, time, torch
import torch.distributed as dist
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
topology = setup(ParallelConfig(timeout_s=4))
stopped, late_s = int(sys.argv[1]), float(sys.argv[2])
for step in range(4):
    topology.enter_step(step)
    topology.all_reduce_sum(torch.ones(3))
if topology.rank == stopped:
    os.kill(os.getpid(), signal.SIGSTOP)
if topology.rank == 2:
    time.sleep(late_s)
dist.recv(torch.ones(3), src=stopped)  # a rank that ends does not end this
"""


def start_ranks(world_size: int, program: str, *arguments: str, **environment: str) -> list[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    of_all = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    of_all |= {"MASTER_ADDR": "127.0.0.1", **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(("stopped", "late_s"), [(1, 1.0), (1, 3.5), (0, 0.0)])
def test_a_rank_that_is_stopped_is_named_with_the_step_and_none_that_waits(stopped: int, late_s: float) -> None:
    """Rank 2 begins to wait while rank 0 does, looks at it while rank 0 looks itself, or after rank 0 has ended.

    Where rank 0 is stopped it keeps the store, as on several machines; otherwise the launcher does.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if stopped else None
    port = str(store.port if store else free_port())
    of_store = {"TORCHELASTIC_USE_AGENT_STORE": str(store is not None), "MASTER_PORT": port}
    ranks = start_ranks(3, PROGRAM, str(stopped), str(late_s), **of_store)
    waiting = [rank for rank in range(3) if rank != stopped]
    try:
        said = [ranks[rank].communicate(timeout=120)[1] for rank in waiting]
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [ranks[rank].returncode for rank in waiting] == [1, 1]
    named = [line for line in "".join(said).splitlines() if "did not arrive" in line]
    assert len(named) == 2, said
    for line in named:
        assert line.startswith("moetrain: step 3: rank ")
        assert "has waited in the collective at <string>:" in line
        assert f"did not arrive: rank {stopped}: rank {stopped} gives no sign of life" in line


IN_MEMORY = """
import os, signal, torch
import torch.distributed as dist
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.host_memory import shared_memory_of
from moetrain.parallel.topology import setup
topology = setup(ParallelConfig(timeout_s=20))
memory = shared_memory_of(None, device=topology.device)
topology.enter_step(7)
memory.sum_(torch.ones(3))
if topology.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
memory.sum_(torch.ones(3))
"""


def test_a_rank_that_waits_in_shared_memory_waits_to_the_watchdog() -> None:
    ranks = start_ranks(2, IN_MEMORY, MASTER_PORT=str(free_port()))
    try:
        said = ranks[0].communicate(timeout=120)[1]
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[0].returncode == 1
    assert "moetrain: step 7: rank 0 has waited in the collective at <string>:" in said
    assert "did not arrive: rank 1: rank 1 gives no sign of life" in said


LATE = """
import sys, time, torch
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
topology = setup(ParallelConfig(timeout_s=3))
topology.all_reduce_sum(torch.ones(3))
if topology.rank == 1:
    time.sleep(float(sys.argv[1]))
topology.all_reduce_sum(torch.ones(3))
time.sleep(float(sys.argv[2]))
print("done")
"""


@pytest.mark.parametrize("goes_on_s", [0.0, 4.0])
def test_a_rank_that_comes_while_others_look_for_it_is_no_hang(goes_on_s: float) -> None:
    """It comes after the whole timeout, during the last looks; the process ends then, or goes on."""
    ranks = start_ranks(2, LATE, "3.8", str(goes_on_s), MASTER_PORT=str(free_port()))
    ends = [(rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    assert [(out, code) for (out, _), code in ends] == [("done\n", 0)] * 2, ends


ENDS = """
import os
import time
import torch.distributed as dist
from moetrain.parallel import watchdog
watchdog._MAX_INTERVAL_S = 0.0  # no pause, so that it calls the store while the process ends
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
watchdog.Watchdog(rank=0, world_size=2, timeout_s=60)
time.sleep(0.2)
"""


def test_a_process_ends_in_peace_while_its_watchdog_is_at_the_store() -> None:
    """Without an end of the thread before the interpreter's, about a third of such processes end with SIGABRT."""
    programs = [subprocess.Popen([sys.executable, "-c", ENDS], cwd=Path(__file__).parents[2]) for _ in range(8)]
    assert [program.wait(timeout=120) for program in programs] == [0] * 8


PREPARES = """
import os, signal, time
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
from moetrain.train.stages import main_rank_first
topology = setup(ParallelConfig(timeout_s=2))

def longer_than_the_timeout():
    if topology.is_main:
        time.sleep(4)
    return "prepared"

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

print(main_rank_first(topology, longer_than_the_timeout), flush=True)
main_rank_first(topology, stop)
"""


def test_what_the_main_rank_prepares_may_take_longer_than_the_timeout_unless_it_is_dead() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start_ranks(2, PREPARES, TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(store.port))
    try:
        out, said = ranks[1].communicate(timeout=120)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert out == "prepared\n", said
    assert ranks[1].returncode == 1
    assert "moetrain: rank 1 waits for what rank 0 prepares, and rank 0 has given no sign of life for 2 s" in said


def test_a_rank_that_is_somewhere_else_is_named_with_its_line() -> None:
    own = RankStatus(step=7, line="moetrain/train/step.py:60", is_waiting=True, heartbeat=9)
    others = {0: RankStatus(step=7, line="moetrain/train/step.py:60", is_waiting=True, heartbeat=3)}
    others |= {2: RankStatus(step=6, line="moetrain/data/loader.py:88", is_waiting=False, heartbeat=4)}
    said = hang_message(own, others, rank=1, timeout_s=30)
    assert said.endswith("did not arrive: rank 2: rank 2 is at moetrain/data/loader.py:88 in step 6")
