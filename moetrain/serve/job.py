"""A job of the engine thread: a sequence, and the tokens that each step adds to it."""

import asyncio
import time
from dataclasses import dataclass, field

from moetrain.inference.protocol import Sequence


@dataclass(frozen=True, kw_only=True)
class Token:
    """One sampled token. free_logprob: logprob without the constraint, if there is one."""

    id: int
    logprob: float
    free_logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step added to a job. problem: why it ended without a result."""

    tokens: tuple[Token, ...] = ()
    is_ended: bool = False
    problem: str = ""


@dataclass(kw_only=True, eq=False)
class Job:
    """A sequence to continue until its turn ends.

    number: its place among the sequences of its request. updates: the queue of the request, on the event loop; it gets
    at most one entry per token, so the limits of the sequences bound it. num_sent: tokens whose update was sent, the
    prompt included. begun: time it left the queue; first, last: times of its first and last token.
    """

    sequence: Sequence
    number: int
    updates: "asyncio.Queue[tuple[Job, Update]]"
    num_prompt: int = field(init=False)
    num_sent: int = field(init=False)
    submitted: float = field(default_factory=time.monotonic)
    begun: float | None = None
    first: float | None = None
    last: float = 0.0

    def __post_init__(self) -> None:
        """Count the prompt as sent."""
        self.num_sent = self.num_prompt = len(self.sequence.tokens)
