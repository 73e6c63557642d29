"""A worker process of a benchmark: reads one command per line, answers with one JSON object per line.

Between commands a worker waits for its next line and uses no core, so contestants can take turns.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Process:
    """The controller's end. Its error output goes to `log`."""

    def __init__(self, words: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        """Start the command line `words` with the variables `env` beside those of this process."""
        self._log = log
        with log.open("a") as file:
            self._process = subprocess.Popen(
                words,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def send(self, command: str) -> None:
        """Send one line. Raises BrokenPipeError when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for one answer. Raises EOFError when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        """Return the last line of its error output."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended without output"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # an unsent command, to a process that has ended
                stream.close()


def commands() -> Iterator[tuple[str, TextIO]]:
    """Yield (command, where to write its answer) for each line of standard input.

    What libraries print to standard output goes to the error output.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        yield line.strip(), answers
