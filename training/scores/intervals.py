"""Confidence intervals of scores: percentile bootstrap over photos (Efron 1979; for BLEU and for
differences of two systems on the same photos, Koehn 2004).

BLEU is recomputed on every resample from its n-gram counts. The other scores are means of the
scores of the photos. METEOR's corpus score is close but not equal to this mean, so its interval is
shifted to the corpus score. CIDEr's document frequencies are those of all photos.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.scores.metrics import DEFAULT_METRICS, Tokens, check_metrics, score_tokens, tokenize

RESAMPLES = 1000
CONFIDENCE = 0.95
BLEU = tuple(f"BLEU-{n}" for n in range(1, 5))
# Constants of pycocoevalcap against division by zero.
TINY, SMALL = 1e-15, 1e-9

Floats = NDArray[np.float64]
# The most that a metric can be; the others end at 1.
HIGHEST = {"CIDEr": 10.0}


def resampled(photos: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each photo is drawn in each resample, (RESAMPLES, photos). All systems have the
    same resamples, so that the differences of two systems are paired."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(photos, np.full(photos, 1 / photos), size=RESAMPLES).astype(np.float64)


def score_with_intervals(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> dict[str, Any]:
    """As `training.scores.metrics.score`, with [low, high] of each score in "intervals"."""
    check_metrics(metrics)
    tokens = tokenize(predictions, references)
    scores, each = score_tokens(tokens, metrics)
    found = bootstrap_scores(tokens, scores, each)
    return {**scores, "intervals": {n: list(interval_of_score(n, v)) for n, v in found.items()}}


def bootstrap_scores(
    tokens: Tokens, scores: Mapping[str, Any], each: Mapping[str, Mapping[str, float]]
) -> dict[str, Floats]:
    """Each score of `score_tokens` on every resample, (RESAMPLES,)."""
    ids = list(tokens.hypotheses)
    draws_RN = resampled(len(ids))
    found: dict[str, Floats] = {}
    if BLEU[0] in scores:
        found |= dict(zip(BLEU, bleu(draws_RN, bleu_counts(tokens)), strict=True))
    for name, score in scores.items():
        if isinstance(score, float) and name not in found and name in each[ids[0]]:
            own_N = np.array([each[i][name] for i in ids])
            # The corpus score need not be the mean of the scores of the photos.
            found[name] = draws_RN @ own_N / len(ids) + (score - own_N.mean())
    return found


def interval(values: Floats) -> tuple[float, float]:
    """The interval that contains the middle CONFIDENCE of the resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval_of_score(name: str, values: Floats) -> tuple[float, float]:
    """As `interval`, clipped to the range of the metric, which shifted resamples may exceed.
    Differences of two systems are computed from unclipped resamples."""
    low, high = np.clip(interval(values), 0, HIGHEST.get(name, 1.0))
    return float(low), float(high)


def bleu_counts(tokens: Tokens) -> Floats:
    """(photos, 10): matching and generated n-grams of 1 to 4 words, the length of the caption and
    that of the closest reference."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for key, [hypothesis] in tokens.hypotheses.items():
        counts = cook_test(hypothesis, cook_refs(tokens.truths[key]), eff="closest")
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]])
    return np.array(rows, dtype=np.float64)


def bleu(draws_RN: Floats, counts_NC: Floats) -> Sequence[Floats]:
    """Corpus BLEU-1 to BLEU-4 of each resample, as pycocoevalcap computes them."""
    totals_RC = draws_RN @ counts_NC
    correct_R4, guess_R4 = totals_RC[:, :4], totals_RC[:, 4:8]
    precision_R4 = (correct_R4 + TINY) / (guess_R4 + SMALL)
    length_R = (totals_RC[:, 8] + TINY) / (totals_RC[:, 9] + SMALL)
    brevity_R = np.where(length_R < 1, np.exp(1 - 1 / np.maximum(length_R, SMALL)), 1.0)
    return [np.exp(np.log(precision_R4[:, : n + 1]).mean(1)) * brevity_R for n in range(len(BLEU))]
