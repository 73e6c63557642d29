"""A rank that hangs is named, with its step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from moetrain.parallel.watchdog import Place, hang_message

PROGRAM = """
import os, signal, sys, torch
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.topology import setup
topology = setup(ParallelConfig(timeout_s=4))
for step in range(5):
    topology.enter_step(step)
    if step == 3 and topology.rank == 1:
        print(f"stopped {os.getpid()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    topology.all_reduce_sum(torch.ones(3))
"""


def test_a_rank_that_is_stopped_is_named_with_the_step_by_one_that_waits() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    from tests.distributed import _free_port

    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[0].returncode == 1
    assert "step 3: rank 0 has waited in the collective at moetrain/parallel/topology.py:" in said
    assert "did not arrive: rank 1: rank 1 gives no sign of life" in said


def test_a_rank_that_is_somewhere_else_is_named_with_its_line() -> None:
    own = Place(step=7, line="moetrain/train/step.py:60", waits=True, beat=9)
    others = {0: Place(step=7, line="moetrain/train/step.py:60", waits=True, beat=3)}
    others |= {2: Place(step=6, line="moetrain/data/loader.py:88", waits=False, beat=4)}
    said = hang_message(own, others, rank=1, timeout_s=30)
    assert said.endswith("did not arrive: rank 2: rank 2 is at moetrain/data/loader.py:88 in step 6")
