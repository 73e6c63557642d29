"""Generation in this process: continuous batching over a paged cache, with prefixes shared between sequences.

A step takes one row for each sequence that decodes, and fills the rest of its budget with chunks of tokens that were
given: prompts and tool results. A sequence that is idle keeps its pages.

Tokens that are expected to follow are fed as further rows: those that a constraint forces, and drafts. After each of
these rows a token is drawn as it would be without them, by its own (stream, position); the first one that differs from
the expected token ends the step of its sequence. With the native kernels a row's result does not depend on other rows,
so tokens and logprobs are those of plain decoding; with torch's they may differ from them by rounding.
"""

import time
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from moetrain.errors import ConfigError, RolloutError
from moetrain.inference.pages import Page, PageTree
from moetrain.inference.protocol import Counts, Model, Sequence
from moetrain.inference.rows import PAGE, Chunk, Rows
from moetrain.inference.sampling import Allowed, Draw, draw, uniforms
from moetrain.inference.speculation import Drafter, ModulePayoff, Speculation
from moetrain.runtime import available_memory

ROW_BUDGET = 256
"""Largest number of rows of a step, unless more sequences than this decode."""
_SPECULATION_ROWS = 32
"""Largest number of rows of a step with drafts. Beyond it, a step takes longer in proportion to its rows."""
_WORTH_WAITING = 8  # tokens of a shared prefix for which a sequence waits until another one has prefilled it


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


@dataclass(eq=False)
class _Place:
    """A sequence in the cache: its chain of pages, which holds its first `num_fed` tokens."""

    sequence: Sequence
    chain: list[Page] = field(default_factory=list)
    is_placed: bool = False
    was_placed: bool = False
    drafter: Drafter = field(default_factory=Drafter)
    predicted: dict[int, int] = field(default_factory=dict)
    """The draft of the model's own module: the token that may follow, by the number of tokens before it."""


