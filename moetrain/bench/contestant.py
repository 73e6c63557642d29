"""Controller of a contestant of `bench train`, which runs as one process per rank (`bench.worker`).

The commands: `prepare` builds the model and warms up, `turn` takes the steps of one turn, `profile` measures the time
per part of the model.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moetrain.bench.process import Process
from moetrain.runtime import free_port


class Kind(StrEnum):
    """Trainer of a contestant: moetrain on either engine, or a peer."""

    moetrain = "moetrain"
    moetrain_torch = "moetrain_torch"
    transformers_eager = "transformers_eager"
    transformers_grouped_mm = "transformers_grouped_mm"
    deepspeed_autoep = "deepspeed_autoep"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A trainer and its layout.

    ranks: number of processes. threads: threads per rank. expert: ranks that share the experts of a layer.
    """

    kind: Kind
    ranks: int
    threads: int
    expert: int

    @property
    def name(self) -> str:
        """Name in tables and log files."""
        if self.ranks == 1:
            return self.kind.value
        return f"{self.kind.value} {f'ep {self.expert}' if self.expert > 1 else f'dp {self.ranks}'}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class Remote:
    """Starts the processes of a contestant, sends them commands and collects their answers."""

    def __init__(self, contestant: Contestant, *, config: Path, log: Path) -> None:
        self.contestant = contestant
        self.log = log
        self.setting = ""
        self.failure: str | None = None
        self.seconds: list[list[float]] = []
        """Seconds of each step of each turn; the slowest rank counts."""
        self.losses: list[float] = []
        """Loss of each warm-up step, averaged over ranks."""
        self.memory = 0
        """Peak resident set size in bytes, summed over ranks."""
        port = free_port()
        self._processes = [self._start(rank, config=config, port=port) for rank in range(contestant.ranks)]

    def _start(self, rank: int, *, config: Path, port: int) -> Process:
        contestant = self.contestant
        layout = {"OMP_NUM_THREADS": str(contestant.threads)}
        if contestant.ranks > 1:
            layout |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(contestant.ranks)}
            layout |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "moetrain.bench.worker", str(config), json.dumps(contestant.as_dict())]
        return Process(words, env=layout, log=self.log)

    def ask(self, command: str) -> dict[str, float] | None:
        """Run a command on all ranks and store their measurements; return the profile for `profile`, else None.

        If a rank fails, `failure` is set to the reason, and this and all later calls return None.
        """
        if self.failure is not None:
            return None
        try:
            for process in self._processes:
                process.send(command)
            answers = [process.receive() for process in self._processes]
        except (BrokenPipeError, EOFError):
            self.failure = self._processes[0].last_words()
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
            process.close()


def _columns(answers: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, ...]]:
    """Yield, for each step, the values of all ranks under `name`."""
    yield from zip(*(answer[name] for answer in answers), strict=True)
