import pytest

from moetrain.eval.rates import paired_difference, wilson
from moetrain.eval.summary import paired


def test_wilson_gives_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, method 3 (score without continuity correction).
    rate = wilson([True] * 81 + [False] * 182)
    assert rate.value == pytest.approx(0.3080, abs=1e-4)
    assert (rate.low, rate.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_wilson_of_nothing_says_nothing() -> None:
    assert (wilson([]).low, wilson([]).high) == (0.0, 1.0)


def test_a_paired_difference_counts_only_tasks_that_changed() -> None:
    before = [False] * 30 + [True] * 70
    after = [True] * 20 + [False] * 10 + [True] * 70
    difference = paired_difference(before, after)
    assert difference.value == pytest.approx(0.2)
    assert 0.1 < difference.low < 0.2 < difference.high < 0.3


def test_no_change_is_a_difference_of_exactly_zero() -> None:
    difference = paired_difference([True, False], [True, False])
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([True], [True, False])


def test_evaluations_are_paired_by_task() -> None:
    difference = paired({"1": False, "2": True, "3": True}, {"2": True, "1": True, "9": False})
    assert difference is not None and difference.count == 2 and difference.value == 0.5
    assert paired({"1": True}, {"2": True}) is None
