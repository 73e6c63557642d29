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


def _common_ending(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before `place` equal those at the end, at most `_LONGEST`."""
    length = 0
    while length < min(_LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
