"""Drafts: guesses of the tokens that follow in a sequence, from what it contains already.

Agents copy: ids, paths, names, results. A draft is what followed the last occurrence of the last tokens. The engine
feeds it together with the last token and samples after each row, so a right guess saves a step. The result is that of
plain decoding: see `inference.engine`. Does not import torch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum

_SHORTEST, _LONGEST = 3, 5  # tokens that must have occurred before; tokens by which occurrences are compared
_NUM_COMPARED = 8  # latest occurrences
_PRICE = 0.5
"""What a draft token costs, in sampled tokens. On a model larger than the caches, 3 draft tokens make a step 1.5 times
as long, because their rows read other experts; on a smaller model they cost less."""
_FIRST, _LARGEST = 4.0, 16.0  # balance at the beginning, and at most
_ROW_PRICE = 0.4
"""Cost of a token drafted by the MTP module, as a share of a step: on a model larger than the caches, the second row of
a sequence reads other experts. It is less on smaller models, and for further rows."""
_TRIAL, _PAUSE = 64, 4096
_RECOVERY = 1 / 32  # of the balance, for each token that is sampled without a draft


class Speculation(StrEnum):
    """Whether sequences are continued with drafts.

    auto: where few sequences are decoded, and only those whose drafts have been right. off: never.
    """

    auto = "auto"
    off = "off"


class Drafter:
    """Makes the drafts of one sequence, and stops where they are wrong too often.

    Each draft token costs `_PRICE`, and each one that was right gains 1. A draft has at most as many tokens as the
    balance allows. An exhausted balance recovers slowly, so a sequence that begins to copy is noticed.
    """

    def __init__(self) -> None:
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        """By `_SHORTEST` tokens: the places of the tokens that followed them."""
        self._num_indexed = _SHORTEST
        self._balance = _FIRST

    @property
    def longest(self) -> int:
        """Largest number of tokens of the next draft."""
        return math.floor(self._balance)

    def draft(self, tokens: Sequence[int], *, most: int) -> list[int]:
        """Return up to `most` tokens that may follow; none where the last ones have not occurred before."""
        most = min(most, self.longest)
        if most < 1:
            return []
        for place in range(self._num_indexed, len(tokens)):
            self._places[tuple(tokens[place - _SHORTEST : place])].append(place)
        self._num_indexed = max(self._num_indexed, len(tokens))
        places = self._places.get(tuple(tokens[-_SHORTEST:]), [])
        if not places:
            return []
        latest = reversed(places[-_NUM_COMPARED:])
        start = max(latest, key=lambda place: _common_ending(tokens, place))  # the first of equals, which is the latest
        copied: list[int] = []
        for place in range(start, start + most):
            copied.append(tokens[place] if place < len(tokens) else copied[place - len(tokens)])
        return copied

    def settle(self, *, num_drafted: int, num_right: int) -> None:
        """Take note of how many tokens of the last draft were right; call it also where there was no draft."""
        if num_drafted:
            self._balance = min(self._balance + num_right - _PRICE * num_drafted, _LARGEST)
        elif self._balance < 1:
            self._balance += _RECOVERY


class ModulePayoff:
    """Decides whether the drafts of a model's own module pay: the steps that they save against the time they take.

    A right draft saves a step of its sequence. The decision is made after each `_TRIAL` predictions; a module that did
    not pay is tried again after `_PAUSE` steps. It changes the time of a token and never the token.
    """

    def __init__(self) -> None:
        self._pause = 0
        self._begin()

    def _begin(self) -> None:
        self._num_predictions = self._num_sequences = self._num_steps = 0
        self._step_s = self._prediction_s = self._saved_steps = 0.0

    def is_due(self) -> bool:
        """Return whether to predict in this step; call it once per step."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def note_step(self, seconds: float) -> None:
        """Take note of the time of a step, without prediction."""
        self._num_steps += 1
        self._step_s += seconds

    def note_draft(self, *, is_right: bool) -> None:
        """Take note of a draft of the module that was fed: whether its token was drawn."""
        self._saved_steps += is_right - _ROW_PRICE

    def note_prediction(self, seconds: float, *, num_sequences: int) -> None:
        """Take note of the time that drafts for `num_sequences` took, and decide if the trial is over."""
        self._num_predictions += 1
        self._num_sequences += num_sequences
        self._prediction_s += seconds
        if self._num_predictions < _TRIAL:
            return
        saved_s = self._saved_steps / max(self._num_sequences, 1) * self._step_s / max(self._num_steps, 1)
        if saved_s < self._prediction_s / self._num_predictions:
            self._pause = _PAUSE
        self._begin()


def _common_ending(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before `place` equal those at the end, at most `_LONGEST`."""
    length = 0
    while length < min(_LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
