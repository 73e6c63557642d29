"""Generation of many sequences in lock step: continuous batching over slots of a latent KV cache.

A sequence is an append-only list of tokens. What must be fed (prompts, tool results) waits in it; once all is fed, each
step samples one token. Prompts are prefilled in one pass when slots are filled; later forced tokens ride along in the
decode step. Knows tokens only: no text, tools or tasks.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.errors import RolloutError
from moetrain.inference.forward import forward
from moetrain.inference.sampling import sample, uniforms
from moetrain.inference.weights import InferenceWeights
from moetrain.model.rope import RopeTable, build_rope

_CACHE_BLOCK = 64
"""Positions that the cache grows by: attention runs over all that are allocated."""
_REFILL_SHARE = 0.25  # of the slots; fewer free ones wait, so that prompts are prefilled together


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One sequence: `tokens` are all tokens so far, the first `num_fed` of them in the cache.

    `stream` seeds its sampling. `logprobs[i]` and `is_sampled[i]` belong to tokens[i]; given tokens have logprob 0.0.
    """

    tokens: list[int]
    stream: int
    temperature: float = 1.0
    num_fed: int = 0
    logprobs: list[float] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Mark the prompt as given."""
        self.logprobs = [0.0] * len(self.tokens)
        self.is_sampled = [False] * len(self.tokens)

    def append(self, tokens: list[int]) -> None:
        """Add given tokens, to be fed before the next one is sampled."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.is_sampled += [False] * len(tokens)


class GenerationEngine:
    """Slots of a KV cache and the sequences in them."""

    def __init__(self, weights: InferenceWeights, *, num_slots: int, max_tokens: int) -> None:
        """Hold a cache for `num_slots` sequences of at most `max_tokens` tokens."""
        config = weights.config
        self._weights = weights
        self._max_tokens = max_tokens
        self._num_slots = num_slots
        self._width = config.kv_lora_rank + config.qk_rope_head_dim
        self._device = weights.device
        self._cache_LBSC = torch.zeros(
            config.num_layers, num_slots, 0, self._width, dtype=weights.dtype, device=self._device
        )
        self._rope: RopeTable = build_rope(config, max_tokens).to(self._device)
        self._active: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is active or waits for a slot."""
        return bool(self._active or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        if not 0 < len(sequence.tokens) < self._max_tokens:
            raise RolloutError(
                f"a prompt has {len(sequence.tokens)} tokens: the cache holds {self._max_tokens} a sequence"
            )
        self._waiting.append(sequence)

    def has_room(self, sequence: Sequence, num_tokens: int = 1) -> bool:
        """Whether `num_tokens` more tokens fit the sequence's slot."""
        return len(sequence.tokens) + num_tokens <= self._max_tokens

    def remove(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that is finished; the last slot moves into its place."""
        slot = self._active.index(sequence)
        last = self._active.pop()
        if last is not sequence:
            self._active[slot] = last
            self._cache_LBSC[:, slot, : last.num_fed] = self._cache_LBSC[:, len(self._active), : last.num_fed]

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Advance every active sequence by one token; return those that now end in a newly sampled token."""
        free = self._num_slots - len(self._active)
        if self._waiting and (free >= self._num_slots * _REFILL_SHARE or not self._active):
            self._prefill([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
        self._fit_cache(max(sequence.num_fed for sequence in self._active) + 1)
        tokens_B1 = self._tensor([[sequence.tokens[sequence.num_fed]] for sequence in self._active])
        starts_B = self._tensor([sequence.num_fed for sequence in self._active])
        cache = self._cache_LBSC[:, : len(self._active)]
        hidden_B1D = forward(self._weights, tokens_BT=tokens_B1, starts_B=starts_B, cache_LBSC=cache, rope=self._rope)
        rows = []
        for row, sequence in enumerate(self._active):
            sequence.num_fed += 1
            if sequence.num_fed == len(sequence.tokens):
                rows.append(row)
        return self._sample(hidden_B1D[:, 0], rows) if rows else []

    def _fit_cache(self, num_positions: int) -> None:
        """Make the cache hold `num_positions`, in whole blocks: larger when it must be, smaller when half would do."""
        present = self._cache_LBSC.shape[2]
        wanted = -(-num_positions // _CACHE_BLOCK) * _CACHE_BLOCK
        if present // 2 < wanted <= present:
            return
        kept = min(present, wanted)
        fitted = self._cache_LBSC.new_zeros(*self._cache_LBSC.shape[:2], wanted, self._width)
        fitted[:, :, :kept] = self._cache_LBSC[:, :, :kept]
        self._cache_LBSC = fitted

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Feed all but the last token of new sequences; decode feeds that one and samples from it."""
        first = len(self._active)
        self._active += sequences
        width = max(len(sequence.tokens) for sequence in sequences) - 1
        if width == 0:
            return
        self._fit_cache(max(width, max(sequence.num_fed for sequence in self._active)))
        for sequence in sequences:
            sequence.num_fed = len(sequence.tokens) - 1
        tokens_BT = self._tensor([s.tokens[:-1] + [0] * (width - s.num_fed) for s in sequences])
        starts_B = torch.zeros(len(sequences), dtype=torch.long, device=self._device)
        cache = self._cache_LBSC[:, first : len(self._active)]
        forward(self._weights, tokens_BT=tokens_BT, starts_B=starts_B, cache_LBSC=cache, rope=self._rope)

    def _sample(self, hidden_BD: torch.Tensor, rows: list[int]) -> list[Sequence]:
        sequences = [self._active[row] for row in rows]
        hidden_BD = hidden_BD if len(rows) == len(self._active) else hidden_BD[rows]
        logits_BV = torch.nn.functional.linear(hidden_BD, self._weights.head_VD).float()
        uniforms_B = uniforms(
            np.array([sequence.stream for sequence in sequences], dtype=np.uint64),
            np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64),
        )
        tokens_B, logprobs_B = sample(
            logits_BV,
            temperatures_B=self._tensor([sequence.temperature for sequence in sequences]),
            uniforms_B=self._tensor(uniforms_B),
        )
        for sequence, token, logprob in zip(sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.is_sampled.append(True)
        return sequences

    def _tensor(self, values: list[list[int]] | list[int] | list[float] | NDArray[np.float64]) -> torch.Tensor:
        return torch.as_tensor(values, device=self._device)
