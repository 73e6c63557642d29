"""Generation behind one protocol: token sequences that are continued turn by turn.

The caller adds sequences and calls `step` until turns end. Between two turns a sequence is idle and costs no compute,
so a slow tool holds up nobody else. `inference.engine` is the implementation in this process; a server is another.
Implementations know tokens only: no text, tools or tasks.
"""

from dataclasses import dataclass, field
from typing import Protocol

from moetrain.inference.weights import InferenceWeights


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One sequence of tokens, which only grows. Its turn ends with a token of `stop_ids`, or at `limit` tokens.

    stream: seeds its sampling, which depends on (stream, position) alone. temperature: 0 is greedy. logprobs,
    is_sampled and versions have one entry per token; given tokens have logprob 0.0. versions: of the weights that
    sampled the token, or that were present when it was given. num_fed: tokens that are in the cache of the
    implementation. is_idle: the turn has ended, and the sequence waits for `extend` or `cancel`.
    """

    tokens: list[int]
    stream: int
    limit: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    logprobs: list[float] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    num_fed: int = 0
    is_idle: bool = False

    def give(self, tokens: list[int], *, version: int) -> None:
        """Append tokens that the model did not produce; the prompt is marked in the same way."""
        self.tokens += tokens
        missing = len(self.tokens) - len(self.versions)
        self.logprobs += [0.0] * missing
        self.is_sampled += [False] * missing
        self.versions += [version] * missing

    def take(self, token: int, *, logprob: float, version: int) -> None:
        """Append a token that the model produced; the sequence is idle when its turn ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.is_sampled.append(True)
        self.versions.append(version)
        self.is_idle = token in self.stop_ids or len(self.tokens) >= self.limit


class Generation(Protocol):
    """Continues sequences. Results depend on a sequence alone: not on its neighbours, nor on the order of arrival."""

    @property
    def is_busy(self) -> bool:
        """Whether any sequence is to be continued: not all are idle."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Take a sequence that holds a prompt; `RolloutError` when it does not fit."""
        ...

    def extend(self, sequence: Sequence, tokens: list[int], *, limit: int) -> None:
        """Append given tokens to an idle sequence, and continue it until it has `limit` tokens."""
        ...

    def step(self) -> list[Sequence]:
        """Continue the sequences that are not idle; return those whose turn has ended, which may be none."""
        ...

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, in whatever state it is."""
        ...

    def load(self, weights: InferenceWeights, *, version: int) -> None:
        """Use other weights from the next step on; tokens that sequences have stay, and are read by the new weights."""
        ...
