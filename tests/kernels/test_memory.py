"""Memory for weights: alignment, zeros, parts that do not overlap, and its end with the last tensor."""

import gc

import torch

from moetrain.kernels.memory import Memory


def test_parts_are_zero_aligned_and_do_not_overlap() -> None:
    memory = Memory()
    parts = [
        memory.zeros(3, 5, dtype=torch.bfloat16),
        memory.zeros(1000, dtype=torch.uint8),
        memory.zeros(70 << 20, dtype=torch.uint8),  # more than a mapping
        memory.zeros(7, dtype=torch.float32),
    ]
    for i, part in enumerate(parts):
        assert not part.any()
        assert part.data_ptr() % 64 == 0
        part.fill_(i + 1)
    for i, part in enumerate(parts):
        assert bool((part == i + 1).all())


def test_no_elements_take_no_memory() -> None:
    assert Memory().zeros(0, 4, dtype=torch.bfloat16).shape == (0, 4)


def test_memory_is_freed_with_the_last_tensor() -> None:
    part = Memory().zeros(256 << 20, dtype=torch.uint8)
    start = part.data_ptr()
    rest = part[-10:]
    del part
    gc.collect()
    assert _is_mapped(start)
    del rest
    gc.collect()
    assert not _is_mapped(start)


def _is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        ranges = [line.split()[0].split("-") for line in lines]
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)
