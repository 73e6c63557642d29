"""The `moetrain` command: finds the subcommand, checks its input, and turns errors into one line and an exit code.

A subcommand is a module of this package with a function `main`. For a stage, `main` receives the checked config, and
imports torch in its body, so that a mistake in the input is reported before torch is loaded.
"""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from moetrain.cli import check, help_page, run
from moetrain.cli.command_line import commands_of, composed, split_command
from moetrain.errors import ConfigError, MoetrainError
from moetrain.log import setup_logging
from moetrain.run import dry_run
from moetrain.run.inputs import check_inputs, check_names
from moetrain.run.stage import check_folder
from moetrain.runtime import (
    LAUNCHER,
    LAUNCHER_PID,
    check_launcher,
    check_rendezvous,
    die_with_parent,
    keep_freed_memory,
    num_ranks,
    rank,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes of a disk, a quota or a limit of file sizes that is full."""
_HELP = ("-h", "--help")
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
"""Error codes of a bad path from the user, reported in one line wherever the path is opened."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 success, 1 error in moetrain, 2 bad input, 3 missed bound.

    `arguments`: the words after `moetrain`; None takes `sys.argv`. Only `verify`, `upcycle` and `bench drafts` check
    bounds.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _yield_busy_cores()
    keep_freed_memory()
    launcher = os.environ.pop(LAUNCHER_PID, "")  # processes that this one starts have another parent
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank that outlives its launcher keeps the run folder locked and waits for other ranks.
        die_with_parent(int(launcher) if launcher.isdecimal() else None)
    try:
        if words[:1] == ["run"]:  # a recipe starts the ranks of its stages itself
            for name in LAUNCHER:
                os.environ.pop(name, None)
        check_launcher()
        setup_logging(rank=rank())
        return _dispatch(words)
    except MoetrainError as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in _NO_ROOM:
            where = f"{error.filename}: " if error.filename is not None else ""
            print(f"moetrain: {where}{error.strerror}: make room, and run the same command again", file=sys.stderr)
            return MoetrainError.exit_code
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        print(f"moetrain: {str(error.filename)[:200]}: {error.strerror}; give another path", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print("moetrain: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _yield_busy_cores() -> None:
    """Make idle OpenMP threads sleep after 3,000 spins. libgomp reads the variable when torch is first imported.

    The default is 300,000 spins. When another process keeps the cores busy, that made a training step of `k2_nano` 40
    times slower; with 3,000 spins the step is 10 % slower than on half of the cores. On an idle machine 3,000 spins
    are as fast as 10,000, and 1,000 are 10 % slower, because a sleeping thread takes long to wake.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _dispatch(words: list[str]) -> int:
    is_overview = len(words) == 2 and words[1] in _HELP and bool(commands_of(words[0]))
    if not words or words[0] in (*_HELP, "help") or is_overview:
        print(help_page.overview())
        return 0
    command, rest = split_command(words)
    if any(word in _HELP for word in rest):
        print(help_page.command_page(command, words=rest))
        return 0
    if command == "check":
        return check.main(rest)
    if command == "run":
        return run.main(rest)
    config = composed(command, rest)
    if not config.dry_run:
        check_rendezvous()
    check_inputs(config)
    check_folder(config)
    check_names(config)
    if config.run.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.run.threads)  # read when torch is first imported
    if config.dry_run:
        if rank() == 0:
            dry_run.show(command, config, world_size=num_ranks())
        return 0
    code: int = importlib.import_module(f"moetrain.cli.{command.replace(' ', '_')}").main(config)
    return code
