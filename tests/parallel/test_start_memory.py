"""The resident peak of a rank while its engine is built, against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.runtime import free_port

BELOW, ABOVE = 0.8, 1.15  # the plan leaves out padding, small buffers and what the allocator keeps

MEASURED = """
import importlib, json, sys
from pathlib import Path
import torch
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.topology import setup
from moetrain.plan.stage import plan_stage
from moetrain.quant.config import QuantConfig
from tests.parallel import nano

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

parallel, optim, quant = ParallelConfig(zero=int(sys.argv[1]), expert=int(sys.argv[2])), OptimConfig(), QuantConfig()

def build(model):
    return build_engine(
        model, parallel, optim_config=optim, quant_config=quant, compute_dtype=torch.bfloat16, seed=1
    )

topology = setup(parallel)
build(nano.model_config())  # imports, buffers of the process groups
model = ModelConfig(vocab_size=8192, hidden_size=512, num_layers=8, num_experts=8, moe_intermediate_size=512)
plan = plan_stage(
    model, optim=optim, parallel=parallel, world_size=topology.world_size, tokens=1, seq_len=1, tokens_in_memory=1
)
Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
before = status("VmRSS")
engine = build(model)
peak = status("VmHWM") - status("RssShmem") - before
print(json.dumps([peak, plan.bytes_start]), flush=True)
topology.barrier()
"""


@pytest.mark.parametrize(("zero", "expert", "ranks"), [(1, 1, 2), (3, 1, 4)])
def test_the_plan_states_the_peak_of_the_start(zero: int, expert: int, ranks: int) -> None:
    """With four ranks, a model that is built whole before ZeRO 3 partitions it exceeds the plan."""
    own = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "OMP_NUM_THREADS": "1"}  # freed tensors go back at once
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", MEASURED, str(zero), str(expert)]
    processes = [
        subprocess.Popen(
            words,
            cwd=root,
            env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        measured, planned = json.loads(out.splitlines()[-1])
        assert BELOW * planned < measured < ABOVE * planned, (measured / 4e6, planned / 4e6)
