"""torchrun for the ranks of a stage: `python -m moetrain.run.torchrun` takes the arguments of torchrun.

It differs in how it ends: after a stop signal, or when a rank failed, it writes one line in place of a traceback and
exits with the code of the ranks. Ranks get `SAVE_SECONDS` seconds to save after a stop signal. A Ctrl-C reaches this
process more than once, from the terminal and from the process that started it: only the first stop signal counts.
"""

import logging
import os
import signal
import sys
from collections.abc import Collection, Sequence
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from moetrain.errors import ConfigError
from moetrain.run.stage import INTERRUPTED
from moetrain.runtime import LAUNCHER_PID

_log = logging.getLogger("moetrain.torchrun")
_SAVE_SECONDS = "110"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last one is Slurm's warning


def main(words: Sequence[str]) -> int:
    """Start ranks with the arguments of torchrun, wait for them, and return the exit code."""
    seconds = os.environ.get("SAVE_SECONDS") or _SAVE_SECONDS
    if not seconds.isdecimal():
        print(f"moetrain: SAVE_SECONDS is {seconds!r}: give a whole number of seconds", file=sys.stderr)
        return ConfigError.exit_code
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("torch").setLevel(logging.WARNING)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)
    try:  # torch handles SIGQUIT only
        run(parse_args(["--signals-to-handle", "SIGQUIT", "--shutdown-timeout", seconds, *words]))  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        return _interrupted(stopped.sigval.name)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        code = cause(codes.values())
        if code == INTERRUPTED:
            return _interrupted("a signal")
        for rank, own in codes.items():
            how = f"ended with exit code {own}" if own > 0 else f"was killed by signal {-own}"
            if own == code or own not in (-signal.SIGTERM, INTERRUPTED):
                _log.error("rank %d %s", rank, how)
        return code if code > 0 else 128 - code
    finally:
        _ignore_signals()  # nothing interrupts the way out
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Make torch stop the ranks, as its own handler does, but once: a second exception would interrupt that."""
    _ignore_signals()
    raise SignalException(f"process {os.getpid()} got signal {number}", sigval=signal.Signals(number))


def _ignore_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def cause(codes: Collection[int]) -> int:
    """Return the exit code, negative for a signal, of the rank that made the others end.

    torch ends the others by SIGTERM. One that was killed is the cause of errors of those that lose it.
    """
    return min(codes, key=lambda code: (code in (-signal.SIGTERM, INTERRUPTED), code > 0))


def _interrupted(what: str) -> int:
    _log.info("the ranks were stopped by %s; started again, the stage resumes from its last checkpoint", what)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