@dataclass(kw_only=True)
class _Ahead:
    """Tokens that are expected to follow in a sequence; the first `num_forced` are certain.

    allowed: what its constraint allows before each of them and after the last; None for each without a constraint.
    """

    tokens: list[int] = field(default_factory=list)
    num_forced: int = 0
    allowed: list[Allowed | None] = field(default_factory=lambda: [None])
    is_of_module: bool = False
    """Whether the model's own module drafted them."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The rows of one sequence in a step: `num_given` tokens that it has, and those of `ahead`.

    ahead is None where the sequence has more tokens than that, so that none is drawn.
    """

    place: _Place
    num_given: int
    ahead: _Ahead | None

    @property
    def num_drawn(self) -> int:
        """Number of rows after which a token is drawn."""
        return 0 if self.ahead is None else len(self.ahead.allowed)

    @property
    def chunk(self) -> Chunk:
        """The rows."""
        sequence = self.place.sequence
        tokens = sequence.tokens[sequence.num_fed : sequence.num_fed + self.num_given]
        return Chunk(
            tokens=tokens + (self.ahead.tokens if self.ahead is not None else []),
            start=sequence.num_fed,
            pages=[page.index for page in self.place.chain],
        )


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
        speculation: Speculation = Speculation.off,
    ) -> None:
        """Create a cache for `num_slots` sequences of at most `max_tokens` tokens.

        version: version of the weights of `model`. cache_megabytes: largest size of the cache in MiB; None takes what
        all sequences need, at most half of the free memory. Sequences that do not fit are prefilled again later.
        speculation: whether drafts are made. Raises ConfigError when one sequence has no room.
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
                f"a cache of {budget / (1 << 20):.1f} MiB has no room for a sequence of {max_tokens} tokens: it takes "
                f"{longest * size / (1 << 20):.1f} MiB; give a smaller max_tokens or a larger cache_megabytes"
            )
        self._cache = model.new_cache(num_pages)
        self._tree = PageTree(num_pages, copy=self._copy_page)
        self._active: dict[int, _Place] = {}
        self._waiting: deque[Sequence] = deque()
        self._speculation = speculation
        self._payoff = ModulePayoff()
        self._counts = Counts(num_pages=num_pages)

    @property
    def is_busy(self) -> bool:
        """Whether any sequence is not idle."""
        return bool(self._waiting) or any(not place.sequence.is_idle for place in self._active.values())

    @property
    def counts(self) -> Counts:
        """What it has done so far."""
        return replace(self._counts, num_pages_used=self._tree.num_used)

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
        started = time.perf_counter()
        ended = self._step()
        self._counts.busy_s += time.perf_counter() - started
        return ended

    def _step(self) -> list[Sequence]:
        while self._waiting and len(self._active) < self._num_slots:
            sequence = self._waiting.popleft()
            sequence.num_fed = 0
            self._active[id(sequence)] = _Place(sequence)
        running = [place for place in self._active.values() if not place.sequence.is_idle]
        parts = self._choose(running)
        if not parts:
            return []
        started = time.perf_counter()
        hidden_ND = self._model.forward(Rows.of([part.chunk for part in parts], device=self._model.device), self._cache)
        draws = iter(self._draw(hidden_ND, parts))
        fed = [self._finish(part, [next(draws) for _ in range(part.num_drawn)]) for part in parts]
        if self._speculation is not Speculation.off and self._model.can_draft:
            predicting = time.perf_counter()
            self._payoff.note_step(predicting - started)
            if self._payoff.is_due():
                number = self._predict(hidden_ND, parts, fed)
                self._payoff.note_prediction(time.perf_counter() - predicting, num_sequences=number)
        return [part.place.sequence for part in parts if part.place.sequence.is_idle]

    def _choose(self, running: list[_Place]) -> list[_Part]:
        """Return the rows of this step: sequences that decode first, then chunks of given tokens, in their order.

        Where pages are missing, the sequences that came last lose theirs.
        """
        running.sort(key=lambda place: not place.is_placed or len(place.sequence.tokens) - place.sequence.num_fed > 1)
        num_drafted = max(_SPECULATION_ROWS // max(len(running), 1) - 1, 0)  # per sequence
        parts: list[_Part] = []
        budget = ROW_BUDGET
        for place in running:
            sequence = place.sequence
            if not place.is_placed:
                if any(self._is_reading(part, sequence) for part in parts):
                    continue
                self._place(place)
            missing = len(sequence.tokens) - sequence.num_fed
            size = missing if missing == 1 else min(missing, budget)
            if size < 1 or not self._reserve(place, size, parts=parts):
                continue
            ahead = None
            if size == missing:
                ahead = self._look_ahead(place, most=budget - size, num_drafted=num_drafted)
                if not self._tree.reserve(place.chain, size + len(ahead.tokens)):
                    ahead = _Ahead(allowed=ahead.allowed[:1])
            parts.append(_Part(place=place, num_given=size, ahead=ahead))
            budget -= size + (len(ahead.tokens) if ahead is not None else 0)
        return parts

    def _reserve(self, place: _Place, size: int, *, parts: list[_Part]) -> bool:
        """Make room for `size` more tokens of a sequence; return False where only sequences of `parts` have pages."""
        while not self._tree.reserve(place.chain, size):
            if not self._evict_other(place, parts):
                return False
        return True

    def _look_ahead(self, place: _Place, *, most: int, num_drafted: int) -> _Ahead:
        """Return up to `most` tokens that are expected to follow, up to `num_drafted` of them not certain."""
        sequence, constraint = place.sequence, place.sequence.constraint
        num_drafted = min(num_drafted, place.drafter.longest) if self._speculation is Speculation.auto else 0
        most = min(most, sequence.limit - len(sequence.tokens) - 1)
        started = time.perf_counter()
        expected = constraint.expected() if constraint is not None else []
        if not expected:
            expected = place.drafter.draft(sequence.tokens, most=num_drafted)
        is_of_module = not expected and num_drafted > 0 and len(sequence.tokens) in place.predicted
        if is_of_module:
            expected = [place.predicted[len(sequence.tokens)]]
        expected = expected[: max(most, 0)]
        end = next((at for at, token in enumerate(expected) if token in sequence.stop_ids), len(expected))
        expected = expected[:end]
        if constraint is None:
            return _Ahead(tokens=expected, allowed=[None] * (1 + len(expected)), is_of_module=is_of_module)
        masks = [constraint.allowed()]
        num_forced = num_ahead = 0
        for allowed_V in constraint.allowed_after(expected):
            is_forced = num_forced == num_ahead and int(masks[-1].sum()) == 1
            if not is_forced and num_ahead - num_forced == num_drafted:
                break
            num_forced += is_forced
            num_ahead += 1
            masks.append(allowed_V)
        self._counts.constraint_s += time.perf_counter() - started
        return _Ahead(tokens=expected[:num_ahead], num_forced=num_forced, allowed=[*masks], is_of_module=is_of_module)

    def _place(self, place: _Place) -> None:
        """Begin a sequence with the pages that hold its beginning; its last token is always fed, to sample after it."""
        sequence = place.sequence
        place.chain, sequence.num_fed = self._tree.match(sequence.tokens[:-1])
        if not place.was_placed:
            sequence.num_cached = sequence.num_fed
            self._counts.num_cached += sequence.num_fed
        place.is_placed = place.was_placed = True

    def _is_reading(self, part: _Part, sequence: Sequence) -> bool:
        """Whether a part reads tokens that `sequence` begins with, too."""
        reading = part.place.sequence
        if len(reading.tokens) - reading.num_fed == 1:
            return False
        length = reading.num_fed + _WORTH_WAITING
        return length < len(sequence.tokens) and reading.tokens[:length] == sequence.tokens[:length]

    def _evict_other(self, place: _Place, parts: list[_Part]) -> bool:
        """Free the pages of the sequence that came last and is not part of this step; False if there is none."""
        taken = {id(part.place) for part in parts} | {id(place)}
        for other in reversed(self._active.values()):
            if id(other) not in taken and other.chain:
                self._forget(other)
                self._counts.num_preemptions += 1
                return True
        return False

    def _copy_page(self, source: int, target: int) -> None:
        self._cache[:, target] = self._cache[:, source]

    def _draw(self, hidden_ND: torch.Tensor, parts: list[_Part]) -> list[Draw]:
        """Draw the tokens after the last given row of each part, and after those of its tokens ahead."""
        rows: list[int] = []
        positions: list[int] = []
        drawn: list[Sequence] = []
        allowed: list[Allowed | None] = []
        first = 0
        for part in parts:
            sequence = part.place.sequence
            first += part.num_given
            if part.ahead is not None:
                number = part.num_drawn
                rows += range(first - 1, first - 1 + number)
                positions += range(len(sequence.tokens), len(sequence.tokens) + number)
                drawn += [sequence] * number
                allowed += part.ahead.allowed
                first += len(part.ahead.tokens)
        if not rows:
            return []
        uniforms_B = uniforms(
            np.array([sequence.stream for sequence in drawn], dtype=np.uint64), np.array(positions, dtype=np.uint64)
        )
        return draw(
            self._model.logits(hidden_ND[torch.tensor(rows, device=hidden_ND.device)]),
            samplings=[sequence.sampling for sequence in drawn],
            allowed=allowed,
            uniforms_B=torch.as_tensor(uniforms_B, device=self._model.device),
            library=self._model.logprob_library,
        )

    def _finish(self, part: _Part, draws: list[Draw]) -> int:
        """Append the drawn tokens to a sequence, up to and including the first that differs from the expected one.

        Returns the number of rows of the part that are kept.
        """
        place, sequence = part.place, part.place.sequence
        fed = sequence.tokens[sequence.num_fed : sequence.num_fed + part.num_given]
        if part.ahead is not None:
            num_right = 0
            for expected, drawn in zip([*part.ahead.tokens, None], draws, strict=True):
                sequence.take_draw(drawn, version=self._version)
                if drawn.token != expected:
                    break
                fed.append(expected)
                num_right += 1
            self._count(part, num_right=num_right)
        self._tree.commit(place.chain, fed)
        sequence.num_fed += len(fed)
        return len(fed)

    def _predict(self, hidden_ND: torch.Tensor, parts: list[_Part], fed: list[int]) -> int:
        """Let the model's own module draft the token after the next one, where drafts are made; return their number.

        The module reads all tokens of a sequence, and its part of a page holds what it read for the sequence that
        filled the page. Where it has not read some, its drafts are worse; what is drawn does not depend on them.
        """
        rows: list[int] = []
        chunks: list[Chunk] = []
        last: dict[int, _Place] = {}
        first = 0
        for part, count in zip(parts, fed, strict=True):
            place, sequence = part.place, part.place.sequence
            if place.drafter.longest >= 1 and len(parts) <= _SPECULATION_ROWS // 2:
                start = sequence.num_fed - count
                tokens = sequence.tokens[start + 1 : start + 1 + count]
                chunks.append(Chunk(tokens=tokens, start=start, pages=[page.index for page in place.chain]))
                rows += range(first, first + count)
                if part.ahead is not None and not sequence.is_idle:
                    last[len(rows) - 1] = place
            first += part.num_given + (len(part.ahead.tokens) if part.ahead is not None else 0)
        if not chunks:
            return 0
        read_ND = self._model.draft(hidden_ND[rows], Rows.of(chunks, device=self._model.device), cache_LPSC=self._cache)
        if last:
            drafted = self._model.logits(read_ND[list(last)]).argmax(-1).tolist()
            for place, token in zip(last.values(), drafted, strict=True):
                place.predicted = {len(place.sequence.tokens): token}
        return len(last)

    def _count(self, part: _Part, *, num_right: int) -> None:
        assert part.ahead is not None
        num_drafted = len(part.ahead.tokens) - part.ahead.num_forced
        self._counts.num_forced += part.ahead.num_forced
        self._counts.num_drafts += num_drafted > 0
        self._counts.num_drafted += num_drafted
        self._counts.num_right += max(num_right - part.ahead.num_forced, 0)
        if part.ahead.is_of_module and num_drafted:
            self._payoff.note_draft(is_right=num_right > part.ahead.num_forced)
        part.place.drafter.settle(num_drafted=num_drafted, num_right=max(num_right - part.ahead.num_forced, 0))
