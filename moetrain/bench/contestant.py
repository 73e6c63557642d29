"""A contestant of `bench train` as processes, one a rank: the side that asks. `bench.worker` is the side that works.

The sides speak in JSON lines. `prepare` builds and warms up, `turn` takes the steps of one turn, `profile` says where
their time goes. Between them a contestant waits for its next line and uses no core.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moetrain.runtime import free_port


class Kind(StrEnum):
    """What trains: ours on either engine, or a peer."""

    moetrain = "moetrain"
    moetrain_torch = "moetrain_torch"
    transformers_eager = "transformers_eager"
    transformers_grouped_mm = "transformers_grouped_mm"
    deepspeed_autoep = "deepspeed_autoep"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who trains, and on how many ranks of how many threads; `expert` ranks share the experts of a layer."""

    kind: Kind
    ranks: int
    threads: int
    expert: int

    @property
    def name(self) -> str:
        """What tables and logs call it."""
        if self.ranks == 1:
            return self.kind.value
        return f"{self.kind.value} {f'ep {self.expert}' if self.expert > 1 else f'dp {self.ranks}'}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


class Remote:
    """The asking side: starts the processes, and collects what they answer."""

    def __init__(self, contestant: Contestant, *, config: Path, log: Path) -> None:
        self.contestant = contestant
        self.log = log
        self.setting = ""
        self.failure: str | None = None
        self.seconds: list[list[float]] = []
        """Of each step of each turn; of several ranks the slowest."""
        self.losses: list[float] = []
        """Of the steps of the warm-up, the first that the weights see; the mean over ranks."""
        self.memory = 0
        """Largest resident size seen, the sum over ranks."""
        port = free_port()
        self._processes = [self._start(rank, config=config, port=port) for rank in range(contestant.ranks)]

    def _start(self, rank: int, *, config: Path, port: int) -> "subprocess.Popen[str]":
        contestant = self.contestant
        layout = {"OMP_NUM_THREADS": str(contestant.threads), "TOKENIZERS_PARALLELISM": "false"}
        if contestant.ranks > 1:
            layout |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(contestant.ranks)}
            layout |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "moetrain.bench.worker", str(config), json.dumps(contestant.as_dict())],
                env={**os.environ, **layout},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, command: str) -> dict[str, float] | None:
        """Have all ranks carry out a command, and keep what they measured; return the profile when it was asked for.

        A contestant that failed stays silent, and `failure` says why.
        """
        if self.failure is not None:
            return None
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(command + "\n")
                process.stdin.flush()
            answers = [_answer(process) for process in self._processes]
        except (BrokenPipeError, EOFError):
            lines = self.log.read_text().strip().splitlines()
            self.failure = lines[-1] if lines else "it ended without a word"
            return None
        first = answers[0]
        self.setting = first["setting"]
        self.memory = max(self.memory, sum(answer["memory_bytes"] for answer in answers))
        if command == "prepare":
            self.losses = [sum(losses) / len(answers) for losses in _columns(answers, "losses")]
        if command == "turn":
            self.seconds.append([max(seconds) for seconds in _columns(answers, "seconds")])
        profile: dict[str, float] | None = first["profile"]
        return profile

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.kill()
            process.wait()
            process.stdout.close()


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer


def _columns(answers: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, ...]]:
    """Yield what each rank says of one step, step by step."""
    yield from zip(*(answer[name] for answer in answers), strict=True)
