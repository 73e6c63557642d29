"""Stopping at the end of a step when a scheduler asks for it: SIGTERM (Slurm, torchrun), SIGUSR1 (Slurm's warning)."""

import signal
from enum import StrEnum
from types import FrameType, TracebackType
from typing import Any

import torch

from moetrain.parallel.topology import Topology

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Status(StrEnum):
    """How a stage ended: done, or saved on a signal and to be started again."""

    finished = "finished"
    interrupted = "interrupted"


class StopSignals:
    """Notes stop signals while it is entered, so that a loop can save at the end of a step."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Take over the handlers of SIGTERM and SIGUSR1."""
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, topology: Topology) -> str | None:
        """Return the name of the signal that any rank received, the same on every rank, or None. A collective."""
        highest = topology.all_reduce_max(torch.tensor(float(self._received or 0)))
        return signal.Signals(int(highest)).name if highest > 0 else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
