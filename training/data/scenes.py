"""`scenes`: pictures that the project draws itself, with captions and the ground truth.

A scene has one to four objects on a noisy background. It tests whether a model generalizes to new
combinations: every validation scene contains a combination that is in no picture and no caption of
the training split, although each of its parts is. This is either a pair of colour and shape
(`HELD_PAIRS`), or two shapes side by side (`HELD_BESIDE`) or one above the other (`HELD_STACKED`),
which in training occur in the other arrangement only. A pair of shapes is held out in both orders,
and therefore in all equivalent wordings ("a left of b", "b right of a"), in pairs of positions ("a
on the left and b on the right"), and in the mirrored picture.

Preset, seed and number determine a scene completely.
"""

import os
import random
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from functools import partial as bind
from itertools import permutations
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from handler.errors import UserError
from training.data.manifest import Row, write_manifest
from training.data.scene_language import (
    COLOURS,
    PATTERNS,
    SHAPES,
    TONES,
    Claim,
    Scene,
    SceneObject,
    check,
    describe,
    stands,
)

__all__ = ["PRESETS", "Claim", "Preset", "check", "generate"]

SIDE = 96  # pixels; a cell of the 2 x 2 grid is half of it
SIDES = {"small": (18, 20), "large": (36, 40)}
JITTER = {"small": 6, "large": 2}
NEAR, CENTRE, FAR = 24, 48, 72

RGB = {
    "red": (220, 25, 30),
    "orange": (250, 135, 15),
    "yellow": (250, 225, 40),
    "green": (25, 150, 50),
    "blue": (30, 70, 225),
    "purple": (120, 30, 170),
    "pink": (255, 140, 200),
    "white": (252, 252, 252),
}

HELD_PAIRS = frozenset(zip(COLOURS, (*SHAPES[3:], *SHAPES[:3]), strict=True))
HELD_BESIDE = {
    frozenset(("circle", "star")),
    frozenset(("square", "heart")),
    frozenset(("triangle", "ring")),
    frozenset(("cross", "diamond")),
}
HELD_STACKED = {
    frozenset(("circle", "cross")),
    frozenset(("square", "star")),
    frozenset(("triangle", "diamond")),
    frozenset(("heart", "ring")),
}


@dataclass(frozen=True)
class Preset:
    """The number of scenes in each split."""

    train: int
    val: int


PRESETS = {"scenes": Preset(train=36000, val=300), "scenes_full": Preset(train=72000, val=500)}


