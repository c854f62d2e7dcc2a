"""Mistakes by word classes, on captions whose fault is known."""

import pytest

from training.data.manifest import Row
from training.scores.mistakes import find_mistakes, word_mistakes


@pytest.mark.parametrize(
    ("kind", "caption", "references", "wrong"),
    [
        ("colour", "a black dog", ["a brown dog", "a dog with brown fur"], [("black", "brown")]),
        ("colour", "a blond dog", ["a golden dog"], []),
        ("colour", "a black dog", ["a dog"], None),
        ("colour", "a dog", ["a brown dog"], None),
        ("count", "two dogs", ["three dogs run", "dogs run"], [("two", "three")]),
        ("count", "both dogs", ["two dogs"], []),
        ("gender", "a woman runs", ["a man runs", "the boy is fast"], [("female", "male")]),
        ("gender", "a woman and a man", ["a man with a girl"], []),
        ("object", "a puppy on a bench", ["a dog on the sofa"], [("bench", "")]),
        ("object", "a boy with a ball", ["a boy plays football"], []),
        ("object", "a truck", ["an old car"], []),
    ],
)
def test_a_word_is_wrong_where_the_references_say_another(kind, caption, references, wrong):
    assert word_mistakes(caption, references, kind) == wrong


def test_mistakes_are_counted_with_their_photos():
    rows = [Row(key, f"{key}.jpg", ("a brown dog",), "val") for key in ("a", "b", "c")]
    captions = {"a": "a black dog", "b": "a brown dog", "c": "a white cat"}
    found = find_mistakes(captions, rows)
    assert (found["colour"].judged, found["colour"].photos) == (3, ["a", "c"])
    assert found["colour"].confusions[("black", "brown")] == 1
    assert found["object"].photos == ["c"]
    assert "gender" not in found


def test_scenes_are_judged_by_their_truth():
    one = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain"}
    scene = {
        "size": [96, 96],
        "background": {"pattern": "plain", "tone": "light"},
        "objects": [{**one, "box": [10, 10, 48, 48]}],
    }
    rows = [Row(key, "x.png", ("a red circle",), "val", scene) for key in ("a", "b")]
    found = find_mistakes({"a": "two red circles", "b": "a blue circle"}, rows)
    assert found["count"].photos == ["a"] and found["colour"].photos == ["b"]
    assert found["colour"].judged == 2
