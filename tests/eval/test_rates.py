import math

import pytest

from moetrain.eval.rates import mcnemar, paired_difference, wilson
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


def test_no_change_on_few_tasks_leaves_room_for_one() -> None:
    # Without changed tasks the variance under a difference d is d (1 - d) / n: the bound is z^2 / (n + z^2).
    for count in (2, 10, 1000):
        difference = paired_difference([True] * count, [True] * count)
        bound = 1.959964**2 / (count + 1.959964**2)
        assert difference.value == 0.0 and difference.p_value == 1.0
        assert (difference.low, difference.high) == (pytest.approx(-bound), pytest.approx(bound))


@pytest.mark.parametrize(("gained", "lost", "same"), [(12, 2, 36), (0, 5, 5), (3, 0, 0), (20, 0, 80), (7, 6, 2)])
def test_the_ends_of_a_paired_interval_are_where_the_score_test_rejects(gained: int, lost: int, same: int) -> None:
    difference = paired_difference(
        [False] * gained + [True] * (lost + same), [True] * gained + [False] * lost + [True] * same
    )
    count = gained + lost + same
    for end in (difference.low, difference.high):
        if abs(end) == pytest.approx(1):
            continue
        # The likeliest share of lost tasks under this difference, found by trying all; multinomial likelihood.
        shares = [max(0.0, -end) + step * (1 - abs(end)) / 2 / 20000 for step in range(1, 20000)]
        share = max(
            shares,
            key=lambda q: gained * math.log(q + end) + (lost and lost * math.log(q)) + same * math.log(1 - 2 * q - end),
        )
        variance = (2 * share + end - end * end) / count
        assert abs((gained - lost) / count - end) / math.sqrt(variance) == pytest.approx(1.96, rel=2e-3)


def test_mcnemar_is_the_tail_of_a_fair_coin() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(8, 1) == 2 * (1 + 9) / 512
    assert 0 < mcnemar(900, 1100) < 1e-4
    everything = sum(math.comb(9, number) for number in range(10) if not 1 < number < 8)
    assert mcnemar(1, 8) == everything / 2**9


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([True], [True, False])


def test_evaluations_are_paired_by_task() -> None:
    difference = paired({"1": False, "2": True, "3": True}, {"2": True, "1": True, "9": False})
    assert difference is not None and difference.count == 2 and difference.value == 0.5
    assert paired({"1": True}, {"2": True}) is None
