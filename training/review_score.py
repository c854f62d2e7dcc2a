"""`python -m training.review_score`, behind `make review-score`: what the ratings of a review sheet
say (see `training.scores.ratings`)."""

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import read_object, write_atomic
from training.scores.ratings import (
    HUMAN,
    agreement,
    by_system,
    correlations,
    find_key,
    mean_of,
    preference,
    read_ratings,
)


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
    # Beside key-ID.json, the key of an earlier sheet, scores-ID.json.
    suffix = path.name.removeprefix("key") if path.name.startswith("key") else ".json"
    out = path.with_name(f"scores{suffix}")
    if out.exists() and not {"raters", "systems"} <= read_object(out).keys():
        raise UserError(f"{out}: this file has no scores of a review; move it elsewhere")
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
