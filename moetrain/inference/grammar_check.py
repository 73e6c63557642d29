"""Checks grammars and JSON schemas before they are used, in processes that are ended when one takes too long."""

import contextlib
import functools
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.files import to_json
from moetrain.inference.guided import reason

_NUM_KEPT = 1024  # verdicts
_PROGRAM = "moetrain.inference.grammar_program"
_START_S = 60.0
"""Seconds in which the program must have loaded the tokenizer."""


class GrammarCheck:
    """Compiles grammars in `num_processes` processes. Thread-safe; as many threads can check at the same time."""

    def __init__(self, tokenizer: Tokenizer, *, end_id: int, num_processes: int, max_seconds: float) -> None:
        """Start no process yet: the first check does. max_seconds: how long a check may take."""
        setup = {
            "tokenizer": tokenizer.to_json(),
            "vocab_size": tokenizer.vocab_size,
            "end_id": end_id,
            "parent": os.getpid(),
        }
        self._all = [_Program(setup, max_seconds=max_seconds) for _ in range(num_processes)]
        self._idle: queue.SimpleQueue[_Program] = queue.SimpleQueue()
        for program in self._all:
            self._idle.put(program)
        self.problem = functools.lru_cache(maxsize=_NUM_KEPT)(self._problem)
        """Returns why schemas (JSON texts) or the grammar made from them cannot be used, or ""."""

    def _problem(self, schemas: tuple[str, ...], grammar: str) -> str:
        program = self._idle.get()
        try:
            return program.problem(schemas, grammar)
        finally:
            self._idle.put(program)

    def close(self) -> None:
        """End the processes, in the middle of a check too."""
        for program in self._all:
            program.close()


class _Program:
    """A process that compiles. It is started when it is needed, and again after it was ended."""

    def __init__(self, setup: dict[str, object], *, max_seconds: float) -> None:
        self._setup = setup
        self._max_seconds = max_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def problem(self, schemas: Sequence[str], grammar: str) -> str:
        """Return the problem that the process names, or that it took too long or too much memory.

        Raises ConfigError, which is not kept as a verdict, when there is no process, or `close` ended it.
        """
        if self._process is not None and self._process.poll() is not None:  # it was killed while it had nothing to do
            self._end()
        is_ready = self._process is not None or self._begin()
        answer = self._ask({"schemas": list(schemas), "grammar": grammar}, seconds=self._max_seconds)
        if not is_ready or self._is_closed:
            raise ConfigError("no process could be started that compiles it: try again later")
        if answer is None:
            self._end()
            return f"compiling it takes more than {self._max_seconds:g} s, or too much memory"
        return reason(answer) if answer else ""

    def _begin(self) -> bool:
        """Start the process; return whether it is ready."""
        if self._is_closed:
            return False
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            # Threads of many cores would take the address space that is left to grammars.
            env={**os.environ, "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )
        if self._ask(self._setup, seconds=_START_S) == "":
            return True
        self._end()
        return False

    def _ask(self, request: dict[str, object], *, seconds: float) -> str | None:
        """Return the answer; None where there is none in this time, or the process has ended."""
        process = self._process
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        end, answer = time.monotonic() + seconds, b""
        try:
            process.stdin.write(to_json(request).encode() + b"\n")
            process.stdin.flush()
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
                part = os.read(process.stdout.fileno(), 65536) if ready else b""
                if not part:
                    return None
                answer += part
        except (OSError, ValueError):  # the process has ended, or was ended by another thread
            return None
        return str(json.loads(answer))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not written yet
                        pipe.close()

    def close(self) -> None:
        """End the process for good."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
