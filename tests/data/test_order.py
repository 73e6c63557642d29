"""The permutation that orders the rows of prepared data."""

import numpy as np
import pytest

from moetrain.data.order import Permutation


def test_every_number_of_a_range_is_reached_once() -> None:
    for size in [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4097]:
        images = Permutation(size, key=size * 31).at(np.arange(size))
        assert sorted(images.tolist()) == list(range(size))


def test_the_order_is_frozen() -> None:
    """A change of these numbers changes what a resumed run reads: it needs a new ORDER_VERSION."""
    assert Permutation(10, key=2**63).at(np.arange(10)).tolist() == [4, 5, 2, 0, 8, 9, 6, 3, 7, 1]
    images = Permutation(10**9, key=123).at(np.arange(4))
    assert images.tolist() == [744087149, 814816120, 298967890, 473149238]
    assert Permutation(2**61 + 1, key=1)(2**60) == 1332743019584735810


def test_neighbours_are_spread_like_those_of_a_random_order() -> None:
    size = 200_000
    images = Permutation(size, key=7).at(np.arange(size)).astype(float)
    assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.003
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.01
    other = Permutation(size, key=8).at(np.arange(size)).astype(float)
    assert abs(np.corrcoef(images, other)[0, 1]) < 0.01


def test_a_range_that_cannot_be_permuted_is_refused() -> None:
    for size in (0, 2**62):
        with pytest.raises(ValueError, match=f"is {size}: give 1 to"):
            Permutation(size, key=0)
