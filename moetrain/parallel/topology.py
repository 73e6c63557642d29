"""This process's rank, process groups and device, and the collectives that training calls directly.

A single process requires no launcher: without torchrun's environment variables, a process group of one rank is created
in memory, without a port or a file.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moetrain.errors import ConfigError
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.watchdog import Watchdog, restart_of_shared_store
from moetrain.runtime import num_ranks

_log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_S = 60  # gloo times out later than the watchdog, because only the watchdog names the missing ranks


@dataclass(kw_only=True)
class Topology:
    """The rank, process groups and device of this process.

    All ranks are data-parallel. The experts of a layer are split over `parallel.expert` consecutive ranks, which form
    `expert_group`. The ranks that store the same experts form `expert_data_group`. Both are None without expert
    parallelism.
    """

    rank: int = 0
    world_size: int = 1
    expert_size: int = 1
    device: torch.device
    expert_group: dist.ProcessGroup | None = None
    expert_data_group: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None

    def enter_step(self, step: int) -> None:
        """Record the step that begins, for error messages about ranks that hang."""
        if self.watchdog is not None:
            self.watchdog.step = step

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def expert_rank(self) -> int:
        """Index of this rank in its expert group."""
        return self.rank % self.expert_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all ranks, on its device; `tensor` does not change."""
        return self._all_reduce(tensor, op=dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum of `tensor` over all ranks; `tensor` does not change."""
        return self._all_reduce(tensor, op=dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: torch.Tensor, *, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.world_size == 1:
            return tensor.clone()
        on_device = tensor.to(self.device, copy=True)
        dist.all_reduce(on_device, op=op)
        return on_device.to(tensor.device)

    def gather_objects(self, value: T) -> list[T] | None:
        """Return the picklable `value` of every rank, in rank order, on the main rank; None on other ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """Return the main rank's picklable `value` on every rank."""
        if self.world_size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def wait_for_main(self) -> None:
        """Wait until the main rank calls this too; there is no timeout while that rank is alive.

        For work of the main rank that may take longer than `parallel.timeout_s`.
        """
        if self.watchdog is not None:
            self.watchdog.wait_for_main()
            self.barrier()  # the main rank, and the store with it, must not end before all ranks have read the store

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        if self.world_size > 1:
            dist.barrier()


def setup(parallel: ParallelConfig) -> Topology:
    """Initialise torch.distributed if necessary, and return this process's topology. May be called again.

    Raises ConfigError if the number of processes does not fit the layout.
    """
    world_size = num_ranks()
    parallel.check_world_size(world_size)
    if parallel.engine == EngineName.torch:
        return Topology(device=_local_device())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    device = _local_device()
    if not dist.is_initialized():
        _init_process_group(parallel, device=device)
    from moetrain.parallel.expert import expert_groups  # deepspeed reads DS_ACCELERATOR when it is imported

    expert_group, expert_data_group = expert_groups(parallel.expert)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        expert_size=parallel.expert,
        device=device,
        expert_group=expert_group,
        expert_data_group=expert_data_group,
        watchdog=_watchdog(parallel) if world_size > 1 else None,
    )


@lru_cache(maxsize=1)
def _watchdog_of(rank: int, world_size: int, timeout_s: int) -> Watchdog:
    return Watchdog(rank=rank, world_size=world_size, timeout_s=timeout_s)


def _watchdog(parallel: ParallelConfig) -> Watchdog:
    """Return this process's watchdog; every call returns the same one."""
    return _watchdog_of(dist.get_rank(), dist.get_world_size(), parallel.timeout_s)


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine finds no GPU of its own, because there are {num_gpus}: start at most "
            "one rank per GPU (num_processes of a recipe, or the first argument of launch/torchrun.sh)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _restart_store(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group` that give each elastic restart its own keys in torchrun's store.

    On one machine torchrun uses one store for all restarts. Without separate keys, gloo finds the addresses of dead
    ranks there and waits for them.
    """
    restart = restart_of_shared_store()
    if restart == "0":
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout
    )
    prefixed = dist.PrefixStore(f"moetrain/restart_{restart}", store)  # type: ignore[attr-defined]
    return {"store": prefixed, "rank": rank, "world_size": world_size}


def _init_process_group(parallel: ParallelConfig, *, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=parallel.timeout_s + _GRACE_S)
    if "RANK" in os.environ:
        size, address = num_ranks(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # RANK may be left over from another program
            _log.info("rank %s of %d joins the others at %s", os.environ["RANK"], size, address)
        try:
            dist.init_process_group(backend, timeout=timeout, **_restart_store(timeout))
        except dist.DistError as error:
            raise ConfigError(
                f"the {size} ranks did not meet at {address} within {timeout.seconds} s: "
                "start all of them with launch/torchrun.sh, or unset WORLD_SIZE and RANK"
            ) from error
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
