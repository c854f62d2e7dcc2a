"""Language about drawn scenes: a grammar that generates captions, and a checker that reads them.

A scene is plain JSON:

    {"size": [w, h], "background": {"pattern": ..., "tone": ...},
     "objects": [{"shape", "colour", "size", "texture", "box": [x0, y0, x1, y1]}, ...]}

with boxes in pixels, x to the right and y down. The checker does not use the grammar. It reads
words, so that it can judge any text of a model.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
PATTERNS = ("plain", "shaded", "striped", "checked")
TONES = ("light", "dark")
NUMBERS = ("no", "one", "two", "three", "four")
ATTRIBUTES = ("size", "texture", "colour")

MARGIN = 3 / 96  # least distance of two boxes that are beside each other, relative to the side

SceneObject = dict[str, Any]
Scene = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One statement of a caption, and whether it is true for the picture.

    kind: object, colour, count, size, texture, position, relation or background.
    """

    text: str
    kind: str
    true: bool


def stands(first: SceneObject, relation: str, second: SceneObject, scene: Scene) -> bool:
    """Whether `first` is left of / right of / above / below `second` without overlap."""
    if relation in ("right", "below"):
        first, second = second, first
    axis = 0 if relation in ("left", "right") else 1
    return bool(first["box"][axis + 2] + MARGIN * scene["size"][axis] <= second["box"][axis])


def place(item: SceneObject, scene: Scene) -> tuple[str, str]:
    """(row, column) of an object's centre: top, middle or bottom; left, middle or right."""
    x0, y0, x1, y1 = item["box"]
    width, height = scene["size"]

    def third(centre: float, low: str, high: str) -> str:
        return low if centre < 0.4 else high if centre > 0.6 else "middle"

    return third((y0 + y1) / 2 / height, "top", "bottom"), third(
        (x0 + x1) / 2 / width, "left", "right"
    )


def matching(scene: Scene, wanted: dict[str, str]) -> list[SceneObject]:
    return [o for o in scene["objects"] if all(o[key] == word for key, word in wanted.items())]


# ---------------------------------------------------------------------------------- the grammar

RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
AFTER_PHRASES = {  # "a circle with a star ..."
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
MIN_WORDS, MAX_WORDS = 6, 18


class _Describer:
    """Phrases for one scene. The words for an object identify it unambiguously."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        groups: dict[tuple[str, ...], list[SceneObject]] = {}
        for item in scene["objects"]:
            key = tuple(item[name] for name in ("shape", *ATTRIBUTES))
            groups.setdefault(key, []).append(item)
        self.groups = list(groups.values())
        self.single = [group[0] for group in self.groups if len(group) == 1]
        # Sizes are said above all where they tell objects apart.
        sizes = {item["size"] for item in scene["objects"]}
        self.says_size = 0.75 if len(sizes) > 1 else 0.15

    def thing(self, item: SceneObject, article: str = "a") -> str:
        """A noun phrase such as `a large red circle` or `three dotted hearts`."""
        known = {"shape": item["shape"], "colour": item["colour"]}
        count = len(matching(self.scene, {**known, "size": item["size"],
                                          "texture": item["texture"]}))  # fmt: skip
        if self.rng.random() < self.says_size:
            known["size"] = item["size"]
        if item["texture"] != "plain" and self.rng.random() < 0.6:
            known["texture"] = item["texture"]
        for name in ("size", "texture"):
            if len(matching(self.scene, known)) > count:
                known[name] = item[name]
        words = [
            self.rng.choice(SIZE_WORDS[known[name]]) if name == "size" else known[name]
            for name in ATTRIBUTES
            if name in known
        ]
        if count > 1:
            return " ".join([NUMBERS[count], *words, _plural(item["shape"])])
        if article == "a" and words[0][0] in "aeiou":
            article = "an"
        return " ".join([article, *words, item["shape"]])

    def list(self) -> str:
        things = [self.thing(group[0]) for group in self.shuffled(self.groups)]
        return " and ".join(things)

    def place(self, group: Sequence[SceneObject]) -> str | None:
        places = {place(item, self.scene) for item in group}
        rows, columns = {row for row, _ in places}, {column for _, column in places}
        row = rows.pop() if len(rows) == 1 else "middle"
        column = columns.pop() if len(columns) == 1 else "middle"
        if (row, column) == ("middle", "middle"):
            return "in the middle" if len(places) == 1 else None
        if row == "middle":
            return f"on the {column}"
        if column == "middle":
            return f"at the {row}"
        corner = (f"in the {row} {column} corner", f"at the {row} {column}")
        return self.rng.choice((*corner, f"at the {row}", f"on the {column}"))

    def background(self) -> str:
        tone, pattern = self.scene["background"]["tone"], self.scene["background"]["pattern"]
        return self.rng.choice((tone, pattern, f"{tone} {pattern}"))

    def shuffled(self, things: Iterable[Any]) -> Any:
        things = list(things)
        return self.rng.sample(things, len(things))

    def related(self) -> tuple[SceneObject, str, SceneObject] | None:
        """Two objects side by side or one above the other, never diagonally."""
        for first, second in self.shuffled(permutations(self.single, 2)):
            axes = (("left", "right"), 1), (("above", "below"), 0)
            for relations, across in axes:
                one, other = (sum(item["box"][across::2]) / 2 for item in (first, second))
                if abs(one - other) > self.scene["size"][across] / 8:
                    continue
                for relation in relations:
                    if stands(first, relation, second, self.scene):
                        return first, relation, second
        return None

    # Each of the following methods is one wording of a caption; None if it does not fit the scene.

    def plain_list(self) -> str:
        return f"{self.list()} on a {self.background()} background"

    def shown(self) -> str:
        opening = ("the picture shows", "in this picture we see", "this is a drawing of")
        return f"{self.rng.choice(opening)} {self.list()}"

    def there_is(self) -> str:
        group = self.rng.choice(self.groups)
        verb = "is" if len(group) == 1 else "are"
        where = self.place(group)
        end = f"on a {self.background()} background" if where is None else f"{where} of the picture"
        return f"there {verb} {self.thing(group[0])} {end}"

    def sits(self) -> str | None:
        if not self.single:
            return None
        item = self.rng.choice(self.single)
        where = self.place([item])
        verb = self.rng.choice(("is", "sits", "stands"))
        of = self.rng.choice((" of the image", " of the picture", ""))
        return f"{self.thing(item, self.rng.choice(('the', 'a')))} {verb} {where}{of}"

    def two_places(self) -> str | None:
        if len(self.single) < 2:
            return None
        first, second = self.rng.sample(self.single, 2)
        return " and ".join(f"{self.thing(i)} {self.place([i])}" for i in (first, second))

    def relation(self) -> str | None:
        pair = self.related()
        if pair is None:
            return None
        first, relation, second = pair
        article = self.rng.choice(("a", "the"))
        verb = self.rng.choice(("is", "sits", "stands"))
        phrase = self.rng.choice(RELATION_PHRASES[relation])
        return f"{self.thing(first, article)} {verb} {phrase} {self.thing(second, article)}"

    def with_relation(self) -> str | None:
        pair = self.related()
        if pair is None:
            return None
        first, relation, second = pair
        phrase = self.rng.choice(AFTER_PHRASES[relation])
        return f"{self.thing(second)} with {self.thing(first)} {phrase}"

    def turned_relation(self) -> str | None:
        pair = self.related()
        if pair is None:
            return None
        first, relation, second = pair
        phrase = self.rng.choice(RELATION_PHRASES[relation])
        return f"{phrase} {self.thing(second, 'the')} there is {self.thing(first)}"

    def counted(self) -> str:
        total = len(self.scene["objects"])
        if total == 1:
            return f"only one shape is drawn here and it is {self.list()}"
        group = self.rng.choice(self.groups)
        if len(group) == total:
            every = "both of the" if total == 2 else f"all of the {NUMBERS[total]}"
            look = f"{group[0]['colour']} {_plural(group[0]['shape'])}"
            return f"{every} shapes here are {look} on a {self.background()} background"
        verb = "is" if len(group) == 1 else "are"
        noun = self.rng.choice(("shapes", "objects"))
        # Beams always say the likelier of place and background: with one share for all scenes, the
        # same one everywhere, and another seed turns over which.
        placed = 0.9 if len(group) == 1 and total == 3 else 0.1
        where = self.place(group) if self.rng.random() < placed else None
        where = where or f"against a {self.background()} background"
        thing = self.thing(group[0])
        said = f"among them {verb} {thing}" if self.rng.random() < 0.2 else f"{thing} {verb}"
        return f"{NUMBERS[total]} {noun} in all and {said} {where}"

    def place_first(self) -> str | None:
        groups = [(group, self.place(group)) for group in self.groups]
        placed = [(group, where) for group, where in groups if where is not None]
        if not placed:
            return None
        group, where = self.rng.choice(placed)
        verb = "is" if len(group) == 1 else "are"
        of = self.rng.choice((" of the image", ""))
        return f"{where}{of} there {verb} {self.thing(group[0])}"

    def background_first(self) -> str:
        return f"against a {self.background()} background we see {self.list()}"

    def background_said(self) -> str:
        group = self.rng.choice(self.groups)
        verb = "is" if len(group) == 1 else "are"
        return f"the background is {self.rng.choice(tuple(self.scene['background'].values()))} " + (
            f"and there {verb} {self.thing(group[0])}"
        )

    def quality(self) -> str | None:
        """`the red circle on the left is large and striped`"""
        unique = [
            item for item in self.single
            if len(matching(self.scene, {k: item[k] for k in ("shape", "colour")})) == 1
        ]  # fmt: skip
        if not unique:
            return None
        item = self.rng.choice(unique)
        subject = f"the {item['colour']} {item['shape']} {self.place([item])} is {item['size']}"
        return f"{subject} and {item['texture']}" if self.rng.random() < 0.5 else subject


WORDINGS: tuple[Callable[[_Describer], str | None], ...] = (
    _Describer.plain_list,
    _Describer.shown,
    _Describer.there_is,
    _Describer.sits,
    _Describer.two_places,
    _Describer.relation,
    _Describer.with_relation,
    _Describer.turned_relation,
    _Describer.counted,
    _Describer.place_first,
    _Describer.background_first,
    _Describer.background_said,
    _Describer.quality,
)

RELATION_WORDINGS = (
    _Describer.relation,
    _Describer.with_relation,
    _Describer.turned_relation,
)


def _salient(scene: Scene, rng: random.Random) -> tuple[Callable[[_Describer], str | None], ...]:
    """The wordings for what first strikes the eye: where a single object is, how two are arranged,
    how many there are if there are more."""
    number = len(scene["objects"])
    if number == 1:
        return _Describer.there_is, _Describer.sits, _Describer.place_first
    if number == 2:
        return RELATION_WORDINGS
    relation = rng.choice(RELATION_WORDINGS)
    return _Describer.counted, _Describer.background_first, _Describer.there_is, relation


def describe(scene: Scene, rng: random.Random, captions: int = 5) -> tuple[str, ...]:
    """True captions of 6 to 18 words, each with a different wording. Most of them say what is
    salient in the scene: a beam search generates what most captions of such a scene say, and would
    otherwise never say what each says in another way. If two objects are beside or above each
    other, at least one caption says so."""
    describer = _Describer(scene, rng)
    sentences: list[str] = []
    salient = describer.shuffled(_salient(scene, rng))
    others = describer.shuffled(w for w in WORDINGS if w not in (*salient, *RELATION_WORDINGS))
    # A second round for the few scenes in which too many sentences are too short or too long.
    for wording in (*salient, *others, *WORDINGS):
        sentence = wording(describer)
        if sentence is None or sentence in sentences:
            continue
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            sentences.append(sentence)
        if len(sentences) == captions:
            return tuple(describer.shuffled(sentences))
    raise AssertionError(f"too few captions for {scene}")


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


# ---------------------------------------------------------------------------------- the checker

_ANYTHING = ("shape", "object", "thing")
_NOUNS: dict[str, str | None] = {"background": "background"}
_NOUNS |= {word: shape for shape in SHAPES for word in (shape, _plural(shape))}
_NOUNS |= {word: None for noun in _ANYTHING for word in (noun, _plural(noun))}
_PLURALS = {_plural(noun) for noun in (*SHAPES, *_ANYTHING)}
_WORDS = {word: ("colour", word) for word in COLOURS}
_WORDS |= {word: ("size", size) for size, words in SIZE_WORDS.items() for word in words}
_WORDS |= {"tiny": ("size", "small"), "huge": ("size", "large")}
_WORDS |= {word: ("texture", word) for word in ("plain", "striped", "dotted", "checked", "shaded")}
_WORDS |= {word: ("tone", word) for word in TONES}
_WORDS |= {word: ("colour", word) for word in ("black", "brown", "gray", "grey", "cyan")}
_COUNTS = {word: number for number, word in enumerate(NUMBERS)}
_COUNTS |= {"both": 2, "zero": 0} | {str(n): n for n in range(100)}
_COUNTS |= {"five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_RELATIONS = {
    "above": "above", "over": "above",
    "below": "below", "under": "below", "beneath": "below", "underneath": "below",
}  # fmt: skip
_ROWS = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
_COLUMNS = {"left": "left", "right": "right"}
_MIDDLES = ("middle", "center", "centre")
_ARTICLES = ("a", "an", "the", "this", "these", "another", "some", "only")
_VERBS = ("is", "are", "sits", "sit", "stands", "stand", "lies", "lie", "there", "we", "see")
_NEGATIONS = ("not", "without", "never", "neither", "nor", "none", "nothing")
# Words that may follow an article although they name no object.
_NEUTRAL = frozenset(
    ("picture", "image", "scene", "photo", "drawing", "canvas", "side", "corner", "other", "same",
     "all", "of", "them", "here", "lot", "few", "half", "next", "front", "back", "each", "it",
     "its", "there", "is", "are", "and", "with", "in", "on", "at", "to")
)  # fmt: skip


@dataclass
class _Mention:
    """An object that the text mentions."""

    start: int
    end: int
    text: str
    wanted: dict[str, str] = field(default_factory=dict)
    number: int | None = None
    plural: bool = False
    definite: bool = False

    @property
    def least(self) -> int:
        """How many such objects there must be at least."""
        return 1 + self.plural if self.number is None else self.number


@dataclass
class _Phrase:
    """A relation (left, right, above or below), or a position (row and column)."""

    start: int
    end: int
    relation: str | None
    row: str | None = None
    column: str | None = None
    subject: _Mention | None = None


def check(caption: str, scene: Scene) -> list[Claim]:
    """The claims of a caption, each judged against the scene; empty if it claims nothing.

    An object with several attributes is one object: `a large red circle` claims that there is a
    circle, a red circle, and a large red circle. A number is exact. A plural without a number means
    two or more, and `a red circle and a red circle` means two. A relation or position is true if
    such objects are arranged in this way. False claims are: a word for an object that occurs in no
    scene, a relation with one side missing, and a negation other than `no`.

    A caption without claims must not be counted as entirely true.
    """
    return _Reading(caption_words(caption), scene).claims


def referents(caption: str, scene: Scene) -> list[tuple[int, list[SceneObject]]]:
    """The words that name a shape: the index of each among the words of the caption, and the
    objects that match everything the caption says about it (an empty list if there are none)."""
    reading = _Reading(caption_words(caption), scene)
    return [
        (reading.words.index(mention.text, mention.start), matching(scene, mention.wanted))
        for mention in reading.things()
        if "shape" in mention.wanted and mention.number != 0
    ]


def caption_words(caption: str) -> list[str]:
    """The tokens of a caption: words, numbers, and punctuation that separates clauses."""
    text = re.sub(r"n['\u2019]t\b", " not", caption.lower())
    return re.findall(r"[a-z]+|[0-9]+|[.,;]", text)


class _Reading:
    def __init__(self, words: list[str], scene: Scene) -> None:
        self.words, self.scene = words, scene
        self.claims: list[Claim] = []
        self.mentions: list[_Mention] = []
        self.phrases: list[_Phrase] = []
        self.read()
        for mention in self.mentions:
            self.judge(mention)
        self.judge_repeated()
        subject: _Mention | None = None
        for phrase in self.phrases:
            subject = self.judge_phrase(phrase, subject)
        self.claims += [Claim(w, "object", False) for w in words if w in _NEGATIONS]

    def word(self, index: int) -> str:
        return self.words[index] if 0 <= index < len(self.words) else ""

    def claim(self, kind: str, true: bool, start: int, end: int) -> None:
        self.claims.append(Claim(" ".join(self.words[start:end]), kind, true))

    def read(self) -> None:
        index = 0
        while index < len(self.words):
            index = self.read_phrase(index) or self.read_mention(index) or index + 1

    def read_phrase(self, index: int) -> int | None:
        word, after = self.word(index), self.word(index + 1)
        if word in _RELATIONS:
            self.phrases.append(_Phrase(index, index + 1, _RELATIONS[word]))
            return index + 1
        if word == "top" and after == "of" and self.word(index - 1) == "on":
            self.phrases.append(_Phrase(index, index + 2, "above"))
            return index + 2
        if word not in _ROWS and word not in _COLUMNS and word not in _MIDDLES:
            return None
        row = column = None
        end = index
        while self.word(end) in _ROWS or self.word(end) in _COLUMNS or self.word(end) in _MIDDLES:
            row = _ROWS.get(self.word(end), row)
            column = _COLUMNS.get(self.word(end), column)
            end += 1
        while self.word(end) in ("side", "corner", "half", "part"):
            end += 1
        whole = self.words[end : end + 2] == ["of", "the"] or self.words[end : end + 2] == ["of",
                "this"]  # fmt: skip
        if whole and self.word(end + 2) in ("picture", "image", "scene", "photo", "drawing"):
            end += 3
        elif self.word(end) == "of" and column and not row:
            self.phrases.append(_Phrase(index, end + 1, column))
            return end + 1
        elif self.word(index - 1) == "its" and column and not row:
            self.phrases.append(_Phrase(index, end, column))
            return end
        self.phrases.append(_Phrase(index, end, None, row, column))
        return end

    def read_mention(self, index: int) -> int | None:
        """Article, number, attributes, noun; or attributes of the previous object."""
        start = index
        while self.word(index) in _ARTICLES:
            index += 1
        number = None
        if self.word(index) in _COUNTS:
            number = _COUNTS[self.word(index)]
            index += 1
        while self.word(index) in ("of", "the", "them"):  # all of the three, one of them
            index += 1
        adjectives = index
        index, wanted, clash = self.read_adjectives(index)
        noun = self.word(index)
        if clash:
            self.claim("colour" if "colour" in wanted else "object", False, start, index + 1)
        if noun in _NOUNS:
            shape = _NOUNS[noun]
            if shape is not None:
                wanted["shape"] = shape
            end = index + 1
            # Attributes may follow: `the circle is large and red`, `a circle that is red`.
            definite = "the" in self.words[start:index]
            mention = _Mention(start, end, noun, wanted, number, noun in _PLURALS, definite)
            if mention.plural and number is None and self.word(start - 1) == "are":
                mention.number = self.number_of_all()
            self.mentions.append(mention)
            return self.read_predicate(mention, end)
        if index > adjectives:
            if noun.isalpha() and not self.is_known(noun):
                self.claim("object", False, start, index + 1)
                return index + 1
            before = self.mentions[-1] if self.mentions else None
            if before and self.word(start - 1) in ("is", "are") and number is None:
                before.wanted = {**before.wanted, **wanted}
                return index
            self.mentions.append(_Mention(start, index, "", wanted, number))
            return index
        named = start < index and noun.isalpha() and not self.is_known(noun)
        if named and self.word(index - 1) not in ("of", "them"):
            self.claim("object", False, start, index + 1)
            return index + 1
        return index if index > start else None

    def read_adjectives(self, index: int) -> tuple[int, dict[str, str], bool]:
        """The index after the attributes, the attributes, and whether two contradict each other."""
        start = index
        wanted: dict[str, str] = {}
        clash = False
        while True:
            if self.word(index) in _WORDS:
                key, value = _WORDS[self.word(index)]
                clash |= wanted.get(key, value) != value
                wanted[key] = value
                index += 1
            elif (
                start < index
                and self.word(index) in ("and", ",")
                and self.word(index + 1) in _WORDS
                and self.word(index - 1) in _WORDS
            ):
                index += 1
            else:
                return index, wanted, clash

    def number_of_all(self) -> int | None:
        """The number in `all of the three shapes are red hearts`: three."""
        before = self.mentions[-1] if self.mentions else None
        every = before and {"all", "both"} & set(self.words[: before.end])
        return before.number if before and every else None

    def read_predicate(self, mention: _Mention, index: int) -> int:
        end = index
        if self.word(end) in ("that", "which"):
            end += 1
        if self.word(end) not in ("is", "are"):
            return index
        end += 1
        attributes: dict[str, str] = {}
        while self.word(end) in _WORDS or (
            attributes and self.word(end) in ("and", ",") and self.word(end + 1) in _WORDS
        ):
            if self.word(end) in _WORDS:
                key, value = _WORDS[self.word(end)]
                if mention.wanted.get(key, value) != value:
                    self.claim("colour" if key == "colour" else "object", False, mention.start, end)
                attributes[key] = value
            end += 1
        if not attributes or self.word(end) in _NOUNS:  # `is red` but not `is red squares`
            return index
        mention.wanted.update(attributes)
        mention.end = end
        return end

    def is_known(self, word: str) -> bool:
        return (
            word in _NEUTRAL or word in _NOUNS or word in _RELATIONS or word in _ROWS
            or word in _COLUMNS or word in _MIDDLES or word in _VERBS or word in _COUNTS
            or word in _ARTICLES or word in ("that", "which", "or", "but", "while", "it", "very")
        )  # fmt: skip

    def judge(self, mention: _Mention) -> None:
        wanted = mention.wanted
        span = (mention.start, mention.end)
        if wanted.get("shape") == "background":
            pattern, tone = wanted.get("texture"), wanted.get("tone")
            truth = self.scene["background"]
            if pattern is not None:
                self.claim("background", pattern == truth["pattern"], *span)
            if tone is not None:
                self.claim("background", tone == truth["tone"], *span)
            if "colour" in wanted or "size" in wanted:  # backgrounds are grey and have no size
                self.claim("background", False, *span)
            return
        if "tone" in wanted:  # no object is light or dark
            self.claim("colour", False, *span)
        wanted.pop("tone", None)
        if mention.number == 0:
            self.claim("count", not matching(self.scene, wanted), *span)
            return
        narrowed: dict[str, str] = {}
        for key, kind in (
            ("shape", "object"), ("colour", "colour"), ("size", "size"), ("texture", "texture"),
        ):  # fmt: skip
            if key in wanted:
                narrowed[key] = wanted[key]
                self.claim(kind, bool(matching(self.scene, narrowed)), *span)
        if mention.number is not None:
            self.claim("count", len(matching(self.scene, wanted)) == mention.number, *span)
        elif mention.plural:
            self.claim("count", len(matching(self.scene, wanted)) >= mention.least, *span)

    def judge_repeated(self) -> None:
        """`a red circle and a red circle` claims two red circles."""
        named: list[_Mention] = []
        for mention in self.things():
            if mention.number is None and "shape" in mention.wanted and not mention.definite:
                named.append(mention)
                same = [m for m in named if m.wanted == mention.wanted]
                if len(same) > 1:
                    true = len(matching(self.scene, mention.wanted)) >= len(same)
                    self.claim("count", true, same[0].start, mention.end)

    def things(self) -> list[_Mention]:
        return [m for m in self.mentions if m.wanted.get("shape") != "background"]

    def judge_phrase(self, phrase: _Phrase, subject: _Mention | None) -> _Mention | None:
        """Judges a relation or position; returns its subject, for `... and above ...`."""
        before = [m for m in self.things() if m.start < phrase.start]
        after = [m for m in self.things() if m.start >= phrase.end]
        follows = after and all(
            w in _VERBS or w in ",." for w in self.words[phrase.end : after[0].start]
        )
        if phrase.relation is None:
            verb = follows and after[0].start > phrase.end and self.word(phrase.end) in _VERBS
            # `... on the left and on the right a square`: the previous object has its position.
            taken = follows and before and any(p.subject is before[-1] for p in self.phrases)
            turned = verb or not before or taken
            subject = phrase.subject = (after[0] if after else None) if turned else before[-1]
            self.claim("position", bool(subject) and self.is_at(subject, phrase), phrase.start,
                       phrase.end)  # fmt: skip
            return subject
        first = second = None
        if self.word(phrase.end) == "it" or self.word(phrase.start - 1) == "its":
            if len(before) > 1:
                first, second = before[-1], before[-2]
        elif after:
            second = after[0]
            opening = phrase.start
            while self.word(opening - 1) in ("to", "the", "on", "directly", "just"):
                opening -= 1
            between = self.words[second.end : after[1].start] if len(after) > 1 else [""]
            stops = ("", ".", ",", ";", "and", "while", "with")
            turned = all(w in _VERBS for w in between) and self.word(opening - 1) in stops
            if turned:
                first = after[1]
            elif before and self.word(opening - 1) in ("and", ",") and subject is not None:
                first = subject
            elif before:
                first = before[-1]
        true = False
        if first is not None and second is not None:
            such = [
                (a, b)
                for a in matching(self.scene, first.wanted)
                for b in matching(self.scene, second.wanted)
                if stands(a, phrase.relation, b, self.scene)
            ]
            firsts, seconds = ({id(pair[side]) for pair in such} for side in (0, 1))
            true = len(firsts) >= first.least and len(seconds) >= second.least and bool(such)
        start = min([phrase.start, *(m.start for m in (first, second) if m)])
        end = max([phrase.end, *(m.end for m in (first, second) if m)])
        self.claim("relation", true, start, end)
        return first

    def is_at(self, mention: _Mention | None, phrase: _Phrase) -> bool:
        if mention is None:
            return False
        middle = phrase.row is None and phrase.column is None
        count = 0
        for item in matching(self.scene, mention.wanted):
            row, column = place(item, self.scene)
            if middle:
                count += row == column == "middle"
            else:
                count += phrase.row in (None, row) and phrase.column in (None, column)
        return count >= max(1, mention.least)
