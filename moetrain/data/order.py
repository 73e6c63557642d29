"""A pseudo-random permutation of row numbers without a list: row k of a pass is computed from k.

A Feistel network (Luby and Rackoff, SIAM J. Comput. 17, 1988) permutes the numbers of an even number of bits. A result
outside of the wanted range is permuted again until it is inside ("cycle walking": Black and Rogaway, CT-RSA 2002,
method 2). The numbers have less than four times the size of the range, so fewer than four permutations are needed on
average. All arithmetic is modulo 2^64, so the result is the same on every machine.
"""

import numpy as np

from moetrain.ops.splitmix import GOLDEN, mixed

ORDER_VERSION = 2
"""Version of the order of rows of prepared data. A change of the permutation or of the packing plan increases it."""
_ROUNDS = 8
_MAX_SIZE = 2**62


class Permutation:
    """A bijection of [0, size) that depends on `key`, an integer of up to 64 bits."""

    def __init__(self, size: int, *, key: int) -> None:
        """Raises ValueError for a size that is not in [1, 2^62)."""
        if not 1 <= size < _MAX_SIZE:
            raise ValueError(f"the size of a permutation is {size}: give 1 to 2^62 - 1")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        with np.errstate(over="ignore"):
            self._keys = mixed(np.uint64(key) + GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64))

    def at(self, indices: np.ndarray) -> np.ndarray:
        """Return the images of `indices`, uint64 in [0, size)."""
        found = self._once(indices.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._once(found[outside])
        return found

    def __call__(self, index: int) -> int:
        """Return the image of one number."""
        return int(self.at(np.array([index]))[0])

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half_bits, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (mixed(right ^ key) & self._mask)
        return (left << self._half_bits) | right
