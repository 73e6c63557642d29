"""Ctrl-C: the first asks for a save, the second stops at once."""

import os
import signal
from collections.abc import Iterator

import pytest

from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.topology import setup
from moetrain.train import interrupt
from moetrain.train.interrupt import StopSignals


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    """Give the handler of Ctrl-C back, whatever the test left."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_one_press_that_arrives_several_times_asks_for_one_save(capfd: pytest.CaptureFixture[str]) -> None:
    topology = setup(ParallelConfig(engine=EngineName.torch))
    with StopSignals() as signals:
        assert signals.requested(topology) is None
        for _ in range(3):  # from the terminal, from the runner, from torchrun
            press()
        assert signals.requested(topology) == "SIGINT"
    assert capfd.readouterr().err.count("press Ctrl-C again") == 1


def test_a_second_press_stops_at_once_and_a_third_does_not_disturb_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupt, "_SAME_PRESS_S", -1.0)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        press()
        press()
    press()


def test_the_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
