# ruff: noqa: SIM905  # lists of words read better as one string
"""Draws names of tables and columns, and row ids. Training tasks never contain the words of the held-out split.

A word consists of onset, nucleus, coda and ending, which gives tens of thousands of words. A model soon memorises a
list of nouns; names that are always new teach it to copy them.
"""

import random

from moetrain.tasks.protocol import Split

_ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr v w"
).split(" ")
_NUCLEI = "a e i o u ai ea ee ie oa oo ou".split(" ")
_CODAS = "   b ck d ft g k l ll m mp n nd ng nk nt p r rd rk rm rn rt s sh ss st t th w x y".split(
    " "
)  # the first three are empty
_ENDINGS = "a al e el en er ey ic in le o on or us y".split(" ")
_HELD_OUT_EVERY = 5  # one word in five is held out, chosen by its letters
_LONG_SHARE = 0.5  # share of words with an ending


def is_held_out(word: str) -> bool:
    """Return whether a word belongs to the held-out split."""
    return sum(map(ord, word)) % _HELD_OUT_EVERY == 0


def _draw_word(stream: random.Random, split: Split) -> str:
    while True:
        ending = stream.choice(_ENDINGS) if stream.random() < _LONG_SHARE else ""
        word = stream.choice(_ONSETS) + stream.choice(_NUCLEI) + stream.choice(_CODAS) + ending
        if len(word) > 2 and is_held_out(word) == (split is Split.held_out):
            return word


def draw_initials(stream: random.Random, *, split: Split, count: int) -> list[str]:
    """Return `count` words of `split` that begin with different letters; at most 18."""
    names: dict[str, str] = {}
    while len(names) < count:
        word = _draw_word(stream, split)
        names.setdefault(word[0], word)
    return list(names.values())


def draw_ids(stream: random.Random, *, count: int) -> list[str]:
    """Return `count` different row ids: letter, digit, letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[stream.choice(letters) + str(stream.randint(0, 9)) + stream.choice(letters)] = None
    return list(ids)
