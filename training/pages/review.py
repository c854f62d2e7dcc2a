"""A blind sheet on which people rate captions.

Under each photo are the captions of several systems (files in COCO's result format, as written by
`make evaluate`) and one human caption, in random order and without names. The page works offline
and saves the ratings as a JSON file. The key, which assigns captions to systems, is a separate
file, and the page contains nothing from which it could be derived: all captions are in lower case
without a full stop, equal captions are shown once, and neither the seed nor a reversible order is
stored.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.errors import UserError
from handler.files import read_object
from handler.web.page import page, photo
from training.data.manifest import Manifest, Row
from training.data.photos import read_photo
from training.scores.captions import evaluated_name, read_predictions
from training.scores.ratings import HUMAN, SCALE

HERE = Path(__file__).parent
PHOTO_SIDE = 400


@dataclass(frozen=True)
class Item:
    """A photo of the sheet: its captions in the order on the sheet, each with the systems that
    wrote it, and the index of the reference that is the human caption."""

    row: Row
    captions: list[tuple[str, list[str]]]
    human: int


def plain(caption: str) -> str:
    """A caption as the sheet shows it, so that its spelling does not reveal its system."""
    return re.sub(r"\s+", " ", caption).strip().rstrip(" .").lower()


def make_items(
    systems: Mapping[str, Mapping[str, str]], rows: Sequence[Row], photos: int, seed: int
) -> list[Item]:
    """Chooses `photos` rows and shuffles their captions; the same seed gives the same sheet. Raises
    UserError naming system and photo if a caption is missing."""
    rng = random.Random(seed)
    chosen = rng.sample(list(rows), min(photos, len(rows)))
    items = []
    for row in chosen:
        human = rng.randrange(len(row.captions))
        written = {HUMAN: row.captions[human]}
        for name, predictions in systems.items():
            if row.id not in predictions:
                raise UserError(f"system {name!r}: no caption for photo {row.id!r} of the split")
            written[name] = predictions[row.id]
        by_text: dict[str, list[str]] = {}
        for name, caption in written.items():
            by_text.setdefault(plain(caption), []).append(name)
        captions = list(by_text.items())
        rng.shuffle(captions)
        items.append(Item(row, captions, human))
    return items


def sheet_id(items: Sequence[Item]) -> str:
    """The id of the sheet: a hash of its content."""
    shown = [(item.row.id, [text for text, _ in item.captions]) for item in items]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def key_of(items: Sequence[Item], manifest: Manifest, split: str) -> dict[str, Any]:
    """The key: what the scores need and the raters must not see."""
    return {
        "sheet": sheet_id(items),
        "data": manifest.name,
        "split": split,
        "items": [
            {
                "photo": item.row.id,
                "captions": [{"text": text, "systems": names} for text, names in item.captions],
                # Automatic metrics compare with the other references.
                "references": [
                    caption for n, caption in enumerate(item.row.captions) if n != item.human
                ],
            }
            for item in items
        ],
    }


def render(items: Sequence[Item], manifest: Manifest) -> str:
    """The sheet as HTML: one photo at a time, a five-point scale for each caption."""
    shown = []
    for number, item in enumerate(items):
        image = photo(read_photo(manifest, item.row), PHOTO_SIDE, f"Photo {number + 1}")
        shown.append((image, [text for text, _ in item.captions]))
    return page(
        HERE / "templates" / "review.html",
        [HERE / "review.css"],
        [HERE / "review.js"],
        title="Captions to rate",
        sheet=sheet_id(items),
        scale=SCALE,
        items=shown,
    )


def read_systems(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Predictions by the name of their system (see `name_of`). If two evaluations of one system
    differ in their options, the folder is appended to the name."""
    names = [name_of(path) for path in paths]
    systems: dict[str, dict[str, str]] = {}
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1 and path.name == "predictions.json":
            name = f"{name}/{path.resolve().parent.name}"
        if name in systems or name == HUMAN:
            raise UserError(f"{path}: a second system has the name {name!r}; rename the file")
        systems[name] = read_predictions(path)
    return systems


def name_of(path: Path) -> str:
    """The name of a system: NAME for build/evaluate/NAME/DATA-SPLIT/predictions.json, the name of
    the folder for any other predictions.json, and otherwise the name of the file."""
    if path.name != "predictions.json":
        return path.stem
    folder = path.resolve().parent
    metrics = folder / "metrics.json"
    scores = read_object(metrics) if metrics.exists() else {}
    evaluated = evaluated_name(str(scores.get("data")), str(scores.get("split")))
    return folder.parent.name if folder.name.startswith(evaluated) else folder.name
