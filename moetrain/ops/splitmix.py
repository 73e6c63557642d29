"""The output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Increment of the generator's state; odd, so that multiplying by it is a bijection of 64 bits."""
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a bijection of 64 bits that mixes all of them; products wrap around."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
        numbers = (numbers ^ (numbers >> np.uint64(27))) * _SECOND
    result: NDArray[np.uint64] = numbers ^ (numbers >> np.uint64(31))
    return result
