"""Generates one turn on a `Generation`, shows it as it appears, and stops at Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.protocol import Generation, Sequence
from moetrain.serve.turn import TurnReader
from moetrain.terminal.screen import Screen


class TurnEnd(StrEnum):
    """How a turn ended: the model ended it, its limit was reached, or Ctrl-C."""

    whole = "whole"
    limit = "limit"
    interrupted = "interrupted"


@dataclass(kw_only=True)
class Interrupts:
    """Counts Ctrl-C during a turn, so that the first one tears no step apart. The second raises KeyboardInterrupt."""

    number: int = field(default=0, init=False)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count Ctrl-C while the context lasts. In other threads than the main one there is nothing to count."""
        self.number = 0

        def on_signal(number: int, frame: object) -> None:
            self.number += 1
            if self.number > 1:
                raise KeyboardInterrupt

        try:
            before = signal.signal(signal.SIGINT, on_signal)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def play_turn(
    generation: Generation, sequence: Sequence, *, tokenizer: Tokenizer, screen: Screen, interrupts: Interrupts
) -> TurnEnd:
    """Continue a sequence until its turn ends, and show the turn."""
    reader = TurnReader(tokenizer)
    position = len(sequence.tokens)
    with interrupts.counted():
        while not sequence.is_idle and not interrupts.number:
            generation.step()
            for token in sequence.tokens[position:]:
                if token not in sequence.stop_ids:
                    screen.show(reader.push(token))
            position = len(sequence.tokens)
    screen.show(reader.finish())
    screen.end_part()
    if sequence.is_idle:
        return TurnEnd.whole if sequence.tokens[-1] == tokenizer.turn_end_id else TurnEnd.limit
    return TurnEnd.interrupted
