"""Ranks of one host exchange through memory what gloo would have sent."""

import pytest
import torch
import torch.distributed as dist

from moetrain.parallel import host_memory
from moetrain.parallel.config import ParallelConfig
from moetrain.parallel.host_memory import HostMemory, shared_memory_of
from moetrain.parallel.topology import setup
from tests.distributed import run_ranks

NUM_RANKS = 3
SLOT = 96  # bytes: tensors of a test go in several pieces, the last of them short
ROWS = [[4, 0, 7], [1, 2, 0], [0, 9, 3]]
"""Rows that rank i has for rank j."""


def _exchanged(memory: HostMemory, rank: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what arrives through memory and through gloo."""
    send, receive = ROWS[rank], [row[rank] for row in ROWS]
    rows = (torch.arange(sum(send) * width).view(-1, width) + 1000 * rank).to(dtype)
    found, expected = (torch.zeros(sum(receive), width, dtype=dtype) for _ in range(2))
    memory.exchange(rows, send=send, receive=receive, out=found)
    dist.all_to_all_single(expected, rows, receive, send)
    return found, expected


def compare() -> dict[str, bool]:
    """Return for each operation whether this rank found the same as by gloo."""
    setup(ParallelConfig())
    rank, group = dist.get_rank(), dist.group.WORLD
    memory = HostMemory.open(group, slot=SLOT)
    assert memory is not None
    same: dict[str, bool] = {}
    for size in (1, 24, 25, 1000):
        mine = torch.randn(size, generator=torch.Generator().manual_seed(rank))
        found, expected = mine.clone(), [torch.empty(size) for _ in range(NUM_RANKS)]
        memory.sum_(found)
        dist.all_gather(expected, mine)
        same[f"sum of {size}"] = torch.equal(found, expected[0] + expected[1] + expected[2])
        gathered = torch.empty(NUM_RANKS * size)
        memory.gather(mine, out=gathered)
        same[f"gather of {size}"] = torch.equal(gathered, torch.cat(expected))
    for width, dtype in ((5, torch.float32), (1, torch.bfloat16), (40, torch.int64)):
        same[f"rows of {width} {dtype}"] = torch.equal(*_exchanged(memory, rank, width, dtype))
    same["memory of a group is opened once"] = shared_memory_of(None, device=torch.device("cpu")) is shared_memory_of(
        group, device=torch.device("cpu")
    )
    return same


def wait_for_the_dead() -> str:
    """Return the error of a rank whose peer ends before it joins a sum."""
    setup(ParallelConfig())
    memory = HostMemory.open(dist.group.WORLD)
    assert memory is not None
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(RuntimeError) as raised:
        memory.sum_(torch.zeros(10))
    return str(raised.value)


def apart() -> tuple[bool, bool]:
    """Return whether memory is opened if ranks cannot map the memory of rank 0, and if it cannot be created."""
    setup(ParallelConfig())
    original = host_memory._descriptor_path
    if dist.get_rank() == 0:
        host_memory._descriptor_path = lambda file: (original(file)[0], "/memfd:of another host (deleted)")
    unseen = HostMemory.open(dist.group.WORLD) is not None
    host_memory._descriptor_path = original
    host_memory._create_memory = lambda size: None
    return unseen, HostMemory.open(dist.group.WORLD) is not None


def test_sums_gathers_and_rows_are_those_of_gloo() -> None:
    for rank, same in enumerate(run_ranks(compare, NUM_RANKS)):
        assert all(same.values()), f"rank {rank}: {[name for name, value in same.items() if not value]}"


def test_ranks_that_share_no_memory_are_left_to_gloo() -> None:
    assert run_ranks(apart, 2) == [(False, False), (False, False)]


def test_one_rank_and_an_accelerator_need_no_memory() -> None:
    setup(ParallelConfig())
    assert shared_memory_of(None, device=torch.device("cpu")) is None
    assert shared_memory_of(None, device=torch.device("cuda")) is None


def test_a_rank_that_ended_is_an_error_of_those_that_wait_for_it() -> None:
    message, _ = run_ranks(wait_for_the_dead, 2)
    assert message.endswith("rank 1 of a group, ended during a collective")
