"""The most common mistakes of captions in four word classes: count, colour, gender, object.

A caption is wrong in a class if it has a word of the class that is in no reference, while the
references have other words of the class: "a black dog" and the references "a brown dog", "a dog
with brown fur". Grammar is ignored, so a word may be compared although it describes something else.
Objects are compared by the groups below (after CHAIR, Rohrbach et al. 2018, arXiv:1809.02156);
general and specific words (person and man) do not contradict each other. On drawn scenes, whose
ground truth is known, `training.data.scenes.check` is used instead.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from training.data.manifest import Row
from training.data.scene_language import Scene, check


def _groups(lines: str) -> dict[str, str]:
    """{word: first word of its line}."""
    return {word: line.split()[0] for line in lines.splitlines() for word in line.split()}


# The classes. The words on one line have the same meaning.
COUNTS = _groups("""\
one single lone alone
two both pair couple twins
three trio
four
five
six
seven
eight
nine
ten
several many group crowd bunch lots dozens few""")
COLOURS = _groups("""\
red maroon crimson
orange
yellow blond blonde gold golden
green
blue navy turquoise
purple violet lavender
pink
white
black
brown tan beige
gray grey silver""")
GENDERS = _groups("""\
male man men boy boys guy guys gentleman gentlemen father dad son brother he his him himself husband
female woman women girl girls lady ladies mother mom daughter sister she her hers herself wife bride
""")
OBJECTS = _groups("""\
dog dogs puppy puppies
cat cats kitten kittens
horse horses pony
bird birds seagull seagulls pigeon pigeons duck ducks parrot eagle
cow cows bull bulls cattle
sheep lamb goat goats
elephant elephants
bear bears
zebra zebras
giraffe giraffes
monkey monkeys
fish
baby babies infant toddler
car cars automobile vehicle suv jeep
truck trucks van
bus buses
train trains
bicycle bike bikes bicycles bicyclist cyclist biker bikers
motorcycle motorcycles motorbike dirtbike
airplane airplanes plane jet aircraft
boat boats canoe kayak ship sailboat raft
skateboard skateboards skateboarder skateboarding
surfboard surfer surfers surfing
snowboard snowboards snowboarder snowboarding
skis ski skier skiers skiing
sled sledding
swing swings
slide
trampoline
football
soccer
basketball
baseball
volleyball
tennis racket
frisbee
ball balls
toy toys
stick sticks branch
kite kites
guitar guitars
drum drums
piano
microphone
camera cameras
phone cellphone telephone
laptop computer
book books
umbrella umbrellas
bag bags backpack purse suitcase
hat hats cap helmet
sunglasses glasses goggles
bench benches
chair chairs
table tables desk
couch sofa
bed
bottle bottles
cup cups mug
pizza
cake cakes
sandwich
banana bananas
apple apples
tree trees
flower flowers
building buildings
house houses
bridge
fence
stairs steps staircase
rock rocks boulder cliff
mountain mountains hill
snow snowy
beach sand shore
ocean sea waves wave
river stream creek
lake
pool
water
grass grassy lawn
field
street road sidewalk
track
rope
fountain
tent
sign
fire""")
# Objects on one line do not contradict each other: a ball may be a football.
AKIN = [
    set(line.split())
    for line in """\
car truck bus
hat sunglasses
ball football soccer basketball baseball volleyball tennis toy
toy stick frisbee
ocean water river lake pool beach surfboard
street track
grass field
rock mountain
snow skis snowboard sled
bicycle motorcycle
building house""".splitlines()
]
# The kinds of mistakes, with the meaning of each of their words.
CLASSES = {"count": COUNTS, "colour": COLOURS, "gender": GENDERS, "object": OBJECTS}


@dataclass
class Mistakes:
    """The mistakes of one kind: the number of captions that were `judged`, the `photos` whose
    captions were wrong, and the number of `confusions` (wrong word, expected word)."""

    judged: int = 0
    photos: list[str] = field(default_factory=list)
    confusions: Counter[tuple[str, str]] = field(default_factory=Counter)


def find_mistakes(predictions: Mapping[str, str], rows: Sequence[Row]) -> dict[str, Mistakes]:
    """The mistakes of one caption per photo, by kind; on drawn scenes, the kinds are those of the
    checker."""
    mistakes: dict[str, Mistakes] = defaultdict(Mistakes)
    for row in rows:
        caption = predictions[row.id]
        judged: Mapping[str, list[tuple[str, str]] | None]
        if row.scene is not None:
            judged = scene_mistakes(caption, row.scene)
        else:
            judged = {kind: word_mistakes(caption, row.captions, kind) for kind in CLASSES}
        for kind, confusions in judged.items():
            if confusions is None:
                continue
            mistakes[kind].judged += 1
            mistakes[kind].confusions.update(set(confusions))
            if confusions:
                mistakes[kind].photos.append(row.id)
    return dict(mistakes)


def word_mistakes(
    caption: str, references: Sequence[str], kind: str
) -> list[tuple[str, str]] | None:
    """(wrong word, expected word) for each word of a class that the references contradict; None if
    caption or references have no word of the class. For objects the expected word is ""."""
    meaning = CLASSES[kind]
    own = _meanings(caption, meaning)
    true = Counter(m for reference in references for m in _meanings(reference, meaning))
    if not own or not true:
        return None
    commonest = true.most_common(1)[0][0]
    wrong = []
    for word in own:
        relatives = set().union(*(kin for kin in AKIN if word in kin)) if kind == "object" else ()
        if word not in true and not true.keys() & set(relatives):
            # Expected is the most common word of the references that the caption lacks.
            missed = next((m for m, _ in true.most_common() if m not in own), commonest)
            wrong.append((word, "" if kind == "object" else missed))
    return wrong


def scene_mistakes(caption: str, scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """The texts of the false claims by kind, in the form of `word_mistakes`; there is no expected
    word."""
    mistakes: dict[str, list[tuple[str, str]]] = {}
    for claim in check(caption, scene):
        wrong = mistakes.setdefault(claim.kind, [])
        if not claim.true:
            wrong.append((claim.text, ""))
    return mistakes


def _meanings(text: str, meaning: Mapping[str, str]) -> list[str]:
    """The meanings of the words of a text that are in a class, each once, in order."""
    words = re.findall(r"[a-z]+", text.lower())
    return list(dict.fromkeys(meaning[word] for word in words if word in meaning))
