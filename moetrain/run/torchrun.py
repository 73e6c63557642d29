"""torchrun for the ranks of a stage: `python -m moetrain.run.torchrun` takes the arguments of torchrun.

It differs in how it ends: after a stop signal, or when a rank failed, it writes one line in place of a traceback and
exits with the code of the ranks. Ranks get `SAVE_SECONDS` seconds to save after a stop signal.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from moetrain.run.stage import INTERRUPTED
from moetrain.runtime import LAUNCHER_PID

_log = logging.getLogger("moetrain.torchrun")
_SAVE_SECONDS = "110"


def main(words: Sequence[str]) -> int:
    """Start ranks with the arguments of torchrun, wait for them, and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("torch").setLevel(logging.WARNING)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    timeout = ["--shutdown-timeout", os.environ.get("SAVE_SECONDS") or _SAVE_SECONDS]
    try:
        run(parse_args([*timeout, *words]))  # type: ignore[no-untyped-call]
    except SignalException as stopped:
        return _interrupted(stopped.sigval.name)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == INTERRUPTED:
            return _interrupted("a signal")
        how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        _log.error("rank %d %s, and with it all ranks ended", rank, how)
        return code if code > 0 else 128 - code
    return 0


def _interrupted(what: str) -> int:
    _log.info("the ranks were stopped by %s; started again, the stage resumes from its last checkpoint", what)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
