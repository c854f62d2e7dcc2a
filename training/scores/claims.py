"""Scores of captions of drawn scenes, whose ground truth is known."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from training.data.manifest import Row
from training.data.scenes import check


def score_claims(predictions: Mapping[str, str], rows: Sequence[Row]) -> dict[str, float]:
    """The share of claims that are true for the picture, in total and by kind, and the share of
    captions that make at least one claim and only true ones."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    entirely = []
    for row in rows:
        claims = check(predictions[row.id], row.scene or {})
        entirely.append(bool(claims) and all(claim.true for claim in claims))
        for claim in claims:
            by_kind[claim.kind].append(claim.true)
    every = [true for kind in by_kind.values() for true in kind]
    result = {"claims_true": sum(every) / max(1, len(every))}
    result |= {f"claims_true_{k}": sum(v) / len(v) for k, v in sorted(by_kind.items())}
    result["captions_true"] = sum(entirely) / max(1, len(entirely))
    return result
