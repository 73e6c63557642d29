"""Stopping at the end of a step on SIGTERM (Slurm, torchrun), SIGUSR1 (Slurm's warning) or Ctrl-C."""

import os
import signal
import time
from enum import StrEnum
from types import FrameType, TracebackType
from typing import Any

import torch

from moetrain.parallel.topology import Topology
from moetrain.runtime import rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STDERR = 2  # file descriptor of standard error
_SAME_PRESS_S = 1.0
"""A terminal sends Ctrl-C to its whole process group, and launchers forward it; within this time it counts as one
press."""


class Status(StrEnum):
    """How a stage ended: finished, or interrupted (saved after a signal, resumable)."""

    finished = "finished"
    interrupted = "interrupted"


class StopSignals:
    """Context manager that records stop signals, so that the loop can save at the end of a step.

    A second Ctrl-C raises KeyboardInterrupt at once; progress since the last checkpoint is lost.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._pressed_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Install the signal handlers."""
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers; after a KeyboardInterrupt, Ctrl-C stays ignored during shutdown."""
        for number, handler in self._previous.items():
            if number != signal.SIGINT or kind is not KeyboardInterrupt:
                signal.signal(number, handler)

    def requested(self, topology: Topology) -> str | None:
        """Return the name of a signal that any rank received, the same on every rank, or None. Collective."""
        highest = topology.all_reduce_max(torch.tensor(float(self._received or 0)))
        return signal.Signals(int(highest)).name if highest > 0 else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._pressed_at is not None and now - self._pressed_at > _SAME_PRESS_S:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing interrupts the shutdown
                raise KeyboardInterrupt
            if self._pressed_at is None:
                self._pressed_at = now
                _say("Ctrl-C: the run saves at the end of this step; press Ctrl-C again to stop at once without saving")
        self._received = signal.Signals(number)


def _say(text: str) -> None:
    """Write a line to standard error, on the main rank. A handler can interrupt a write of the logger's."""
    if rank() == 0:
        os.write(_STDERR, f"{text}\n".encode())
