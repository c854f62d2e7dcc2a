"""Bootstrap intervals: exact on the sample itself, of the known width, paired."""

import random

import numpy as np
import pytest

from training.scores.intervals import (
    bleu,
    bleu_counts,
    bootstrap_scores,
    interval,
    interval_of_score,
    resampled,
    score_with_intervals,
)
from training.scores.metrics import Tokens, score, score_tokens, tokenize

CAPTIONS = {
    "1": "a dog runs across the green grass",
    "2": "two men play football on the field",
    "3": "a woman",
    "4": "the red ball lies under a wooden table in the room",
}
REFERENCES = {
    "1": ["a brown dog runs across the grass", "a dog is running"],
    "2": ["two men play with a ball on a field", "men play football"],
    "3": ["a woman in a blue dress walks down the street", "a lady is walking"],
    "4": ["a red ball under a table", "the red ball lies under a table in the room"],
}


def test_the_whole_sample_gives_pycocoevalcaps_bleu():
    tokens = tokenize(CAPTIONS, REFERENCES)
    scores, _ = score_tokens(tokens, ("bleu",))
    once = np.ones((1, len(CAPTIONS)))
    for n, values in enumerate(bleu(once, bleu_counts(tokens)), start=1):
        assert values[0] == pytest.approx(scores[f"BLEU-{n}"], rel=1e-6)


def test_a_sample_that_is_too_short_is_punished_as_there():
    short = {key: " ".join(text.split()[:3]) for key, text in CAPTIONS.items()}
    tokens = tokenize(short, REFERENCES)
    scores, _ = score_tokens(tokens, ("bleu",))
    values = bleu(np.ones((1, len(short))), bleu_counts(tokens))
    assert values[1][0] == pytest.approx(scores["BLEU-2"], rel=1e-6)


def test_intervals_hold_the_score():
    tokens = tokenize(CAPTIONS, REFERENCES)
    scores, each = score_tokens(tokens, ("bleu", "rouge", "cider"))
    found = bootstrap_scores(tokens, scores, each)
    assert set(found) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    for name, values in found.items():
        low, high = interval(values)
        assert low < scores[name] < high


def test_the_width_is_that_of_the_mean():
    """1,000 photos with scores of deviation 1: 95 % within 1.96 / sqrt(1000)."""
    own = np.random.default_rng(1).normal(size=1000)
    low, high = interval(resampled(1000) @ own / 1000)
    assert (high - low) / 2 == pytest.approx(1.96 * own.std() / 1000**0.5, rel=0.1)


def test_draws_are_the_same_for_every_system():
    assert np.array_equal(resampled(7), resampled(7))
    assert (resampled(7).sum(1) == 7).all()


def test_corpus_bleu_is_scored_again_on_resampled_photos(monkeypatch):
    """As wide as the spread of pycocoevalcap's scores of some resamples (on plain words: Java would
    be started for each)."""
    monkeypatch.setattr("training.scores.metrics.find_java", lambda: None)
    chooser = random.Random(2)
    words = ("a", "dog", "cat", "man", "runs", "sits", "on", "the", "grass")
    texts = [" ".join(chooser.choices(words, k=chooser.randrange(3, 12))) for _ in range(120)]
    predictions = {str(n): texts[n] for n in range(40)}
    references = {str(n): texts[40 + 2 * n : 42 + 2 * n] for n in range(40)}
    result = score_with_intervals(predictions, references, ("bleu",))
    scores = []
    for counts in resampled(40)[:60].astype(int):
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


def eight_photos(meteor: float, cider: float) -> dict[str, np.ndarray]:
    tokens = Tokens("ptb", {str(n): ["a"] for n in range(8)}, {str(n): ["a"] for n in range(8)})
    each = {str(n): {"METEOR": 0.9 * (n == 0), "CIDEr": 10.0 * (n < 7)} for n in range(8)}
    return bootstrap_scores(tokens, {"METEOR": meteor, "CIDEr": cider}, each)


def test_intervals_stay_within_what_a_metric_can_be():
    """METEOR's interval on eight photos began at -0.007."""
    found = eight_photos(meteor=0.02, cider=9.9)
    assert interval(found["METEOR"])[0] < 0 and interval(found["CIDEr"])[1] > 10
    low, high = interval_of_score("METEOR", found["METEOR"])
    assert low == 0 and high == interval(found["METEOR"])[1]
    low, high = interval_of_score("CIDEr", found["CIDEr"])
    assert low == interval(found["CIDEr"])[0] and high == 10


def test_differences_are_of_resamples_that_nothing_has_cut():
    """Resamples were cut at 0 before they were subtracted, and the interval of a difference that is
    the same on every resample had a width."""
    first, second = eight_photos(0.02, 9.9), eight_photos(0.12, 9.95)
    for name, difference in (("METEOR", 0.1), ("CIDEr", 0.05)):
        assert interval(second[name] - first[name]) == pytest.approx((difference, difference))
