"""Parts of an operation on threads of their own: all are done, errors come back, the number of threads stays."""

import threading
from itertools import pairwise

import pytest
import torch

from moetrain.ops.thread_parts import part_bounds, run_parts
from tests.threads import num_threads


@pytest.mark.parametrize(("threads", "size", "lengths"), [(1, 7, [7]), (2, 7, [3, 4]), (4, 3, [1, 1, 1]), (3, 0, [0])])
def test_parts_cover_everything_once_and_are_alike(threads: int, size: int, lengths: list[int]) -> None:
    with num_threads(threads):
        bounds = part_bounds(size)
    assert [end - first for first, end in bounds] == lengths
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(one[1] == other[0] for one, other in pairwise(bounds))


def test_parts_run_at_the_same_time_without_gradient_on_their_share_of_the_threads() -> None:
    meeting = threading.Barrier(2, timeout=30)
    seen: dict[int, tuple[int, bool]] = {}

    def part(index: int) -> None:
        meeting.wait()  # breaks if one part waits for the other to end
        seen[index] = (torch.get_num_threads(), torch.is_grad_enabled())

    for threads, share in ((2, 1), (4, 2)):
        with num_threads(threads):
            run_parts(part, 2)
            assert torch.get_num_threads() == threads
        assert seen == {0: (share, False), 1: (share, False)}
        seen.clear()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_a_part_is_raised_after_the_others_are_done(failing: int) -> None:
    done: list[int] = []

    def part(index: int) -> None:
        if index == failing:
            raise ValueError(f"part {index}")
        done.append(index)

    with num_threads(2):
        with pytest.raises(ValueError, match=f"part {failing}"):
            run_parts(part, 2)
        assert torch.get_num_threads() == 2
    assert done == [1 - failing]
