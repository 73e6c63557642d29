"""The first module that a command loads. Ctrl-C while the others load, which takes a second, ends with one line too."""

import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run the command line of this process and return its exit code, as `moetrain.cli.main.main` does."""
    try:
        from moetrain.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("moetrain: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a further press does not interrupt the way out


def command() -> NoReturn:
    """Run the command line of this process, and end the process with its exit code."""
    code = main()
    from moetrain.runtime import leave

    leave(code)
