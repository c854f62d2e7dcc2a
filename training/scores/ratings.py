"""Evaluates the ratings of a review sheet: means and preferences of the systems with intervals,
agreement between the raters, and the correlation of each automatic metric with the ratings.

Intervals are percentile bootstrap over photos, because photos are what is sampled; all raters see
the same ones. A preference compares the ratings of two captions of one photo by one rater; equal
ratings are ties.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handler.errors import UserError
from handler.files import read_object
from training.scores.agreement import kendall, krippendorff_alpha, spearman
from training.scores.intervals import interval, resampled
from training.scores.metrics import DEFAULT_METRICS, METRICS, has_spice, score_each

REVIEWS = Path("build/review")
HUMAN = "human"
# Five points, as in most published caption ratings.
SCALE = {
    1: "wrong: it describes another picture",
    2: "mostly wrong",
    3: "half right, or much is missing",
    4: "right, with a small slip or gap",
    5: "right: a person could have written it",
}


@dataclass(frozen=True)
class Ratings:
    """The file of one rater: ratings by (photo, caption), indices on the sheet."""

    rater: str
    given: dict[tuple[int, int], int]


def read_ratings(path: Path) -> tuple[str, Ratings]:
    """Reads a file that the sheet saved: the id of the sheet, and the ratings."""
    content = read_object(path)
    try:
        sheet, rater = str(content["sheet"]), str(content["rater"])
        given = {}
        for name, value in content["ratings"].items():
            photo, caption = name.split("-")
            if value not in SCALE or isinstance(value, bool):
                raise ValueError(f"rating {value!r}")
            given[int(photo), int(caption)] = int(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a file of ratings ({error}); save it again") from error
    if not given:
        raise UserError(f"{path}: contains no ratings")
    return sheet, Ratings(rater, given)


def find_key(sheet: str, key: Path | None) -> tuple[Path, dict[str, Any]]:
    """The key of a sheet: `key` or, for an earlier sheet, a file beside it; without `key`, any file
    under build/review."""
    beside = sorted(key.parent.glob("key-*.json")) if key else sorted(REVIEWS.glob("*/key*.json"))
    for path in [key, *beside] if key else beside:
        try:
            content = read_object(path)
        except UserError:
            if path == key:
                raise
            continue  # a damaged key of another sheet
        if content.get("sheet") == sheet:
            return path, content
    where = key or REVIEWS
    raise UserError(f"{where}: no key of sheet {sheet}; set KEY= to its key.json")


def by_system(
    key: Mapping[str, Any], ratings: Sequence[Ratings]
) -> dict[str, list[dict[str, int]]]:
    """For each system, the ratings of each photo by rater. Raises UserError for a rating of a
    caption that is not on the sheet."""
    items = key["items"]
    rated: dict[str, list[dict[str, int]]] = defaultdict(lambda: [{} for _ in items])
    for one in ratings:
        for (photo, caption), value in one.given.items():
            try:
                names = items[photo]["captions"][caption]["systems"]
            except IndexError as error:
                raise UserError(f"ratings of {one.rater}: no caption {photo}-{caption}") from error
            for name in names:
                rated[name][photo][one.rater] = value
    return dict(rated)


def mean_of(photos: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The mean rating of a system (raters first, then photos) with its interval."""
    own = np.array([np.mean(list(r.values())) if r else math.nan for r in photos])
    rated = own[~np.isnan(own)]
    low, high = interval(resampled(len(rated)) @ rated / len(rated))
    return {"mean": float(rated.mean()), "interval": [low, high], "photos": len(rated)}


def preference(
    first: Sequence[Mapping[str, int]], second: Sequence[Mapping[str, int]]
) -> dict[str, Any] | None:
    """The share of ratings in which the first is above the second, with its interval, and the share
    of ties; None if no rater rated both."""
    counts = []
    for a, b in zip(first, second, strict=True):
        both = a.keys() & b.keys()
        wins, ties = sum(a[r] > b[r] for r in both), sum(a[r] == b[r] for r in both)
        if both:
            counts.append([wins, ties, len(both)])
    if not counts:
        return None
    counts_N3 = np.array(counts, dtype=np.float64)
    wins, ties, number = counts_N3.sum(0)
    wins_R, _, number_R = (resampled(len(counts)) @ counts_N3).T
    return {
        "preferred": float(wins / number),
        "interval": list(interval(wins_R / number_R)),
        "ties": float(ties / number),
        "pairs": int(number),
    }


def agreement(ratings: Sequence[Ratings]) -> dict[str, float]:
    """Krippendorff's alpha over the captions on the sheet."""
    units: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in ratings:
        for location, value in one.given.items():
            units[location].append(value)
    return {
        "ordinal": krippendorff_alpha(list(units.values()), "ordinal"),
        "interval": krippendorff_alpha(list(units.values()), "interval"),
    }


def correlations(key: Mapping[str, Any], ratings: Sequence[Ratings]) -> dict[str, dict[str, float]]:
    """Correlations of each automatic metric with the mean rating, over the captions of all systems
    and of the human. Each caption is scored against the other references of its photo."""
    references, captions, human = {}, {}, {}
    for photo, item in enumerate(key["items"]):
        for index, caption in enumerate(item["captions"]):
            values = [one.given[photo, index] for one in ratings if (photo, index) in one.given]
            if values and item["references"]:
                name = f"{photo}-{index}"
                references[name], captions[name] = item["references"], caption["text"]
                human[name] = float(np.mean(values))
    if len(captions) < 2:
        return {}
    _, each = score_each(captions, references, METRICS if has_spice() else DEFAULT_METRICS)
    rated = [human[name] for name in captions]
    result = {}
    for metric in next(iter(each.values())):
        scores = [each[name][metric] for name in captions]
        result[metric] = {"spearman": spearman(rated, scores), "kendall": kendall(rated, scores)}
    return result
