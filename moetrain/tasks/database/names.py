# ruff: noqa: SIM905  # lists of words read better as one string
"""Words that tables and columns are named with, and row ids. Training never shows the words of the held-out split."""

import functools
import random

from moetrain.tasks.protocol import Split

_NOUNS = """
account agent album anchor animal apple area arrow artist asset author award badge baker banana barrel basket
battery beach beacon beard bench berry bill bird blade block board boat bond book border bottle branch bread brick
bridge broker brush bucket budget bunch bundle butter button cabin cable cake camera canal candle card cargo carrier
carrot case castle cat center chain chair channel chapter charge cheese cherry circle city claim client clinic cloud
coach coast code coffee coin college company copper corn corner cost cotton county courier course cousin cover cow
cream crew crop cup dance dealer debt deer degree depot desk device dish doctor dog domain donor door dream dress
driver drum duck dust eagle earth editor egg elbow engine estate event expert face factory farm farmer father
feather fee fence field film finger fire fish flag flame fleet flight floor flour flower forest fork fox frame frog
fruit fund garage garden gate ghost giant glass glove goat gold goods goose grade grain grant grape grass group
guard guest guide hammer hand handle harbor hat hawk heart height hill holder honey hook horn horse hotel house ice
income index ink iron island item jacket jar jewel judge keeper key kite knee knife label ladder lake lamb lamp land
lane lawyer leader leaf league leg lemon length lesson letter level license limit line lion lip loan lock lodge
lodger log machine manager maple margin market mask master mayor meadow meal melon member mentor metal middle mile
milk mine mint minute mirror model module moment moon moth mother motor mount mouse mouth mud museum nail neck
needle nest net network night north note novel nurse oak object ocean office oil olive onion option orbit order oven
owl owner packet page paint palm pan paper parcel parent park partner party patient pattern payment peach pear pen
pencil people pepper permit person phone piano picnic pie pig pillow pilot pine pipe pirate plan planet plant plate
player plot plum pocket policy pond pony pool port potato powder price prince printer prison prize problem process
product project public pump pupil purse queen rabbit rack rain ranch range rank rate ratio raven reader record
region rent report review reward rice rider ring river road robot rocket roof room root rope rose route rubber ruler
sail salary sale salt sample sand sauce saw scale scarf school score scout screen season seat second sector seed
seller sensor series server session shadow shape shark sheep shelf shell shelter shift ship shirt shoe shop shore
sign signal signer silk silver singer sister site size skill skirt sky slate sleeve smoke snake snow soap sock sofa
soil soup source spade spark speaker spice spider spoon spring square staff stage star station status steam steel
stem stock stone store storm straw street student studio sugar suite summer sun supply surface survey swan switch
sword symbol system tail target task tax tea teacher team temple tenant tent term thorn thread ticket tiger tile tin
tissue toast toe tomato tool tooth topic torch tower town toy track trader trail train trainer travel tray tree
tribe trip truck tube tulip tunnel turtle tutor uncle unit user vase vehicle veil vendor venue version vessel
village vine violin vision visit voice volume voyage wage wagon wall wallet ward warden water wave wax weather web
weight wheat wheel whip width wind window wine wing winner winter wire wolf wonder wood wool worker worm wrist
writer yard year zebra zone
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
_MADE_UP_SHARE = 0.6  # nouns alone are soon known by heart; names that are always new teach copying
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
    """Return `count` different words of `split`, some of them nouns, most of them made up."""
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
