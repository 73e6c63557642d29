"""Phrasings: frames whose slots are filled with words. Those of the two splits are never the same."""

import functools
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence

from moetrain.tasks.protocol import Split

_HELD_OUT_EVERY = 5


def fill(frames: Sequence[str], slots: Mapping[str, Sequence[str]], *, split: Split) -> list[str]:
    """Return the phrasings of `split`: each frame with each choice of a word for each of its `<slots>`.

    A phrasing is held out if 5 divides its CRC-32. A sum of its letters would reveal the candidates of its last word
    from the other words, so that a model could skip reading it.
    """
    table = tuple((slot, tuple(words)) for slot, words in slots.items())
    wanted = split is Split.held_out
    return [
        text for text in _filled(tuple(frames), table) if (zlib.crc32(text.encode()) % _HELD_OUT_EVERY == 0) == wanted
    ]


@functools.cache
def _filled(frames: tuple[str, ...], table: tuple[tuple[str, tuple[str, ...]], ...]) -> list[str]:
    words_of = dict(table)
    filled = set()
    for frame in frames:
        slots = re.findall(r"<\w+>", frame)
        for words in itertools.product(*(words_of[slot] for slot in slots)):
            text = frame
            for slot, word in zip(slots, words, strict=True):
                text = text.replace(slot, word, 1)
            filled.add(text)
    return sorted(filled)
