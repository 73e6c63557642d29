"""The first module that a command loads. Ctrl-C while the others load, which takes a second, ends with one line too."""

import signal
import sys


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
