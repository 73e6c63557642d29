"""Sums and exchanges among ranks on one host, through a piece of memory that all of them map.

Gloo sends through the loopback device, which copies each byte twice; here a rank writes where the others read. On
several hosts, on GPUs, on CPUs that are not x86 and for small tensors gloo or NCCL do all.

G ranks of a group. A slot is the part of the memory that a rank writes to; there is one more, for what they sum.
"""

import logging
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_log = logging.getLogger(__name__)

_SLOT = 1 << 22  # bytes: what is written is still in cache when it is read
_LINE = 64  # bytes that a CPU reads at once: each rank's number has a line of its own
SMALL = 1 << 16
"""Bytes of a tensor up to which gloo is as fast."""
_SPINS = 2000  # looks at a number without a pause, about a tenth of a millisecond
_YIELD_S, _PAUSE_S, _LONGEST_PAUSE_S, _LIVENESS_S = 2e-3, 2e-4, 0.1, 1.0


class HostMemory:
    """The memory of one group. Every call is a collective of the group."""

    def __init__(self, memory: mmap.mmap, group: dist.ProcessGroup, *, slot: int) -> None:
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        whole = torch.frombuffer(memory, dtype=torch.uint8, count=slot * (self._num_ranks + 1))
        self._slots, self._sums = whole.view(-1, slot)[:-1], whole.view(-1, slot)[-1]
        self._slot = slot
        lines = memoryview(memory)[slot * (self._num_ranks + 1) :].cast("q")
        self._turns = lines[:: _LINE // 8]
        self._turn = 0
        pids: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(pids, os.getpid(), group=group)
        self._pids: list[int] = pids

    @classmethod
    def open(cls, group: dist.ProcessGroup, *, slot: int = _SLOT) -> "HostMemory | None":
        """Return memory for a group, None where its ranks cannot share any. A collective."""
        num_ranks = dist.get_world_size(group)
        size = slot * (num_ranks + 1) + _LINE * num_ranks
        is_first = dist.get_rank(group) == 0
        file = _made(size) if is_first else None
        holder: list[Any] = [_address(file) if file is not None else None]
        dist.broadcast_object_list(holder, group_src=0, group=group)
        memory = _mapped(holder[0], size=size)
        found = torch.tensor([float(memory is not None)])
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
        if file is not None:
            os.close(file)
        if memory is None or not found.item():
            if is_first:
                _log.info("the ranks of a group share no memory: gloo sends all that they exchange")
            return None
        return cls(memory, group, slot=slot)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Make `tensor`, contiguous, the sum over the ranks, added in their order on all of them."""
        flat_P = tensor.view(-1)
        slots_GP, sums_P = self._slots.view(flat_P.dtype), self._sums.view(flat_P.dtype)
        for piece in torch.split(flat_P, len(sums_P)):
            slots_GP[self._rank, : len(piece)] = piece
            self._wait()
            mine = slice(*(len(piece) * at // self._num_ranks for at in (self._rank, self._rank + 1)))
            torch.add(slots_GP[0, mine], slots_GP[1, mine], out=sums_P[mine])
            for rank in range(2, self._num_ranks):
                sums_P[mine] += slots_GP[rank, mine]
            self._wait()
            piece.copy_(sums_P[: len(piece)])

    def gather(self, tensor: torch.Tensor, *, out: torch.Tensor) -> None:
        """Write the ranks' tensors, all of one size, one after the other to `out`; both are contiguous."""
        mine, out_GN = _bytes(tensor), _bytes(out).view(self._num_ranks, -1)
        for start in range(0, len(mine), self._slot):
            piece = mine[start : start + self._slot]
            self._slots[self._rank, : len(piece)] = piece
            self._wait()
            out_GN[:, start : start + len(piece)] = self._slots[:, : len(piece)]
            self._wait()

    def exchange(self, rows: torch.Tensor, *, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        """Write to `out` the rows that the ranks have for this one, in their order.

        `send` and `receive` count rows, which are contiguous in both tensors; none is allowed.
        """
        width = out.element_size() * out.shape[1:].numel()
        sent, received = ([0, *accumulate(count * width for count in counts)] for counts in (send, receive))
        source, target = _bytes(rows), _bytes(out)
        share = self._slot // self._num_ranks  # of a slot for each rank that reads it
        blocks_GGP = self._slots[:, : share * self._num_ranks].view(self._num_ranks, self._num_ranks, share)
        for start in range(0, self._largest(max([*send, *receive]) * width), share):
            for other in range(self._num_ranks):
                piece = source[sent[other] + start : min(sent[other] + start + share, sent[other + 1])]
                blocks_GGP[self._rank, other, : len(piece)] = piece
            self._wait()
            for other in range(self._num_ranks):
                piece = target[received[other] + start : min(received[other] + start + share, received[other + 1])]
                piece.copy_(blocks_GGP[other, self._rank, : len(piece)])
            self._wait()

    def _largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        numbers_G = self._slots[:, :8].view(torch.int64)
        numbers_G[self._rank] = number
        self._wait()
        largest = int(numbers_G.max())
        self._wait()
        return largest

    def _wait(self) -> None:
        """Wait until all ranks are here. x86 shows others what a rank wrote in the order of its writes.

        A rank that died is an error; one that hangs is the watchdog's.
        """
        self._turn += 1
        self._turns[self._rank] = self._turn
        for other in range(self._num_ranks):
            for _ in range(_SPINS):
                if self._turns[other] >= self._turn:
                    break
            else:
                self._wait_long(other)

    def _wait_long(self, other: int) -> None:
        began = looked = time.monotonic()
        while self._turns[other] < self._turn:
            now = time.monotonic()
            waited = now - began
            # Ever longer pauses: a thread that takes processor time does not wait in the watchdog's eyes.
            time.sleep(0 if waited < _YIELD_S else min(max(_PAUSE_S, waited / 50), _LONGEST_PAUSE_S))
            if now - looked > _LIVENESS_S:
                looked = now
                if not _lives(self._pids[other]) and self._turns[other] < self._turn:
                    raise RuntimeError(f"process {self._pids[other]}, rank {other} of a group, ended in a collective")


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that ended and that its parent has not heard of yet does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _made(size: int) -> int | None:
    """Return the descriptor of new memory, which is gone with the last process that maps it; None without any."""
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


def _address(file: int) -> tuple[str, str] | None:
    """Return where another process of this host finds a descriptor, and what it sees there; None without /proc."""
    path = f"/proc/{os.getpid()}/fd/{file}"
    try:
        return path, os.readlink(path)
    except OSError:
        return None


def _mapped(address: tuple[str, str] | None, *, size: int) -> mmap.mmap | None:
    """Return the memory at an address, None where there is none, or another: on other hosts."""
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
    """Return whether memory is faster for a tensor than gloo."""
    return tensor.numel() * tensor.element_size() > SMALL


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Make `tensor`, contiguous float32, the sum over a group's ranks, in memory where they share it. A collective."""
    if dist.get_world_size(group) == 1:
        return
    if is_large(tensor) and (memory := memory_of(group, device=tensor.device)):
        memory.sum_(tensor)
    else:
        dist.all_reduce(tensor, group=group)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


_opened: dict[dist.ProcessGroup, HostMemory | None] = {}


def memory_of(group: dist.ProcessGroup | None, *, device: torch.device) -> HostMemory | None:
    """Return the memory of a group (None: all ranks) for tensors on `device`. The first call opens it: a collective."""
    found = dist.group.WORLD if group is None else group
    if device.type != "cpu" or found is None or dist.get_world_size(found) == 1 or dist.get_backend(found) != "gloo":
        return None
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if found not in _opened:
        _opened[found] = HostMemory.open(found)
    return _opened[found]
