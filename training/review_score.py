"""`python -m training.review_score`, behind `make review-score`: what the ratings of a review sheet
say. Means and preferences of the systems with intervals, agreement between the raters, and how well
each automatic metric follows them.

Intervals are percentile bootstrap over photos: raters see the same photos, and photos are what is
sampled. A preference compares two captions of one photo by one rater; equal ratings are ties.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import write_atomic
from training.review import HUMAN, SCALE
from training.scores.agreement import kendall, krippendorff_alpha, spearman
from training.scores.intervals import interval, resampled
from training.scores.metrics import DEFAULT_METRICS, METRICS, has_spice, score_each

REVIEWS = Path("build/review")


@dataclass(frozen=True)
class Ratings:
    """One rater's file: ratings by the place of their caption, (photo, caption)."""

    rater: str
    given: dict[tuple[int, int], int]


def read_ratings(path: Path) -> tuple[str, Ratings]:
    """The sheet's name and the ratings of a file that the sheet saved."""
    content = _read_json(path)
    try:
        sheet, rater = str(content["sheet"]), str(content["rater"])
        given = {}
        for name, value in content["ratings"].items():
            photo, caption = name.split("-")
            if value not in SCALE or isinstance(value, bool):
                raise ValueError(f"rating {value!r}")
            given[int(photo), int(caption)] = int(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no ratings of a review sheet ({error}); save it again") from error
    if not given:
        raise UserError(f"{path}: it holds no rating")
    return sheet, Ratings(rater, given)


def find_key(sheet: str, key: Path | None) -> tuple[Path, dict[str, Any]]:
    """The key of a sheet, looked for under build/review where none is given."""
    for path in [key] if key else sorted(REVIEWS.glob("*/key.json")):
        content = _read_json(path)
        if content.get("sheet") == sheet:
            return path, content
    where = key or REVIEWS
    raise UserError(f"{where}: no key of sheet {sheet}; name its key.json with KEY=")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content


def by_system(
    key: Mapping[str, Any], ratings: Sequence[Ratings]
) -> dict[str, list[dict[str, int]]]:
    """For each system, each photo's ratings by rater. Raises UserError for a rating of a caption
    that the sheet does not have."""
    items = key["items"]
    found: dict[str, list[dict[str, int]]] = defaultdict(lambda: [{} for _ in items])
    for one in ratings:
        for (photo, caption), value in one.given.items():
            try:
                names = items[photo]["captions"][caption]["systems"]
            except IndexError as error:
                raise UserError(f"ratings of {one.rater}: no caption {photo}-{caption}") from error
            for name in names:
                found[name][photo][one.rater] = value
    return dict(found)


def mean_of(photos: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The mean rating of a system (raters first, then photos) with its interval."""
    own = np.array([np.mean(list(r.values())) if r else math.nan for r in photos])
    rated = own[~np.isnan(own)]
    low, high = interval(resampled(len(rated)) @ rated / len(rated))
    return {"mean": float(rated.mean()), "interval": [low, high], "photos": len(rated)}


def preference(
    first: Sequence[Mapping[str, int]], second: Sequence[Mapping[str, int]]
) -> dict[str, Any] | None:
    """How often the first was rated above the second, with its interval, and how often alike; None
    where nobody rated both."""
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
    """Krippendorff's alpha over the captions as they stood on the sheet."""
    units: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in ratings:
        for place, value in one.given.items():
            units[place].append(value)
    return {
        "ordinal": krippendorff_alpha(list(units.values()), "ordinal"),
        "interval": krippendorff_alpha(list(units.values()), "interval"),
    }


def correlations(key: Mapping[str, Any], ratings: Sequence[Ratings]) -> dict[str, dict[str, float]]:
    """Of the mean rating of each caption with each automatic metric of it, over all captions of all
    systems and the person's; each is compared with the other references of its photo."""
    references, captions, human = {}, {}, {}
    for photo, item in enumerate(key["items"]):
        for place, caption in enumerate(item["captions"]):
            given = [one.given[photo, place] for one in ratings if (photo, place) in one.given]
            if given and item["references"]:
                name = f"{photo}-{place}"
                references[name], captions[name] = item["references"], caption["text"]
                human[name] = float(np.mean(given))
    if len(captions) < 2:
        return {}
    _, each = score_each(captions, references, METRICS if has_spice() else DEFAULT_METRICS)
    rated = [human[name] for name in captions]
    found = {}
    for metric in next(iter(each.values())):
        values = [each[name][metric] for name in captions]
        found[metric] = {"spearman": spearman(rated, values), "kendall": kendall(rated, values)}
    return found


def main() -> None:
    parser = ArgumentParser(prog="training.review_score", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="what the raters saved")
    parser.add_argument("--key", type=Path, help="default: the sheet's own under build/review")
    arguments = parser.parse_args()
    read = [read_ratings(path) for path in arguments.files]
    sheets = {sheet for sheet, _ in read}
    if len(sheets) > 1:
        parser.error(f"the files are of {len(sheets)} different sheets")
    ratings = [one for _, one in read]
    if len({one.rater for one in ratings}) < len(ratings):
        parser.error("two files are of the same rater")
    path, key = find_key(sheets.pop(), arguments.key)

    rated = by_system(key, ratings)
    names = sorted(rated, key=lambda name: (name == HUMAN, name))
    result: dict[str, Any] = {
        "raters": [one.rater for one in ratings],
        "systems": {name: mean_of(rated[name]) for name in names},
        "preferences": [
            {"first": a, "second": b, **found}
            for a, b in combinations(names, 2)
            if (found := preference(rated[a], rated[b])) is not None
        ],
        "alpha": agreement(ratings),
        "correlations": correlations(key, ratings),
    }
    out = path.with_name("scores.json")
    text = json.dumps(_without_nan(result), ensure_ascii=False, indent=1)
    write_atomic(out, text + "\n")
    print_result(result)
    print(f"{out}: the same as JSON")


def _without_nan(value: Any) -> Any:
    """null for what is not defined: JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_result(result: Mapping[str, Any]) -> None:
    for name, found in result["systems"].items():
        low, high = found["interval"]
        print(f"{name:24} {found['mean']:.2f}  ({low:.2f} to {high:.2f}, {found['photos']} photos)")
    for found in result["preferences"]:
        low, high = found["interval"]
        print(
            f"{found['first']} over {found['second']}: {found['preferred']:.0%} "
            f"({low:.0%} to {high:.0%}), alike {found['ties']:.0%}, {found['pairs']} pairs"
        )
    alpha = result["alpha"]
    print(
        f"{len(result['raters'])} raters, Krippendorff's alpha "
        f"{alpha['ordinal']:.3f} (ordinal), {alpha['interval']:.3f} (interval)"
    )
    for metric, found in result["correlations"].items():
        print(f"{metric:24} rho {found['spearman']:+.2f}  tau {found['kendall']:+.2f}")


if __name__ == "__main__":
    run_command(main)
