"""What all code of a process shares and a plugin's code may change. It is put back, so that the run goes on.

Does not load torch; where it is not loaded, its settings are not watched.
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Any

_log = logging.getLogger(__name__)

_STREAMS = {"stderr": 2, "stdout": 1}
"""Standard streams by name, with their file descriptors; that of log lines first."""

_GUARDS: list[Any] = []
"""What ended an inference mode that a plugin began. It begins again when its guard is freed."""


class ProcessState:
    """The working directory, standard streams, and torch's defaults, as they are when it is made."""

    def __init__(self) -> None:
        self._folder = _working_directory()
        self._streams = {name: getattr(sys, name) for name in _STREAMS}
        self._standard = {name for name, number in _STREAMS.items() if _descriptor(self._streams[name]) == number}
        self._torch = sys.modules.get("torch")
        if self._torch is not None:
            self._dtype = self._torch.get_default_dtype()
            self._has_gradients = self._torch.is_grad_enabled()

    def repair(self) -> None:
        """Put back what the run needs while environments work: the working directory, torch's defaults, open streams.

        The files of the run have relative paths. A stream that was replaced stays, as a tool may read it.
        """
        if self._folder is not None and _working_directory() != self._folder:
            os.chdir(self._folder)
            _log.warning("a plugin changed the working directory of the whole process; it was changed back")
        self._repair_torch()
        for name, number in _STREAMS.items():
            if name in self._standard and self._streams[name].closed:
                self._reopen(name, number)

    def _repair_torch(self) -> None:
        torch = self._torch
        if torch is None:
            return
        if torch.get_default_dtype() is not self._dtype:
            torch.set_default_dtype(self._dtype)
            _log.warning("a plugin changed torch's default dtype; it was changed back")
        if torch.is_inference_mode_enabled() and self._has_gradients:
            _GUARDS.append(torch.inference_mode(mode=False))
            _GUARDS[-1].__enter__()
            _log.warning("a plugin left torch in inference mode; it was ended")
        if torch.is_grad_enabled() != self._has_gradients:
            torch.set_grad_enabled(self._has_gradients)
            _log.warning("a plugin changed whether torch computes gradients; it was changed back")

    def restore(self) -> None:
        """Put back what `repair` does, and streams that were replaced. For when no code of a plugin runs."""
        self.repair()
        for name, stream in self._streams.items():
            if getattr(sys, name) is not stream:
                setattr(sys, name, stream)
                _log.warning("a plugin replaced sys.%s; it was put back", name)

    def _reopen(self, name: str, number: int) -> None:
        """Open a standard stream again that was closed; its descriptor is still open."""
        closed = self._streams[name]
        with suppress(OSError):
            opened = open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
            self._streams[name] = opened
            if getattr(sys, name) is closed:
                setattr(sys, name, opened)
            for handler in logging.getLogger("moetrain").handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is closed:
                    handler.stream = opened
            _log.warning("a plugin closed sys.%s; it was opened again", name)


def _descriptor(stream: Any) -> int | None:
    """Return the file descriptor of a stream, or None if it has none."""
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def _working_directory() -> str | None:
    """Return the working directory, or None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None
