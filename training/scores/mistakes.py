"""The commonest mistakes of captions, by simple word classes: how many, which colour, who, what.

A caption is wrong in a class where it says a word of the class that no reference says, while the
references do say something of that class: "a black dog" against "a brown dog", "a dog with brown
fur". Nobody's grammar is read, so a word may be judged that was said of another thing; objects are
compared by the groups below (after CHAIR, Rohrbach et al. 2018, arXiv:1809.02156), and a kind and
its particular (person and man) do not contradict each other. On drawn scenes, whose truth is known,
`training.data.scenes.check` judges instead.
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


# Each class, a group of words that say the same on each line.
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
# Objects on one line are no contradiction of each other: a ball may be a football.
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
# The kinds of mistakes, and their words: word -> what it says.
CLASSES = {"count": COUNTS, "colour": COLOURS, "gender": GENDERS, "object": OBJECTS}


@dataclass
class Mistakes:
    """What went wrong in one kind: `judged` captions said something of it that could be judged;
    `photos` are those that were wrong; `confusions` count (said, instead of)."""

    judged: int = 0
    photos: list[str] = field(default_factory=list)
    confusions: Counter[tuple[str, str]] = field(default_factory=Counter)


def find_mistakes(predictions: Mapping[str, str], rows: Sequence[Row]) -> dict[str, Mistakes]:
    """The mistakes of one caption a photo, by kind; on drawn scenes by the checker's own kinds."""
    found: dict[str, Mistakes] = defaultdict(Mistakes)
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
            found[kind].judged += 1
            found[kind].confusions.update(set(confusions))
            if confusions:
                found[kind].photos.append(row.id)
    return dict(found)


def word_mistakes(
    caption: str, references: Sequence[str], kind: str
) -> list[tuple[str, str]] | None:
    """(said, instead of) for each word of a class that the references contradict; None where
    caption or references say nothing of it. An object stands for no other one: "" for it."""
    meaning = CLASSES[kind]
    said = _meanings(caption, meaning)
    true = Counter(m for reference in references for m in _meanings(reference, meaning))
    if not said or not true:
        return None
    commonest = true.most_common(1)[0][0]
    wrong = []
    for word in said:
        relatives = set().union(*(kin for kin in AKIN if word in kin)) if kind == "object" else ()
        if word not in true and not true.keys() & set(relatives):
            # The reference's word that the caption leaves out is the one it was taken for.
            missed = next((m for m, _ in true.most_common() if m not in said), commonest)
            wrong.append((word, "" if kind == "object" else missed))
    return wrong


def scene_mistakes(caption: str, scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """False claims by kind, each with what it said; the truth is a whole scene, so that nothing
    stands for "instead of"."""
    found: dict[str, list[tuple[str, str]]] = {}
    for claim in check(caption, scene):
        wrong = found.setdefault(claim.kind, [])
        if not claim.true:
            wrong.append((claim.text, ""))
    return found


def _meanings(text: str, meaning: Mapping[str, str]) -> list[str]:
    """What the words of a text say in a class, each once, in order."""
    words = re.findall(r"[a-z]+", text.lower())
    return list(dict.fromkeys(meaning[word] for word in words if word in meaning))
