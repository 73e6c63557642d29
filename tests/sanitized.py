"""A plugin of pytest for `launch/test_sanitized.sh`: gives each packed weight and each cache a block of the heap.

Sanitizers watch the ends of blocks of the heap, but not those of the parts of a mapping that `Memory` gives out.
"""

import torch

from moetrain.kernels.memory import Memory


def _zeros(self: Memory, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def pytest_configure() -> None:
    """Replace the mappings in this process."""
    Memory.zeros = _zeros  # type: ignore[method-assign]
