"""The intervals are those of scores of resampled photos, and are as wide as they should be."""

import random

import numpy as np
import pytest

from training.bootstrap import mean_interval, resampled
from training.metrics import score


def test_a_mean_is_off_by_twice_its_standard_error():
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = mean_interval(values.mean(), values)
    error = values.std() / np.sqrt(400)
    # The ends of an interval from 1,000 resamples are themselves off by a tenth of this.
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    # METEOR's corpus score is no mean; its interval lies around it all the same.
    assert mean_interval(values.mean() + 1, values) == pytest.approx([low + 1, high + 1])


def test_corpus_bleu_is_scored_again_on_resampled_photos(monkeypatch):
    """As wide as the spread of pycocoevalcap's scores of some resamples (on plain words: Java would
    be started for each)."""
    monkeypatch.setattr("training.metrics.find_java", lambda: None)
    chooser = random.Random(2)
    words = ("a", "dog", "cat", "man", "runs", "sits", "on", "the", "grass")
    texts = [" ".join(chooser.choices(words, k=chooser.randrange(3, 12))) for _ in range(120)]
    predictions = {str(n): texts[n] for n in range(40)}
    references = {str(n): texts[40 + 2 * n : 42 + 2 * n] for n in range(40)}
    result = score(predictions, references, ("bleu",))
    scores = []
    for counts in resampled(40)[:60]:
        drawn = [(str(n), copy) for n, times in enumerate(counts) for copy in range(times)]
        scores.append(
            score(
                {f"{key} {copy}": predictions[key] for key, copy in drawn},
                {f"{key} {copy}": references[key] for key, copy in drawn},
                ("bleu",),
            )
        )
    for n in (1, 2):
        name = f"BLEU-{n}"
        low, high = result["intervals"][name]
        assert low < result[name] < high
        # 60 resamples of the 1,000: their spread is the whole one's, roughly.
        spread = np.std([s[name] for s in scores])
        assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.3)
