"""Memory for what generation reads at every step: weights and the cache.

A step of one token reads every weight that it uses once, so memory bandwidth bounds its time. The bandwidth is higher
with pages of 2 MB than with pages of 4 KB, whose addresses the processor looks up 512 times as often.
"""

import contextlib
import mmap
import sys

import torch

_CHUNK = 64 << 20
_ALIGNMENT = 64


class Memory:
    """Gives out parts of large mappings, which the system backs with pages of 2 MB where it is set up to do so.

    Pages are taken when they are written first. A mapping is freed with the last of its tensors.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros that begin at a multiple of 64 bytes."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None or self._used + size > len(self._mapping):
            self._mapping, self._used = _mapping(max(size, _CHUNK)), 0
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return tensor.view(shape)


def _mapping(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without such pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
