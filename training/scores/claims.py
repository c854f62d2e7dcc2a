"""Scores of captions of drawn scenes, whose ground truth is known."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from training.data.manifest import Row
from training.data.scenes import check


def score_claims(predictions: Mapping[str, str], rows: Sequence[Row]) -> dict[str, float]:
    """The share of claims that are true for the picture, in total and by kind; the share of
    captions that make at least one claim and only true ones; and the number of claims relative to
    that of a reference, in total and by kind: captions that say little are easily true."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    of_references: dict[str, float] = defaultdict(float)
    entirely = []
    for row in rows:
        scene = row.scene or {}
        claims = check(predictions[row.id], scene)
        entirely.append(bool(claims) and all(claim.true for claim in claims))
        for claim in claims:
            by_kind[claim.kind].append(claim.true)
        for reference in row.captions:
            for claim in check(reference, scene):
                of_references[claim.kind] += 1 / len(row.captions)
    every = [true for kind in by_kind.values() for true in kind]
    result = {"claims_true": sum(every) / max(1, len(every))}
    result |= {f"claims_true_{k}": sum(v) / len(v) for k, v in sorted(by_kind.items())}
    result["captions_true"] = sum(entirely) / max(1, len(entirely))
    if total := sum(of_references.values()):
        result["claims_per_reference"] = len(every) / total
    result |= {
        f"claims_per_reference_{kind}": len(by_kind[kind]) / count
        for kind, count in sorted(of_references.items())
    }
    return result
