"""What `bench decode` and `bench rollout` ask of a program that generates. Imports only the standard library.

The modules of llama.cpp and of vLLM, this one, and `bench.process` also run in the environments of those programs.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Prompt = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Tokens that are given, and the number of tokens to generate after them."""

    given: list[int]
    num_new: int


Episode = list[Turn]
"""The turns of one sequence, in order."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a program must know when it starts.

    threads: number of threads. mode: variant of the program, "" for the only one. max_sequences, max_tokens: the most
    sequences at once, and the most tokens of one. overrides: fields of config.json that vLLM must read otherwise.
    """

    threads: int
    mode: str
    max_sequences: int
    max_tokens: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def thread_counts(self) -> dict[str, int]:
        """Numbers of threads to try, by the name that a table shows; a small model may be faster with one."""
        return {"": self.threads, ", 1 thread": 1} if self.threads > 1 else {"": 1}


def fastest(trials: Iterable[tuple[str, Callable[[], object]]]) -> str:
    """Run each trial; return the name of the fastest."""
    seconds = {}
    for name, trial in trials:
        start = time.perf_counter()
        trial()
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


class Engine(Protocol):
    """A program that generates from one folder of weights. setting: what it chose by measurement, for the table."""

    setting: str

    def choose(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Choose the fastest setting for such prompts by a few steps each; compile what is compiled at first use."""

    def begin(self, prompts: Sequence[Prompt], *, limit: int) -> None:
        """Read the prompts, and sample the first token after each. limit: largest length of a sequence in tokens."""

    def decode(self, steps: int) -> None:
        """Sample `steps` more tokens for each sequence."""

    def end(self) -> None:
        """Drop the sequences and their caches."""

    def choose_for_replay(self, episodes: Sequence[Episode]) -> None:
        """Choose the fastest setting for the episodes, and warm up."""

    def replay(self, episodes: Sequence[Episode]) -> int:
        """Generate every turn of every episode, and return the number of tokens that were generated for them.

        Tokens of earlier calls must not be in any cache.
        """


def length(episode: Episode) -> int:
    """Return the number of tokens of an episode."""
    return sum(len(turn.given) + turn.num_new for turn in episode)


def read_episodes(path: Path) -> list[Episode]:
    """Return the episodes in a file that `as_json` describes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [[Turn(given=given, num_new=num_new) for given, num_new in episode] for episode in content["episodes"]]


def as_json(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return episodes as plain values for JSON: per turn a pair (given tokens, number of new tokens)."""
    return {"episodes": [[[turn.given, turn.num_new] for turn in episode] for episode in episodes]}
