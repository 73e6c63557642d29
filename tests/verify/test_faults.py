"""Faults cost time and no more; a planted fault is found. The whole measurement is `moetrain verify faults`."""

from pathlib import Path

import pytest

from moetrain.commands import VerifyFaultsRun
from moetrain.errors import BoundError, ConfigError
from moetrain.verify.faults import Phase, Request, shares, verify_faults
from moetrain.verify.table import check_rows


def _request(*, kills: int, planted: str, collection_kills: int = 0) -> Request:
    return Request(
        model="k2_nano_test",
        kills=kills,
        collection_kills=collection_kills,
        ranks=1,
        with_others=False,
        overrides=("parallel.engine=torch",),
        planted=planted,
        seed=0,
    )


def test_kills_inside_a_save_and_around_its_rename_change_no_bit(tmp_path: Path) -> None:
    rows = verify_faults(tmp_path, _request(kills=2, planted="none", collection_kills=1))
    check_rows(rows)
    names = {"kills in a save that did not land", "1 process: metrics lines that differ"}
    assert names | {"1 process: trajectories lost or collected twice"} <= {row.name for row in rows}


def test_a_run_that_goes_on_at_the_wrong_step_is_found(tmp_path: Path) -> None:
    with pytest.raises(BoundError, match="1 process: metrics lines that differ"):
        check_rows(verify_faults(tmp_path, _request(kills=1, planted="step")))


def test_thirty_kills_are_spread_as_promised() -> None:
    assert shares(30, ranks=2) == {Phase.save: 10, Phase.rename: 5, Phase.collective: 6, Phase.step: 9}
    assert sum(shares(7, ranks=1).values()) == 7


def test_a_fault_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="fault is 'moon': give none, step or weight"):
        VerifyFaultsRun(fault="moon")
