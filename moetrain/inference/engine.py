"""Generation in this process: continuous batching over slots of a latent KV cache, one token per step and sequence.

Prompts that fill free slots are prefilled together. Tokens that are given later (tool results) are fed one per step. An
idle sequence keeps its slot and its cache.
"""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.errors import RolloutError
from moetrain.inference.forward import forward
from moetrain.inference.protocol import Sequence
from moetrain.inference.sampling import draw, uniforms
from moetrain.inference.weights import InferenceWeights
from moetrain.model.rope import RopeTable, build_rope

_CACHE_BLOCK = 64
"""Positions by which the cache grows. Attention runs over all allocated positions."""
_REFILL_SHARE = 0.25  # smallest share of free slots that is filled, so that several prompts are prefilled together


class GenerationEngine:
    """Slots of a KV cache and the sequences in them; implements `inference.protocol.Generation`.

    Running sequences occupy the first slots, and idle ones the slots after them.
    """

    def __init__(self, weights: InferenceWeights, *, num_slots: int, max_tokens: int, version: int = 0) -> None:
        """Create a cache for `num_slots` sequences of at most `max_tokens` tokens. version: version of `weights`."""
        config = weights.config
        self._weights = weights
        self._version = version
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
    def is_busy(self) -> bool:
        """Whether any sequence is not idle."""
        return any(not sequence.is_idle for sequence in (*self._active, *self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a slot."""
        if not 0 < len(sequence.tokens) < self._max_tokens:
            raise RolloutError(
                f"a prompt has {len(sequence.tokens)} tokens: the cache holds {self._max_tokens} per sequence"
            )
        sequence.give([], version=self._version)
        self._limit(sequence, sequence.limit)
        self._waiting.append(sequence)

    def extend(self, sequence: Sequence, tokens: list[int], *, limit: int) -> None:
        """Append given tokens; the next steps feed them."""
        sequence.give(tokens, version=self._version)
        self._limit(sequence, limit)

    def _limit(self, sequence: Sequence, limit: int) -> None:
        if not len(sequence.tokens) < limit <= self._max_tokens:
            raise RolloutError(
                f"a sequence of {len(sequence.tokens)} tokens is to be continued to {limit}: "
                f"the cache holds {self._max_tokens} per sequence"
            )
        sequence.limit, sequence.is_idle = limit, False

    def cancel(self, sequence: Sequence) -> None:
        """Free the slot of a sequence. The sequence in the last slot moves into it."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        slot = self._active.index(sequence)
        last = self._active.pop()
        if last is not sequence:
            self._active[slot] = last
            self._cache_LBSC[:, slot, : last.num_fed] = self._cache_LBSC[:, len(self._active), : last.num_fed]

    def load(self, weights: InferenceWeights, *, version: int) -> None:
        """Use other weights of the same shape. Every sequence is prefilled again, because the cache is out of date."""
        self._weights, self._version = weights, version
        for sequence in self._active:
            sequence.num_fed = 0
        self._waiting.extendleft(reversed(self._active))
        self._active = []

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Feed one token of each running sequence, and sample the next token of those whose tokens are all fed.

        Returns the sequences whose turn has ended.
        """
        free = min(self._num_slots - len(self._active), len(self._waiting))
        is_running = any(not sequence.is_idle for sequence in self._active)
        if free and (self._num_slots - len(self._active) >= self._num_slots * _REFILL_SHARE or not is_running):
            self._prefill([self._waiting.popleft() for _ in range(free)])
        num_running = self._order_slots()
        if not num_running:
            return []
        running = self._active[:num_running]
        self._fit_cache(max(sequence.num_fed for sequence in self._active) + 1)
        tokens_B1 = self._tensor([[sequence.tokens[sequence.num_fed]] for sequence in running])
        starts_B = self._tensor([sequence.num_fed for sequence in running])
        cache = self._cache_LBSC[:, :num_running]
        hidden_B1D = forward(self._weights, tokens_BT=tokens_B1, starts_B=starts_B, cache_LBSC=cache, rope=self._rope)
        rows = []
        for row, sequence in enumerate(running):
            sequence.num_fed += 1
            if sequence.num_fed == len(sequence.tokens):
                rows.append(row)
        return self._sample(hidden_B1D[:, 0], rows) if rows else []

    def _order_slots(self) -> int:
        """Move idle sequences behind the running ones; return the number of running sequences."""
        num_running = 0
        for slot, sequence in enumerate(self._active):
            if sequence.is_idle:
                continue
            if slot != num_running:
                pair, swapped = [num_running, slot], [slot, num_running]
                self._cache_LBSC[:, pair] = self._cache_LBSC[:, swapped]
                self._active[slot], self._active[num_running] = self._active[num_running], sequence
            num_running += 1
        return num_running

    def _fit_cache(self, num_positions: int) -> None:
        """Resize the cache to `num_positions`, in whole blocks, when it is too small or at least twice too large."""
        present = self._cache_LBSC.shape[2]
        wanted = -(-num_positions // _CACHE_BLOCK) * _CACHE_BLOCK
        if present // 2 < wanted <= present:
            return
        kept = min(present, wanted)
        fitted = self._cache_LBSC.new_zeros(*self._cache_LBSC.shape[:2], wanted, self._width)
        fitted[:, :, :kept] = self._cache_LBSC[:, :, :kept]
        self._cache_LBSC = fitted

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Feed all but the last token of new sequences. The next decoding step feeds the last one and samples."""
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
        """Sample the next token of the sequences in `rows`; return those whose turn ends with it."""
        sequences = [self._active[row] for row in rows]
        hidden_BD = hidden_BD if len(rows) == len(hidden_BD) else hidden_BD[rows]
        logits_BV = torch.nn.functional.linear(hidden_BD, self._weights.head_VD).float()
        uniforms_B = uniforms(
            np.array([sequence.stream for sequence in sequences], dtype=np.uint64),
            np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64),
        )
        draws = draw(
            logits_BV,
            samplings=[sequence.sampling for sequence in sequences],
            constraints=[sequence.constraint for sequence in sequences],
            uniforms_B=self._tensor(uniforms_B),
        )
        for sequence, drawn in zip(sequences, draws, strict=True):
            sequence.take_draw(drawn, version=self._version)
        return [sequence for sequence in sequences if sequence.is_idle]

    def _tensor(self, values: list[list[int]] | list[int] | list[float] | NDArray[np.float64]) -> torch.Tensor:
        return torch.as_tensor(values, device=self._device)
