"""Words that tables and columns are named with, and row ids. The held-out split uses words that training never shows."""

import functools
import random

from moetrain.tasks.protocol import Split

_NOUNS = """
account agent album anchor animal area artist asset author award badge barrel basket battery beacon bill board boat bond
book border bottle branch bridge broker bucket budget builder bundle cabin cable camera canal card cargo carrier case
cashier castle center chain channel chapter charge circle city claim client clinic coach code coin college colour company
contract corner cost country county courier course cousin cover crew crop customer dealer debt degree depot desk device
director district doctor domain donor driver editor engine estate event expert factory farm father fee field film fleet
flight floor forest fund garage garden gate goods grade grant group guard guest guide harbor height holder hotel house
income index island item judge keeper label lake land lawyer leader league length lesson level license limit line loan
lodge machine manager margin market mayor meal member mentor metal mile mine mission model module mother motor museum
network note nurse object office officer option orbit order owner packet page parcel parent park partner party patient
payment permit person phone pilot plan planet plant plate player plot pool port price prize project province pupil rack
ranch range rank rate ratio reader region rent report review rider ring river road robot room root route ruler sale
salary sample scale school score scout seat sector seller sensor server session shelf shelter shift ship shop signer site
size skill source speaker sponsor spouse stage staff station stock store street student studio suite supply survey
system target tax teacher team temple tenant term ticket tower town track trader trail train trainer tribe trip truck
tunnel tutor unit user valley value vehicle vendor venue vessel village visit voyage wage ward warden weight wheel width
window winner worker yard year zone
""".split()
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
_HELD_OUT_EVERY = 5  # every fifth noun is held out, and made-up words by a rule on their letters
_MADE_UP_SHARE = 0.5


def _is_held_out_word(word: str) -> bool:
    return sum(map(ord, word)) % _HELD_OUT_EVERY == 0


@functools.lru_cache(maxsize=2)
def nouns(split: Split) -> list[str]:
    """Return the nouns of `split`; the two lists have no word in common."""
    return [word for word in _NOUNS if _is_held_out_word(word) == (split is Split.held_out)]


def _made_up(stream: random.Random, split: Split) -> str:
    while True:
        syllables = stream.randint(2, 3)
        word = "".join(stream.choice(_CONSONANTS) + stream.choice(_VOWELS) for _ in range(syllables))
        if _is_held_out_word(word) == (split is Split.held_out):
            return word


def draw_names(stream: random.Random, *, split: Split, count: int) -> list[str]:
    """Return `count` different words of `split`, half of them nouns, half made up of syllables."""
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
