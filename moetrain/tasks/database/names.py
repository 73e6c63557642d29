# ruff: noqa: SIM905  # lists of words read better as one string
"""Words that tables and columns are named with, and row ids. Training never shows the words of the held-out split."""

import functools
import random

from moetrain.tasks.protocol import Split

_NOUNS = """
agent album area asset award badge bill board boat bond book cabin cable canal card cargo case chain city claim
coach code coin cost cover crew crop debt depot desk donor event farm fee field film fleet floor fund gate goods
grade grant group guard guest guide hotel house index item judge label lake land level limit line loan lodge
mayor meal metal mile mine model motor note nurse orbit order owner page park party phone pilot plan plant plate
plot pool port price prize pupil rack ranch range rank rate ratio rent rider ring river road robot room root
route ruler sale scale score scout seat shelf shift ship shop site size skill stage staff stock store suite tax
team term tower town track trail train tribe trip truck tutor unit user value venue visit wage ward wheel width
yard year zone
""".split()
_ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr v w"
).split(" ")
_NUCLEI = "a e i o u ai ea ee ie oa oo ou".split(" ")
_CODAS = "   b ck d ft g k l ll m mp n nd ng nk nt p r rd rk rm rn rt s sh ss st t th w x y".split(
    " "
)  # three of them are empty
_ENDINGS = "a al e el en er ey ic in le o on or us y".split(" ")
_HELD_OUT_EVERY = 5  # every fifth noun is held out, and made-up words by a rule on their letters
_MADE_UP_SHARE = 0.75  # few nouns are soon known by heart; names that are always new teach copying
_LONG_SHARE = 0.5  # of the made-up words have an ending


def _is_held_out_word(word: str) -> bool:
    return sum(map(ord, word)) % _HELD_OUT_EVERY == 0


@functools.lru_cache(maxsize=2)
def nouns(split: Split) -> list[str]:
    """Return the nouns of `split`; the two lists have no word in common."""
    return [word for word in _NOUNS if _is_held_out_word(word) == (split is Split.held_out)]


def _made_up(stream: random.Random, split: Split) -> str:
    while True:
        ending = stream.choice(_ENDINGS) if stream.random() < _LONG_SHARE else ""
        word = stream.choice(_ONSETS) + stream.choice(_NUCLEI) + stream.choice(_CODAS) + ending
        if len(word) > 2 and _is_held_out_word(word) == (split is Split.held_out):
            return word


def draw_names(stream: random.Random, *, split: Split, count: int) -> list[str]:
    """Return `count` different words of `split`, a quarter of them nouns, the others made up."""
    pool = nouns(split)
    names: list[str] = []
    while len(names) < count:
        word = _made_up(stream, split) if stream.random() < _MADE_UP_SHARE else stream.choice(pool)
        if word not in names:
            names.append(word)
    return names


def draw_ids(stream: random.Random, *, count: int) -> list[str]:
    """Return `count` different row ids: letter, digit, letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[stream.choice(letters) + str(stream.randint(0, 9)) + stream.choice(letters)] = None
    return list(ids)
