"""Generation in this process: continuous batching over a paged cache, with prefixes shared between sequences.

A step takes one row for each sequence that decodes, and fills the rest of its budget with chunks of tokens that were
given: prompts and tool results. A sequence that is idle keeps its pages.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from moetrain.errors import ConfigError, RolloutError
from moetrain.inference.pages import Page, PageTree
from moetrain.inference.protocol import Model, Sequence
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.inference.sampling import draw, uniforms
from moetrain.runtime import available_memory

ROW_BUDGET = 256
"""Largest number of rows of a step, unless more sequences than this decode."""
_WORTH_WAITING = 8  # tokens of a common beginning for which a sequence waits until another one has read it


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


@dataclass(eq=False)
class _Place:
    """A sequence in the cache: its chain of pages, which holds its first `num_fed` tokens."""

    sequence: Sequence
    chain: list[Page] = field(default_factory=list)
    is_placed: bool = False


class GenerationEngine:
    """Implements `inference.protocol.Generation`."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int,
        max_tokens: int,
        version: int = 0,
        cache_megabytes: float | None = None,
    ) -> None:
        """Create a cache for `num_slots` sequences of at most `max_tokens` tokens.

        version: version of the weights of `model`. cache_megabytes: largest size of the cache in MiB; None takes what
        all sequences need, at most half of the free memory. Sequences that find no room are read again later. Raises
        ConfigError when one sequence has no room.
        """
        self._model = model
        self._version = version
        self._max_tokens = max_tokens
        self._num_slots = num_slots
        longest = -(-max_tokens // PAGE)
        size = model.new_cache(1).nbytes
        budget = _free_bytes(model.device) / 2 if cache_megabytes is None else cache_megabytes * (1 << 20)
        num_pages = min(max(num_slots, 1) * longest, int(budget / size))
        if num_pages < longest:
            raise ConfigError(
                f"a cache of {budget / (1 << 20):.0f} MiB has no room for a sequence of {max_tokens} tokens: it takes "
                f"{longest * size / (1 << 20):.0f} MiB; give a smaller max_tokens or a larger cache_megabytes"
            )
        self._cache = model.new_cache(num_pages)
        self._tree = PageTree(num_pages, copy=self._copy_page)
        self._active: dict[int, _Place] = {}
        self._waiting: deque[Sequence] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether any sequence is not idle."""
        return bool(self._waiting) or any(not place.sequence.is_idle for place in self._active.values())

    @property
    def num_pages_used(self) -> int:
        """Number of pages that sequences use."""
        return self._tree.num_used

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
        """Free the slot and the pages of a sequence."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._tree.release(self._active.pop(id(sequence)).chain)

    def load(self, model: Model, *, version: int) -> None:
        """Use other weights of the same shape. Every sequence is read again, because the cache is out of date."""
        self._model, self._version = model, version
        for place in self._active.values():
            self._forget(place)
        self._tree.clear()

    def _forget(self, place: _Place) -> None:
        self._tree.release(place.chain)
        place.sequence.num_fed, place.is_placed = 0, False

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Feed tokens to the sequences that are not idle, and sample the next token of those whose tokens are all fed.

        Returns the sequences whose turn has ended.
        """
        while self._waiting and len(self._active) < self._num_slots:
            sequence = self._waiting.popleft()
            sequence.num_fed = 0
            self._active[id(sequence)] = _Place(sequence)
        running = [place for place in self._active.values() if not place.sequence.is_idle]
        chosen = self._choose(running)
        if not chosen:
            return []
        rows = Rows.of([chunk for _, chunk in chosen], device=self._model.device)
        hidden_ND = self._model.forward(rows, self._cache)
        last, ready = -1, []
        for place, chunk in chosen:
            last += len(chunk.tokens)
            sequence = place.sequence
            self._tree.commit(place.chain, chunk.tokens)
            sequence.num_fed += len(chunk.tokens)
            if sequence.num_fed == len(sequence.tokens):
                ready.append((last, sequence))
        return self._sample(hidden_ND, ready) if ready else []

    def _choose(self, running: list[_Place]) -> list[tuple[_Place, Chunk]]:
        """Return the rows of this step: sequences that decode first, then chunks of given tokens, in their order.

        Where pages are missing, the sequences that came last lose theirs.
        """
        running.sort(key=lambda place: not place.is_placed or len(place.sequence.tokens) - place.sequence.num_fed > 1)
        chosen: list[tuple[_Place, Chunk]] = []
        budget = ROW_BUDGET
        for place in running:
            sequence = place.sequence
            if not place.is_placed:
                if any(self._is_reading(other, sequence) for other, _ in chosen):
                    continue
                self._place(place)
            missing = len(sequence.tokens) - sequence.num_fed
            size = missing if missing == 1 else min(missing, budget)
            if size < 1:
                continue
            tokens = sequence.tokens[sequence.num_fed : sequence.num_fed + size]
            while not (is_reserved := self._tree.reserve(place.chain, size)):
                if not self._evict_other(place, chosen):
                    break
            if is_reserved:
                pages = [page.index for page in place.chain]
                chosen.append((place, Chunk(tokens=tokens, start=sequence.num_fed, pages=pages)))
                budget -= size
        return chosen

    def _place(self, place: _Place) -> None:
        """Begin a sequence with the pages that hold its beginning; its last token is always fed, to sample after it."""
        sequence = place.sequence
        place.chain, sequence.num_fed = self._tree.match(sequence.tokens[:-1])
        sequence.num_cached = sequence.num_fed
        place.is_placed = True

    def _is_reading(self, place: _Place, sequence: Sequence) -> bool:
        """Whether a place reads tokens in this step that `sequence` begins with, too."""
        reading = place.sequence
        if len(reading.tokens) - reading.num_fed == 1:
            return False
        length = reading.num_fed + _WORTH_WAITING
        return length < len(sequence.tokens) and reading.tokens[:length] == sequence.tokens[:length]

    def _evict_other(self, place: _Place, chosen: list[tuple[_Place, Chunk]]) -> bool:
        """Free the pages of the sequence that came last and is not part of this step; False if there is none."""
        taken = {id(other) for other, _ in chosen} | {id(place)}
        for other in reversed(self._active.values()):
            if id(other) not in taken and other.chain:
                self._forget(other)
                return True
        return False

    def _copy_page(self, source: int, target: int) -> None:
        self._cache[:, target] = self._cache[:, source]

    def _sample(self, hidden_ND: torch.Tensor, ready: list[tuple[int, Sequence]]) -> list[Sequence]:
        """Sample the next token after the given rows; return the sequences whose turn ends with it."""
        sequences = [sequence for _, sequence in ready]
        places_B = torch.tensor([row for row, _ in ready], device=hidden_ND.device)
        logits_BV = self._model.logits(hidden_ND[places_B])
        uniforms_B = uniforms(
            np.array([sequence.stream for sequence in sequences], dtype=np.uint64),
            np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64),
        )
        draws = draw(
            logits_BV,
            samplings=[sequence.sampling for sequence in sequences],
            constraints=[sequence.constraint for sequence in sequences],
            uniforms_B=torch.as_tensor(uniforms_B, device=self._model.device),
        )
        for sequence, drawn in zip(sequences, draws, strict=True):
            sequence.take_draw(drawn, version=self._version)
        return [sequence for sequence in sequences if sequence.is_idle]
