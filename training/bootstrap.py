"""How far a score could be off because these photos were scored and not others: 95 % intervals from
resampled photos (Efron 1979; for BLEU, Koehn 2004: "Statistical significance tests for machine
translation evaluation").

Dimension key: N photos, R resamples.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
# pycocoevalcap's, against division by zero.
TINY, SMALL = 1e-15, 1e-9


def resampled(photos: int) -> np.ndarray:
    """How often each photo is drawn, (R, N); the same on every call."""
    shares = np.full(photos, 1 / photos)
    return np.random.default_rng(0).multinomial(photos, shares, size=RESAMPLES)


def interval(total: float, samples_R: np.ndarray) -> list[float]:
    """[low, high] around the corpus score `total`, which need not be the mean of the samples."""
    low, high = np.quantile(samples_R, (0.025, 0.975)) - samples_R.mean()
    return [float(total + low), float(total + high)]


def mean_interval(total: float, values: Sequence[float]) -> list[float]:
    """Of a score that is a mean over photos (METEOR is nearly one)."""
    return interval(total, resampled(len(values)) @ np.array(values) / len(values))


def bleu_intervals(
    totals: Sequence[float],
    correct: Sequence[Sequence[int]],
    guessed: Sequence[Sequence[int]],
    lengths: Sequence[int],
    true_lengths: Sequence[int],
) -> list[list[float]]:
    """Of corpus BLEU-1, -2 and so on, which are made of sums over photos: `correct` and `guessed`
    n-grams [photo][n - 1], words of the caption and of the reference closest in length."""
    drawn_RN = resampled(len(lengths))
    correct_R4 = drawn_RN @ np.array(correct)
    guessed_R4 = drawn_RN @ np.array(guessed)
    ratio_R = (drawn_RN @ np.array(lengths) + TINY) / (drawn_RN @ np.array(true_lengths) + SMALL)
    brevity_R = np.exp(np.minimum(0, 1 - 1 / ratio_R))
    precisions_R4 = np.cumprod((correct_R4 + TINY) / (guessed_R4 + SMALL), axis=1)
    return [
        interval(total, brevity_R * precisions_R4[:, n] ** (1 / (n + 1)))
        for n, total in enumerate(totals)
    ]
