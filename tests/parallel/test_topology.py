"""One process is its own whole grid; what several see is in test_layouts.py."""

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.topology import setup


@pytest.mark.parametrize("engine", list(EngineName))
def test_one_process_needs_no_launcher_and_reduces_to_itself(engine: EngineName) -> None:
    topology = setup(ParallelConfig(engine=engine))
    mine = torch.tensor([1, 2])
    reduced = topology.all_reduce_sum(mine)
    reduced.add_(1)
    assert mine.tolist() == [1, 2]
    assert topology.gather_objects("a") == ["a"]
    assert topology.broadcast_object("a") == "a"
    assert (topology.is_main, topology.world_size, topology.expert_rank) == (True, 1, 0)


def test_the_plain_engine_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallel.engine is torch, which runs in one process, not 2"):
        setup(ParallelConfig(engine=EngineName.torch))


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"rank 1 of this machine finds no GPU of its own, because there are 1: start"
    ):
        setup(ParallelConfig(engine=EngineName.torch))
