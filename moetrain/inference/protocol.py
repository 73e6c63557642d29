"""Protocol of generation: token sequences that are continued turn by turn.

The caller adds sequences and calls `step` until turns end. Between two turns a sequence is idle and costs no compute,
so a slow tool does not delay other sequences. `inference.engine` implements the protocol in this process; a server can
implement it too. Implementations handle tokens only, and no text, tools or tasks.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from moetrain.inference.rows import Rows
from moetrain.inference.sampling import Constraint, Draw, Sampling
from moetrain.kernels.build import Library
from moetrain.model.config import ModelConfig


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A sequence of tokens that only grows. A turn ends at a token in `stop_ids`, or when there are `limit` tokens.

    stream: seeds its sampling, which depends on (stream, position) only. constraint: limits the tokens that may follow;
    None in RL. logprobs, is_sampled and versions have one entry per token; given tokens have logprob 0.0, as do sampled
    tokens that were the only ones the constraint allowed. versions: version of the weights that sampled the token, or
    that were loaded when it was given. free_logprobs, by position: logprob without the constraint of the tokens that
    were drawn under one. alternatives, by position: the most likely tokens and their logprobs, where `sampling` asks
    for them. num_fed: number of tokens in the implementation's cache. num_cached: number of tokens of the prompt that
    the implementation found in its cache at the beginning. is_idle: the turn has ended, and the sequence waits for
    `extend` or `cancel`.
    """

    tokens: list[int]
    stream: int
    limit: int
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    logprobs: list[float] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    free_logprobs: dict[int, float] = field(default_factory=dict)
    alternatives: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    num_fed: int = 0
    num_cached: int = 0
    is_idle: bool = False

    def give(self, tokens: list[int], *, version: int) -> None:
        """Append given tokens, and mark all tokens that have no entries yet (such as the prompt) as given."""
        self.tokens += tokens
        missing = len(self.tokens) - len(self.versions)
        self.logprobs += [0.0] * missing
        self.is_sampled += [False] * missing
        self.versions += [version] * missing

    def take(self, token: int, *, logprob: float, version: int) -> None:
        """Append a token that the model produced. The sequence becomes idle if the token ends its turn."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.is_sampled.append(True)
        self.versions.append(version)
        self.is_idle = token in self.stop_ids or len(self.tokens) >= self.limit

    def take_draw(self, draw: Draw, *, version: int) -> None:
        """Append a token that was drawn as `sampling` and `constraint` ask for."""
        if draw.free_logprob is not None:
            self.free_logprobs[len(self.tokens)] = draw.free_logprob
        if draw.alternatives:
            self.alternatives[len(self.tokens)] = draw.alternatives
        self.take(draw.token, logprob=draw.logprob, version=version)
        if self.constraint is not None:
            self.constraint.advance(draw.token)


@dataclass(kw_only=True)
class Counts:
    """What a generation has done since it was made, and the pages of its cache.

    num_cached: tokens of new sequences that were found in the cache. num_preemptions: times that a sequence lost its
    pages to another one. num_forced: tokens that were fed before they were drawn, because a constraint allowed no
    other. num_drafts, num_drafted, num_right: drafts, their tokens, and those of them that were drawn. constraint_s:
    seconds that constraints took to say which tokens may follow. busy_s: seconds in which sequences were continued.
    """

    num_pages: int = 0
    num_pages_used: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_forced: int = 0
    num_drafts: int = 0
    num_drafted: int = 0
    num_right: int = 0
    constraint_s: float = 0.0
    busy_s: float = 0.0


class Model(Protocol):
    """Weights in the form for generation, and the computation of new tokens with a paged cache."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights and of all inputs and outputs."""
        ...

    @property
    def logprob_library(self) -> Library | None:
        """The native kernels that compute logprobs as training does; None to compute them by torch."""
        ...

    def new_cache(self, num_pages: int) -> torch.Tensor:
        """Return an empty cache [layers, pages, ...]; the model defines the content of a page."""
        ...

    def forward(self, rows: Rows, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return hidden states [N, D] after the last norm, and write the rows' positions of the cache.

        A row attends to its own position and those before it.
        """
        ...

    @property
    def can_draft(self) -> bool:
        """Whether it has a module of multi-token prediction that makes drafts."""
        ...

    def draft(self, hidden_ND: torch.Tensor, next_rows: Rows, *, cache_LPSC: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the module, [N, D], for drafts of the tokens after the next ones.

        hidden_ND: hidden states after the last norm. next_rows: at the same positions, the tokens that follow. Writes
        the module's part of the cache.
        """
        ...

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [M, V]."""
        ...


class Generation(Protocol):
    """Continues sequences. The result of a sequence does not depend on other sequences or on the order of arrival."""

    @property
    def is_busy(self) -> bool:
        """Whether any sequence is not idle."""
        ...

    @property
    def counts(self) -> Counts:
        """What it has done so far."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Add a sequence that contains a prompt. Raises RolloutError when it is too long."""
        ...

    def extend(self, sequence: Sequence, tokens: list[int], *, limit: int) -> None:
        """Append given tokens to an idle sequence, and continue it until it has `limit` tokens."""
        ...

    def step(self) -> list[Sequence]:
        """Continue the sequences that are not idle, by any number of tokens; return those whose turn ended."""
        ...

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence, whether idle or not."""
        ...

    def load(self, model: Model, *, version: int) -> None:
        """Use other weights from the next step on. Sequences keep their tokens, which the new weights read again."""
        ...
