"""Seeded random streams, the device, ranks and ports, and process settings.

Every random draw is a function of (seed, name, index...), never of rank or order.
"""

import atexit
import ctypes
import hashlib
import multiprocessing
import os
import platform
import random
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_LEAVE_S = 30.0
"""Longest time that the end of a process waits for threads and processes that were left behind."""
_SEED_BITS = 63  # seeds that torch, numpy and random all accept


RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which ranks find each other; a launcher sets them beside WORLD_SIZE."""
LAUNCHER_PID = "MOETRAIN_LAUNCHER_PID"
"""Environment variable in which `run.torchrun` gives its process id to the ranks."""
LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", *RENDEZVOUS)
"""All environment variables in which a launcher gives a process its rank and the number of ranks."""


_CURE = "unset it, or start the ranks with launch/torchrun.sh"
MAX_PORT = 65535


def check_launcher() -> None:
    """Raise ConfigError if the rank or the number of ranks in the environment is impossible."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name} is {value!r} in the environment, but must be a whole number: {_CURE}")
    size, own = num_ranks(), rank()
    if size < 1 or own >= size:
        raise ConfigError(f"RANK is {own} and WORLD_SIZE is {size} in the environment, which is impossible: {_CURE}")


def check_rendezvous() -> None:
    """Raise ConfigError if the environment names ranks but not how they find each other.

    A check and a dry run connect to no other rank, so they require only WORLD_SIZE.
    """
    named = next((name for name in ("RANK", "WORLD_SIZE") if name in os.environ), None)
    if named is None or (named == "WORLD_SIZE" and num_ranks() == 1):
        return
    missing = [name for name in ("WORLD_SIZE", *RENDEZVOUS) if not os.environ.get(name)]
    if missing:
        value = os.environ[named]
        raise ConfigError(f"{named} is {value} in the environment, but without {', '.join(missing)}: {_CURE}")
    port = os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= MAX_PORT):
        raise ConfigError(
            f"MASTER_PORT is {port!r} in the environment, but must be a port from 1 to {MAX_PORT}: {_CURE}"
        )


def rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    """Return the number of ranks that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after `_LEAVE_S` at the latest: a plugin may have left threads that run on.

    A rank runs its exit functions and ends without taking the interpreter apart: a thread that is still inside torch's
    C++ code would then end the process with SIGABRT, after all work is done.
    """
    threading.Thread(target=_end_late, args=(code,), daemon=True).start()
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(code)


def _end_late(code: int) -> None:
    """End this process after `_LEAVE_S` with what keeps it: threads that are not daemons, and child processes."""
    time.sleep(_LEAVE_S)
    children = multiprocessing.active_children()
    here = (threading.main_thread(), threading.current_thread())
    others = [thread for thread in threading.enumerate() if thread not in here]
    # Daemons do not keep a process, but for those of a pool, which its exit function joins.
    threads = [thread.name for thread in others if not thread.daemon] or [thread.name for thread in others]
    for child in children:
        child.kill()
    with suppress(OSError, ValueError):  # its reader is gone, or it is closed
        names = ", ".join([*threads, *(child.name for child in children)])
        print(f"moetrain: ends although these still run: {names}", file=sys.stderr, flush=True)
    os._exit(code)


def available_memory() -> int:
    """Return the memory in bytes that processes can still take; where the system does not report it, all memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) << 10
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seed_of(seed: int, name: str, *index: int) -> int:
    """Return the seed of the stream `name` at `index`, e.g. `seed_of(seed, "rollout", step, task, sample)`; 63 bits."""
    text = ":".join([str(seed), name, *map(str, index)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def python_stream(seed: int, name: str, *index: int) -> random.Random:
    """Return a standard-library generator for the stream `name` at `index`."""
    return random.Random(seed_of(seed, name, *index))


def default_device() -> "torch.device":
    """Return the default device: the current GPU if there is one, else the CPU."""
    import torch  # config and planning code stays free of torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def torch_stream(seed: int, name: str, *index: int) -> "torch.Generator":
    """Return a CPU torch generator for the stream `name` at `index`."""
    import torch  # config and planning code stays free of torch

    return torch.Generator().manual_seed(seed_of(seed, name, *index))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_BLOCK = 1 << 30


def die_with_parent(parent: int | None = None) -> None:
    """Make Linux kill this process when its parent ends; does nothing on other systems.

    parent: id of the process that started this one, or of one above it. If it has ended already, this one ends at once.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent and process_state(parent) in ENDED:
            os.kill(os.getpid(), signal.SIGKILL)


ENDED = ("", "Z", "X")
"""States of `process_state` in which a process does not run any more."""


def process_state(process: int) -> str:
    """Return the state of a process from /proc (R, S, T, Z, ...), or an empty string if it does not exist."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Make glibc reuse freed blocks of up to 1 GB instead of returning them to the kernel.

    A training step frees and allocates the same blocks repeatedly. The kernel would zero every page each time, which
    took an eighth of a step of `k2_bench`. Other C libraries are left unchanged.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_BLOCK)
