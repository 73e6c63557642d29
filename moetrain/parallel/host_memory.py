"""Collectives of ranks on one host through shared memory: sum, gather, all-to-all.

Gloo sends through the loopback device, which copies each byte twice. In shared memory a rank writes to the place where
the others read. Gloo or NCCL are used across hosts, on GPUs, on CPUs other than x86, and for small tensors.

The memory has one slot per rank, to which only that rank writes, and one slot for sums. G ranks of a group, P elements,
N bytes of a rank's tensor.
"""

import logging
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from moetrain.runtime import ENDED, process_state

_log = logging.getLogger(__name__)

_SLOT_BYTES = 1 << 22  # bytes; small enough that a slot is still in cache when it is read
_CACHE_LINE_BYTES = 64  # each rank's counter has its own cache line
SMALL_BYTES = 1 << 16
"""Tensors of at most this many bytes are sent by gloo, which is as fast for them."""
_NUM_SPINS = 2000  # polls of a counter before the first pause; they take about 0.1 ms
_YIELD_S, _PAUSE_S, _LONGEST_PAUSE_S, _LIVENESS_INTERVAL_S = 2e-3, 2e-4, 0.1, 1.0


class HostMemory:
    """The shared memory of one process group. Every method is a collective of the group."""

    def __init__(self, memory: mmap.mmap, group: dist.ProcessGroup, *, slot: int) -> None:
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        whole = torch.frombuffer(memory, dtype=torch.uint8, count=slot * (self._num_ranks + 1))
        self._slots, self._sums = whole.view(-1, slot)[:-1], whole.view(-1, slot)[-1]
        self._slot = slot
        lines = memoryview(memory)[slot * (self._num_ranks + 1) :].cast("q")
        self._counters = lines[:: _CACHE_LINE_BYTES // 8]
        self._count = 0
        pids: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(pids, os.getpid(), group=group)
        self._pids: list[int] = pids

    @classmethod
    def open(cls, group: dist.ProcessGroup, *, slot: int = _SLOT_BYTES) -> "HostMemory | None":
        """Return new shared memory for a group, or None if its ranks cannot share memory. Collective."""
        num_ranks = dist.get_world_size(group)
        size = slot * (num_ranks + 1) + _CACHE_LINE_BYTES * num_ranks
        is_first = dist.get_rank(group) == 0
        file = _create_memory(size) if is_first else None
        path_and_name: list[Any] = [_descriptor_path(file) if file is not None else None]
        dist.broadcast_object_list(path_and_name, group_src=0, group=group)
        memory = _map_memory(path_and_name[0], size=size)
        is_shared = torch.tensor([float(memory is not None)])
        dist.all_reduce(is_shared, op=dist.ReduceOp.MIN, group=group)
        if file is not None:
            os.close(file)
        if memory is None or not is_shared.item():
            if is_first:
                _log.info("the ranks of a group cannot share memory; gloo is used instead")
            return None
        return cls(memory, group, slot=slot)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous `tensor` by its sum over the ranks, added in rank order."""
        flat_P = tensor.view(-1)
        slots_GP, sums_P = self._slots.view(flat_P.dtype), self._sums.view(flat_P.dtype)
        for piece in torch.split(flat_P, len(sums_P)):
            slots_GP[self._rank, : len(piece)] = piece
            self._barrier()
            own = slice(*(len(piece) * at // self._num_ranks for at in (self._rank, self._rank + 1)))
            torch.add(slots_GP[0, own], slots_GP[1, own], out=sums_P[own])
            for rank in range(2, self._num_ranks):
                sums_P[own] += slots_GP[rank, own]
            self._barrier()
            piece.copy_(sums_P[: len(piece)])

    def gather(self, tensor: torch.Tensor, *, out: torch.Tensor) -> None:
        """Write the tensors of all ranks, in rank order, to `out`. All tensors have one size and are contiguous."""
        own, out_GN = _as_bytes(tensor), _as_bytes(out).view(self._num_ranks, -1)
        for start in range(0, len(own), self._slot):
            piece = own[start : start + self._slot]
            self._slots[self._rank, : len(piece)] = piece
            self._barrier()
            out_GN[:, start : start + len(piece)] = self._slots[:, : len(piece)]
            self._barrier()

    def exchange(self, rows: torch.Tensor, *, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        """All-to-all with uneven splits: write the rows sent to this rank to `out`, in rank order of their senders.

        `send[i]` and `receive[i]` are the numbers of rows to and from rank i, and may be 0. Both tensors are
        contiguous.
        """
        width = out.element_size() * out.shape[1:].numel()
        sent, received = ([0, *accumulate(count * width for count in counts)] for counts in (send, receive))
        source, target = _as_bytes(rows), _as_bytes(out)
        share = self._slot // self._num_ranks  # bytes of a slot per receiving rank
        blocks_GGP = self._slots[:, : share * self._num_ranks].view(self._num_ranks, self._num_ranks, share)
        for start in range(0, self._max_over_ranks(max([*send, *receive]) * width), share):
            for other in range(self._num_ranks):
                piece = source[sent[other] + start : min(sent[other] + start + share, sent[other + 1])]
                blocks_GGP[self._rank, other, : len(piece)] = piece
            self._barrier()
            for other in range(self._num_ranks):
                piece = target[received[other] + start : min(received[other] + start + share, received[other + 1])]
                piece.copy_(blocks_GGP[other, self._rank, : len(piece)])
            self._barrier()

    def _max_over_ranks(self, number: int) -> int:
        """Return the maximum of `number` over the ranks."""
        numbers_G = self._slots[:, :8].view(torch.int64)
        numbers_G[self._rank] = number
        self._barrier()
        largest = int(numbers_G.max())
        self._barrier()
        return largest

    def _barrier(self) -> None:
        """Wait until all ranks have called this.

        Correct on x86, where other CPUs see the writes of a rank in the order in which they were made. Raises
        RuntimeError if a rank has ended. A rank that hangs is reported by the watchdog.
        """
        self._count += 1
        self._counters[self._rank] = self._count
        for other in range(self._num_ranks):
            for _ in range(_NUM_SPINS):
                if self._counters[other] >= self._count:
                    break
            else:
                self._poll(other)

    def _poll(self, other: int) -> None:
        start = last_check = time.monotonic()
        while self._counters[other] < self._count:
            now = time.monotonic()
            waited = now - start
            # The pauses grow, because the watchdog regards a thread that uses processor time as not waiting.
            time.sleep(0 if waited < _YIELD_S else min(max(_PAUSE_S, waited / 50), _LONGEST_PAUSE_S))
            if now - last_check > _LIVENESS_INTERVAL_S:
                last_check = now
                if process_state(self._pids[other]) in ENDED and self._counters[other] < self._count:
                    raise RuntimeError(
                        f"process {self._pids[other]}, rank {other} of a group, ended during a collective"
                    )


def _create_memory(size: int) -> int | None:
    """Return the descriptor of new memory, or None if unavailable. It is freed when no process maps it any more."""
    try:
        file = os.memfd_create(f"moetrain-{secrets.token_hex(8)}")
    except (AttributeError, OSError):  # not Linux
        return None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        os.close(file)
        return None
    return file


def _descriptor_path(file: int) -> tuple[str, str] | None:
    """Return the /proc path of a descriptor and the target of that link, or None without /proc."""
    path = f"/proc/{os.getpid()}/fd/{file}"
    try:
        return path, os.readlink(path)
    except OSError:
        return None


def _map_memory(address: tuple[str, str] | None, *, size: int) -> mmap.mmap | None:
    """Map the memory at (path, link target). Return None if the link differs, as it does on other hosts."""
    if address is None:
        return None
    path, name = address
    try:
        if os.readlink(path) != name:
            return None
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except OSError:
        return None


def is_large(tensor: torch.Tensor) -> bool:
    """Return whether shared memory is faster than gloo for a tensor of this size."""
    return tensor.numel() * tensor.element_size() > SMALL_BYTES


def all_reduce_in_place(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Replace a contiguous float32 `tensor` by its sum over a group, through shared memory if possible. Collective."""
    if dist.get_world_size(group) == 1:
        return
    if is_large(tensor) and (memory := shared_memory_of(group, device=tensor.device)):
        memory.sum_(tensor)
    else:
        dist.all_reduce(tensor, group=group)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


_memory_by_group: dict[dist.ProcessGroup, HostMemory | None] = {}


def shared_memory_of(group: dist.ProcessGroup | None, *, device: torch.device) -> HostMemory | None:
    """Return the shared memory of a group (None: all ranks), or None if tensors on `device` cannot use it.

    The first call for a group creates the memory and is collective.
    """
    ranks = dist.group.WORLD if group is None else group
    if device.type != "cpu" or ranks is None or dist.get_world_size(ranks) == 1 or dist.get_backend(ranks) != "gloo":
        return None
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if ranks not in _memory_by_group:
        _memory_by_group[ranks] = HostMemory.open(ranks)
    return _memory_by_group[ranks]
