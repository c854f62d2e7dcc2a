"""Bootstrap intervals: exact on the sample itself, of the known width, paired."""

import numpy as np
import pytest

from training.intervals import bleu, bleu_counts, bootstrap_scores, interval, resampled
from training.metrics import score_tokens, tokenize

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
