"""Decides each turn by a vote: turns are sampled until one leads all others by a number of votes.

The vote is that of MAKER (arXiv 2511.09030): first to lead by k, and turns that do not end in time do not count. If a
turn is right with probability p and wrong ones agree at worst, the vote is wrong with odds ((1 - p) / p)^k. Errors must
be independent: a model that always makes the same mistake is outvoted by nobody.
"""

from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from moetrain.inference.protocol import Counts, Generation, Model, Sequence
from moetrain.runtime import seed_of


@dataclass(kw_only=True, eq=False)
class _Ballot:
    """The vote on the next turn of `sequence`.

    votes: samples of a turn, by its tokens. running: samples in progress. unfinished: those that did not end in time.
    """

    sequence: Sequence
    votes: dict[tuple[int, ...], list[Sequence]] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    unfinished: list[Sequence] = field(default_factory=list)
    num_samples: int = 0


class VotingGeneration:
    """A `Generation` whose turns are voted on. num_turns and num_samples: what it has decided, and sampled for it."""

    def __init__(self, inner: Generation, *, lead: int, max_samples: int) -> None:
        """Sample turns with `inner` until one leads by `lead` votes, at most `max_samples` per turn."""
        self._inner = inner
        self._lead = lead
        self._max_samples = max_samples
        self._ballots: dict[int, _Ballot] = {}  # by the id of the sequence
        self._ballot_of: dict[int, _Ballot] = {}  # by the id of the sample
        self.num_turns = 0
        self.num_samples = 0

    @property
    def is_busy(self) -> bool:
        """Whether any turn has not been decided."""
        return bool(self._ballots)

    @property
    def counts(self) -> Counts:
        """What the inner generation has done so far."""
        return self._inner.counts

    def add(self, sequence: Sequence) -> None:
        """Let a sequence that contains a prompt be continued."""
        self._begin(sequence)

    def extend(self, sequence: Sequence, tokens: list[int], *, limit: int) -> None:
        """Append given tokens, and let the sequence be continued until it has `limit` tokens."""
        sequence.give(tokens, version=sequence.versions[-1] if sequence.versions else 0)
        sequence.limit, sequence.is_idle = limit, False
        self._begin(sequence)

    def step(self) -> list[Sequence]:
        """Continue all samples; return the sequences whose turn has been decided."""
        decided = []
        for sample in self._inner.step():
            ballot = self._ballot_of.pop(id(sample), None)
            if ballot is None:
                continue  # another sample of this step has decided the vote
            self._inner.cancel(sample)
            ballot.running.remove(sample)
            self._count(ballot, sample)
            winner = self._winner(ballot)
            if winner is not None:
                decided.append(self._decide(ballot, winner))
            elif not ballot.running:
                self._sample(ballot)
        return decided

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence and the samples of its turn."""
        ballot = self._ballots.pop(id(sequence), None)
        if ballot is not None:
            self._stop(ballot)

    def load(self, model: Model, *, version: int) -> None:
        """Use other weights from the next step on."""
        self._inner.load(model, version=version)

    def _begin(self, sequence: Sequence) -> None:
        ballot = self._ballots[id(sequence)] = _Ballot(sequence=sequence)
        for _ in range(self._lead):
            self._sample(ballot)

    def _sample(self, ballot: _Ballot) -> None:
        """Begin one more sample of the turn, with its own stream."""
        sequence = ballot.sequence
        sample = Sequence(
            tokens=list(sequence.tokens),
            stream=seed_of(sequence.stream, "vote", len(sequence.tokens), ballot.num_samples),
            limit=sequence.limit,
            stop_ids=sequence.stop_ids,
            sampling=sequence.sampling,
        )
        ballot.num_samples += 1
        ballot.running.append(sample)
        self._ballot_of[id(sample)] = ballot
        self._inner.add(sample)

    def _count(self, ballot: _Ballot, sample: Sequence) -> None:
        turn = tuple(sample.tokens[len(ballot.sequence.tokens) :])
        if turn[-1] in sample.stop_ids:
            ballot.votes.setdefault(turn, []).append(sample)
        else:
            ballot.unfinished.append(sample)

    def _winner(self, ballot: _Ballot) -> Sequence | None:
        """Return a sample of the turn that has won; None while it is open."""
        first, second = [*_ranking(list(ballot.votes.values())), [], []][:2]
        is_over = ballot.num_samples >= self._max_samples and not ballot.running
        if first and (is_over or len(first) - len(second) >= self._lead):
            return first[0]
        return ballot.unfinished[0] if is_over else None

    def _decide(self, ballot: _Ballot, winner: Sequence) -> Sequence:
        sequence = ballot.sequence
        start = len(sequence.tokens)
        sequence.give([], version=winner.versions[0])  # entries of the prompt
        for place in range(start, len(winner.tokens)):
            sequence.take(winner.tokens[place], logprob=winner.logprobs[place], version=winner.versions[place])
        self.num_turns += 1
        self.num_samples += ballot.num_samples
        del self._ballots[id(sequence)]
        self._stop(ballot)
        return sequence

    def _stop(self, ballot: _Ballot) -> None:
        for sample in ballot.running:
            del self._ballot_of[id(sample)]
            self._inner.cancel(sample)


def _ranking(votes: Values[list[Sequence]]) -> list[list[Sequence]]:
    """Return the samples of each turn, most votes first; of two with as many, the one that was first."""
    return sorted(votes, key=len, reverse=True)
