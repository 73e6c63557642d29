"""Named, seeded random streams, the device, ranks and ports, and what a process asks of the C library.

Every draw is a function of (seed, name, index...), never of rank or order.
"""

import ctypes
import hashlib
import os
import platform
import random
import signal
import socket
from typing import TYPE_CHECKING

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_SEED_BITS = 63  # the largest seed that torch, numpy and random all take


RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets beside WORLD_SIZE, so that ranks find each other."""
LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", *RENDEZVOUS)
"""Variables of the environment that tell a process its place among the ranks that a launcher started."""


def check_launcher(*, needs_others: bool) -> None:
    """Raise ConfigError when the environment describes ranks that no launcher can have started.

    needs_others: whether the process is going to meet the other ranks; a check needs their number alone.
    """
    cure = "unset it, or start the ranks with launch/torchrun.sh"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name} is {value!r} in the environment, where a launcher sets a whole number: {cure}")
    size, rank = num_ranks(), int(os.environ.get("RANK", "0"))
    if size < 1 or rank >= size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {size} in the environment: {cure}")
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if needs_others and size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE is {size} in the environment, and {', '.join(missing)} is not set: {cure}")


def num_ranks() -> int:
    """Return how many ranks a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resident_bytes() -> int:
    """Return the memory that this process holds in RAM now, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def free_port() -> int:
    """Return a port of this machine that nothing listens at."""
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
    """Return the device to compute on where nothing says otherwise: the GPU that is current, else the CPU."""
    import torch  # config and planning code stays free of torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def torch_stream(seed: int, name: str, *index: int) -> "torch.Generator":
    """Return a CPU torch generator for the stream `name` at `index`."""
    import torch  # config and planning code stays free of torch

    return torch.Generator().manual_seed(seed_of(seed, name, *index))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_BLOCK = 1 << 30


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends; does nothing elsewhere."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 1 GB for the next ones, in place of giving them back to the kernel.

    A training step frees and allocates the same blocks over and over; each time the kernel would clear every page anew,
    which took an eighth of a step of `k2_bench`. Another C library is left as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_BLOCK)