def generate(directory: Path, preset: str, seed: int = 0) -> None:
    """Draws the scenes of a preset into `directory`/images, and then writes the manifest.

    The same preset and seed give the same pictures, captions and ground truth. Raises UserError for
    an unknown preset, and for a directory that cannot be created.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r} of scenes; the presets are {', '.join(PRESETS)}")
    counts = {"train": PRESETS[preset].train, "val": PRESETS[preset].val}
    directory = Path(directory)
    images, partial = directory / "images", directory / ".images.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}; choose a folder that can be written"
        ) from None
    names = [(split, number) for split, count in counts.items() for number in range(count)]
    make = bind(_make_file, partial, seed)
    # Ctrl-C is for this process, which then ends the others.
    ignore = signal.SIGINT, signal.SIG_IGN
    with ProcessPoolExecutor(os.cpu_count(), None, signal.signal, ignore) as pool:
        drawn = pool.map(make, names, chunksize=32)
        rows = list(tqdm(drawn, total=len(names), desc=preset, unit="scene"))
    # Earlier pictures are kept until all new ones are drawn.
    shutil.rmtree(images, ignore_errors=True)
    partial.rename(images)
    write_manifest(directory, preset, rows, images, [], {"seed": seed})


def _make_file(folder: Path, seed: int, name: tuple[str, int]) -> Row:
    row, picture = make_row(seed, *name)
    # Noise hardly compresses without loss.
    picture.save(folder / row.image, quality=92, subsampling=0)
    return row


def make_row(seed: int, split: str, number: int) -> tuple[Row, Image.Image]:
    """A row of a split with its picture (96 x 96 pixels, RGB)."""
    name = f"{split}-{number:05d}"
    rng = random.Random(f"scenes/{seed}/{name}")
    scene = make_scene(rng, split)
    captions = describe(scene, rng)
    return Row(name, f"{name}.jpg", captions, split, scene), draw(scene, rng)


def make_scene(rng: random.Random, split: str) -> Scene:
    """A random scene: with a held-out combination, or for the training split without any."""
    wanted = rng.choice(("pair", "relation"))
    while True:
        scene = _any_scene(rng, wanted if split != "train" else None)
        held = held_out(scene)
        if not held if split == "train" else wanted in held:
            return scene


def held_out(scene: Scene) -> set[str]:
    """The kinds of held-out combinations in a scene: `pair`, `relation`."""
    kinds = set()
    if any((item["colour"], item["shape"]) in HELD_PAIRS for item in scene["objects"]):
        kinds.add("pair")
    for first, second in permutations(scene["objects"], 2):
        shapes = frozenset((first["shape"], second["shape"]))
        if (shapes in HELD_BESIDE and stands(first, "left", second, scene)) or (
            shapes in HELD_STACKED and stands(first, "above", second, scene)
        ):
            kinds.add("relation")
    return kinds


def _any_scene(rng: random.Random, wanted: str | None) -> Scene:
    """A random scene in which the wanted combination is not rare."""
    centres = _centres(rng, 2 if wanted == "relation" else 1)
    objects: list[SceneObject] = []
    for index, (x, y) in enumerate(centres):
        if objects and rng.random() < 0.25:
            # Equal objects, so that there is something to count.
            look = {key: value for key, value in objects[-1].items() if key != "box"}
        else:
            size = rng.choice(("small", "large", "large"))
            # The pattern of a small object would have two or three pixels only.
            textures = ("plain", "striped", "dotted") if size == "large" else ("plain",)
            look = {
                "shape": rng.choice(SHAPES),
                "colour": rng.choice(COLOURS),
                "size": size,
                "texture": rng.choices(textures, (2, 1, 1)[: len(textures)])[0],
            }
        if wanted == "pair" and index == 0:
            look["colour"], look["shape"] = rng.choice(sorted(HELD_PAIRS))
        side = rng.randint(*SIDES[look["size"]])
        reach = JITTER[look["size"]]
        left = x + rng.randint(-reach, reach) - side // 2
        top = y + rng.randint(-reach, reach) - side // 2
        objects.append({**look, "box": [left, top, left + side, top + side]})
    background = {"pattern": rng.choice(PATTERNS), "tone": rng.choice(TONES)}
    return {"size": [SIDE, SIDE], "background": background, "objects": objects}


def _centres(rng: random.Random, least: int) -> list[tuple[int, int]]:
    number = rng.choices(range(least, 5), (25, 45, 20, 10)[least - 1 :])[0]
    across = rng.choice((NEAR, CENTRE, FAR))
    if number == 1:
        return [(across, rng.choice((NEAR, CENTRE, FAR)))]
    corners = [(x, y) for x in (NEAR, FAR) for y in (NEAR, FAR)]
    if number > 2 or rng.random() < 0.1:
        return rng.sample(corners, number)
    pair = [(NEAR, across), (FAR, across)]
    rng.shuffle(pair)
    return pair if rng.random() < 0.5 else [(y, x) for x, y in pair]


# ---------------------------------------------------------------------------------- drawing


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draws a scene: background, objects, noise. `rng` determines shades and noise."""
    noise = np.random.default_rng(rng.getrandbits(64))
    picture = _background(scene["background"], rng)
    for item in scene["objects"]:
        x0, y0, x1, y1 = item["box"]
        side = x1 - x0
        cover = _mask(item["shape"], side)
        shade = _texture(item["texture"], side)
        colour = np.array(RGB[item["colour"]], np.float32) + noise.uniform(-8, 8, 3)
        area = picture[y0:y1, x0:x1]
        area += cover[:, :, None] * (shade[:, :, None] * colour - area)
    picture += noise.normal(0, 5, (SIDE, SIDE, 1)) + noise.normal(0, 3, picture.shape)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def _background(background: dict[str, str], rng: random.Random) -> NDArray[np.float64]:
    level = rng.uniform(155, 180) if background["tone"] == "light" else rng.uniform(48, 70)
    tint = np.array([rng.uniform(-8, 8) for _ in range(3)])
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    if rng.random() < 0.5:
        x, y = y, x
    phase = rng.randrange(24)
    light: NDArray[np.float64]
    if background["pattern"] == "shaded":
        light = (x / (SIDE - 1) - 0.5) * 56 * rng.choice((-1, 1))
    elif background["pattern"] == "striped":
        light = ((x + phase) // 12 % 2 - 0.5) * 28
    elif background["pattern"] == "checked":
        light = (((x + phase) // 12 + (y + phase) // 12) % 2 - 0.5) * 28
    else:
        light = np.zeros((SIDE, SIDE))
    return level + tint + light[:, :, None]


@lru_cache
def _texture(texture: str, side: int) -> NDArray[np.float32]:
    """Brightness of each pixel of an object, (side, side)."""
    y, x = np.mgrid[0:side, 0:side]
    if texture == "striped":
        dark = (x + y) // 5 % 2 == 1
    elif texture == "dotted":
        dark = (x % 10 - 4.5) ** 2 + (y % 10 - 4.5) ** 2 < 9
    else:
        dark = np.zeros((side, side), bool)
    return np.where(dark, np.float32(0.3), np.float32(1.0))


@lru_cache
def _mask(shape: str, side: int) -> NDArray[np.float32]:
    """Coverage of each pixel by a shape, (side, side); the shape touches all four sides."""
    fine = side * 4
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, fine - 1, fine - 1), fill=255)
        if shape == "ring":
            hole = fine * 0.27
            pen.ellipse((hole, hole, fine - 1 - hole, fine - 1 - hole), fill=0)
    else:
        pen.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in _outline(shape)], fill=255)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape, scaled to fill the unit square; y points down."""
    if shape == "square":
        points = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    elif shape == "triangle":
        points = [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    elif shape == "diamond":
        points = [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]
    elif shape == "cross":
        a, b = 0.33, 0.67
        points = [(a, 0.0), (b, 0.0), (b, a), (1.0, a), (1.0, b), (b, b), (b, 1.0), (a, 1.0),
                  (a, b), (0.0, b), (0.0, a), (a, a)]  # fmt: skip
    elif shape == "star":
        radii = (1.0, 0.42) * 5
        points = [(r * sin(pi * i / 5), -r * cos(pi * i / 5)) for i, r in enumerate(radii)]
    else:  # the usual heart curve
        turns = [2 * pi * i / 60 for i in range(60)]
        points = [
            (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16)
            for t in turns
        ]
    xs, ys = zip(*points, strict=True)
    return [
        ((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys)))
        for x, y in points
    ]
