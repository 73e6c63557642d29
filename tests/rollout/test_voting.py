"""Turns that are voted on: the first to lead is carried out, and no sample stays behind."""

import pytest

from moetrain.inference.protocol import Counts, Model, Sequence
from moetrain.rollout.voting import VotingGeneration

END = 9


class Samples:
    """A generation whose n-th added sequence says the n-th of some turns, one token per step."""

    def __init__(self, turns: list[list[int]]) -> None:
        self.turns = turns
        self.active: list[tuple[Sequence, list[int]]] = []
        self.num_added = 0
        self.counts = Counts()

    @property
    def is_busy(self) -> bool:
        return any(not sequence.is_idle for sequence, _ in self.active)

    def add(self, sequence: Sequence) -> None:
        sequence.give([], version=3)
        self.active.append((sequence, list(self.turns[self.num_added])))
        self.num_added += 1

    def extend(self, sequence: Sequence, tokens: list[int], *, limit: int) -> None:
        raise AssertionError("samples are never continued")

    def step(self) -> list[Sequence]:
        running = [(sequence, turn) for sequence, turn in self.active if not sequence.is_idle]
        for sequence, turn in running:
            sequence.take(turn.pop(0), logprob=-0.5, version=3)
        return [sequence for sequence, _ in running if sequence.is_idle]

    def cancel(self, sequence: Sequence) -> None:
        self.active = [(other, turn) for other, turn in self.active if other is not sequence]

    def load(self, model: Model, *, version: int) -> None:
        raise AssertionError


def _voted(turns: list[list[int]], *, lead: int = 2, most: int = 8) -> tuple[Sequence, VotingGeneration, Samples]:
    inner = Samples(turns)
    voting = VotingGeneration(inner, lead=lead, max_samples=most)
    sequence = Sequence(tokens=[5, 5], stream=0, limit=6, stop_ids=frozenset({END}))
    voting.add(sequence)
    for _ in range(100):
        if sequence in voting.step():
            return sequence, voting, inner
    raise AssertionError("no decision")


@pytest.mark.parametrize(
    ("turns", "winner", "num_samples"),
    [
        ([[1, END], [1, END]], [1, END], 2),
        ([[1, END], [2, END], [2, END], [2, END]], [2, END], 4),
        ([[1, END], [2, END], [2, END], [1, END], [1, END], [1, END]], [1, END], 6),
        ([[1, 1, 1, 1], [2, END], [2, END]], [2, END], 3),  # the first does not end within its limit
        ([[1, END], [2, END]] * 4, [1, END], 8),  # no lead: of two with as many votes, the first
        ([[1, 1, 1, 1]] * 8, [1, 1, 1, 1], 8),  # none ends
    ],
)
def test_the_first_turn_to_lead_is_carried_out(turns: list[list[int]], winner: list[int], num_samples: int) -> None:
    sequence, voting, inner = _voted(turns)
    assert sequence.tokens == [5, 5, *winner] and sequence.is_idle
    assert sequence.is_sampled == [False, False] + [True] * len(winner)
    assert sequence.logprobs == [0.0, 0.0] + [-0.5] * len(winner) and set(sequence.versions) == {3}
    assert (voting.num_samples, voting.num_turns) == (num_samples, 1)
    assert not voting.is_busy and not inner.active


def test_samples_in_progress_are_removed_when_the_vote_is_decided() -> None:
    _, _, inner = _voted([[1, END], [1, END], [3, 3, END]], lead=2)
    assert not inner.active
    _, _, inner = _voted([[1, END], [3, 3, 3, END], [1, END]], lead=2, most=3)
    assert not inner.active


def test_a_sequence_is_continued_after_its_turn_and_can_be_removed() -> None:
    sequence, voting, inner = _voted([[1, END], [1, END], [4, END], [4, END], [7, END], [7, END]])
    voting.extend(sequence, [6], limit=20)
    while sequence not in voting.step():
        pass
    assert sequence.tokens == [5, 5, 1, END, 6, 4, END]
    voting.extend(sequence, [6], limit=20)
    voting.cancel(sequence)
    assert not voting.is_busy and not inner.active and voting.step() == []
