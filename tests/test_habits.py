"""What BLEU and CIDEr hide, on captions counted by hand."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from training.data.manifest import Manifest, Row
from training.loop.validation import validate
from training.pages.report import words_section
from training.pages.system import System
from training.scores.habits import copied, describe, distinct, little_learnt

PREDICTIONS = {
    "1": "A dog runs on the grass.",
    "2": "a dog is on a",
    "3": "a man and a man and a hat",
    "4": "a dog runs on the grass",
    "5": "",
}
REFERENCES = {
    "1": ["a dog runs", "the dog runs fast", "an animal outside"],
    "2": ["a corgi on a sofa", "the corgi sits"],
    "3": ["a man in a fedora"],
    "4": ["a dog", "dogs"],
    "5": ["an okapi", "an okapi"],
}
TRAINING = ["a dog runs on the grass"] * 9 + ["a dog and a man"] * 5 + ["a corgi with a fedora"]


def test_habits_are_counted():
    result = describe(PREDICTIONS, REFERENCES, TRAINING)
    # Punctuation and capitals make no other caption.
    assert result["distinct_captions"] == 4
    assert result["vocabulary"] == 10  # a dog runs on the grass, is, man and hat
    assert result["mean_length"] == (6 + 5 + 8 + 6 + 0) / 5
    assert result["ending_in_function_word"] == 1 / 5
    assert result["repeated_bigrams"] == 1 / 5
    assert result["copied_captions"] == 2 / 5


PEOPLE = [
    *["a young boy in a black shirt is running in the grass", "a black and white dog runs"] * 12,
    *["a white dog and a red ball rolls", "the red one and a black and a white dog"] * 12,
    *["a man wearing red looks at his dog", "a swing in a garden"] * 3,
]


@pytest.mark.parametrize(
    ("caption", "broken"),
    [
        ("A young boy in a black is running in the grass.", True),
        ("a dog in a red and white", True),
        ("a dog in a red and", True),
        ("the white has a red ball", True),
        *((caption, False) for caption in PEOPLE),
        ("a boy in black and white", False),
        ("a dog and a", False),
        ("a red", True),
        ("", False),
    ],
)
def test_noun_phrases_that_lack_their_noun_are_counted(caption, broken):
    assert describe({"1": caption}, {"1": ["x"]}, PEOPLE)["broken_noun_phrases"] == broken


def test_only_words_that_people_use_often_enough_are_taken_for_modifiers():
    few = ["a teal ball"] * 9
    assert not describe({"1": "a teal"}, {"1": ["x"]}, few)["broken_noun_phrases"]
    assert describe({"1": "a teal"}, {"1": ["x"]}, [*few, *few])["broken_noun_phrases"]
    ends = [*["a teal ball"] * 9, "the teal"]
    assert not describe({"1": "a teal"}, {"1": ["x"]}, ends)["broken_noun_phrases"]


def test_distinct_captions_are_counted_once_for_all(monkeypatch):
    """Validation and report counted strings, evaluation counted captions word by word."""
    captions = ["A dog runs.", "a dog runs", "a dog, runs", "a cat", "", "."]
    assert distinct(captions) == 3
    rows = [Row(str(n), f"{n}.png", ("a dog",), "val") for n in range(len(captions))]
    predictions = {row.id: text for row, text in zip(rows, captions, strict=True)}
    found = describe(predictions, {row.id: row.captions for row in rows})
    assert found["distinct_captions"] == 3

    validated = MagicMock(val_rows=rows, metric_tokenizer="python", epoch=0, stage=0)
    monkeypatch.setattr("training.loop.validation.caption_and_loss", lambda *_: (predictions, 1.0))
    validate(validated)
    assert validated.consider.call_args.args[0]["distinct_captions"] == 3

    texts = {photo: [MagicMock(text=text)] for photo, text in predictions.items()}
    system = System("model", Path("model"), MagicMock(), captions=texts)
    section = words_section([system], Manifest("data", tuple(rows), Path(), Path()), rows)
    [_, cells] = section.table.rows[0]
    assert cells[2].text == "50%"


def test_recall_is_of_words_that_references_agree_on():
    """Photo 1: dog (14 times in training), runs (9). 2: corgi (1), not said. 3, of one reference:
    man (5), said, and fedora (1), not said. 4: nothing agreed on. 5: okapi (0)."""
    assert describe(PREDICTIONS, REFERENCES, TRAINING)["recall_by_training_count"] == {
        "0": {"recall": 0.0, "words": 1},
        "1-9": {"recall": 2 / 4, "words": 4},
        "10-99": {"recall": 1.0, "words": 1},
    }


def test_without_training_captions_the_rest_is_said():
    assert describe(PREDICTIONS, REFERENCES).keys() == describe(
        PREDICTIONS, REFERENCES, TRAINING
    ).keys() - {"broken_noun_phrases", "copied_captions", "recall_by_training_count"}


@pytest.mark.parametrize(
    ("distinct", "photos", "cider", "reason"),
    [
        (1, 4, 0.5, "the same caption for all 4 photos"),
        (99, 1000, 0.5, "99 captions for all 1000 photos"),
        (100, 1000, 0.5, None),
        (4, 4, 0.0, "CIDEr is 0 on 4 photos"),
        (4, 4, None, None),
        (1, 1, 0.0, None),
    ],
)
def test_a_model_that_has_learnt_little_is_recognised(distinct, photos, cider, reason):
    """One caption for every photo went through training, evaluation and export in silence."""
    found = little_learnt(distinct_captions=distinct, photos=photos, CIDEr=cider, METEOR=0.1)
    assert found is None if reason is None else reason in found


def test_a_caption_that_is_copied_but_for_its_full_stop_is_copied():
    """metrics.json said 100 %, the report, with a comparison of its own, 0 %."""
    assert copied(["A dog runs .", "a cat"], ["a dog runs", "a dog sleeps"]) == 0.5
    figures = describe({"1": "A dog runs ."}, {"1": ["x"]}, ["a dog runs"])
    assert figures["copied_captions"] == 1.0
