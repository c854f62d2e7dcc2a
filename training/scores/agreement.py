"""Agreement of raters and of metrics: Krippendorff's alpha and rank correlations, in numpy.

Alpha is 1 minus the ratio of observed to expected disagreement, computed from the coincidences of
values within units (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"). Units with
fewer than two ratings are ignored; missing ratings are allowed. Spearman's rho is Pearson's
correlation of average ranks. Kendall's tau-b counts concordant pairs and corrects for ties (Kendall
1945).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["ordinal", "interval"]


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "ordinal") -> float:
    """Alpha of the ratings of each unit, in any order; nan if no two ratings can be compared, or if
    all are equal."""
    compared = [unit for unit in units if len(unit) >= 2]
    values = sorted({value for unit in compared for value in unit})
    index = {value: number for number, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in compared:
        for i, first in enumerate(unit):
            for j, second in enumerate(unit):
                if i != j:
                    coincidences[index[first], index[second]] += 1 / (len(unit) - 1)
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
    # Ordinal: the number of ratings between two values, including half of those at either value.
    below = np.cumsum(totals) - totals / 2
    return (below[:, None] - below[None, :]) ** 2


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; ties get their average rank."""
    numbers = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rho; nan if one side is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size else math.nan


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's tau-b; nan if one side is constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    signs_a, signs_b = (np.sign(x[:, None] - x[None, :]) for x in (a, b))
    size = math.sqrt(float((signs_a**2).sum() * (signs_b**2).sum()))
    return float((signs_a * signs_b).sum() / size) if size else math.nan
