"""Agreement of raters and of measures: Krippendorff's alpha and rank correlations, in numpy.

Alpha as in Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": 1 less observed over
expected disagreement, from the coincidences of values within units. Units with fewer than two
ratings say nothing; missing ratings are allowed. Spearman's rho is Pearson's correlation of average
ranks, Kendall's tau-b counts concordant pairs with ties (Kendall 1945).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["ordinal", "interval"]


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "ordinal") -> float:
    """Alpha of the ratings of each unit, in any order; nan where no two ratings can be compared,
    or all are the same."""
    compared = [unit for unit in units if len(unit) >= 2]
    values = sorted({value for unit in compared for value in unit})
    place = {value: number for number, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in compared:
        for i, first in enumerate(unit):
            for j, second in enumerate(unit):
                if i != j:
                    coincidences[place[first], place[second]] += 1 / (len(unit) - 1)
    totals = coincidences.sum(1)
    distance = _distances(np.array(values), totals, level)
    expected = (np.outer(totals, totals) * distance).sum() / max(1.0, totals.sum() - 1)
    if not expected:
        return math.nan
    return float(1 - (coincidences * distance).sum() / expected)


def _distances(values: Floats, totals: Floats, level: Level) -> Floats:
    """Squared differences of values, (V, V)."""
    if level == "interval":
        return (values[:, None] - values[None, :]) ** 2
    # Ordinal: how many ratings lie between two values, half of their own included.
    below = np.cumsum(totals) - totals / 2
    return (below[:, None] - below[None, :]) ** 2


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, ties by their average."""
    given = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(given, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rho; nan where one side does not vary."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size else math.nan


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's tau-b; nan where one side does not vary."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    signs_a, signs_b = (np.sign(x[:, None] - x[None, :]) for x in (a, b))
    size = math.sqrt(float((signs_a**2).sum() * (signs_b**2).sum()))
    return float((signs_a * signs_b).sum() / size) if size else math.nan
