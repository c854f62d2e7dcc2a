"""Words, boxes and centres of maps whose answer is known."""

import base64

import pytest
import torch

from handler.captioner import Captioner
from handler.web.word_maps import box, centre, on_photo, peak, place_name, word_as_dict
from handler.words import Word, words_of


def spot(rows, columns, side=8) -> torch.Tensor:
    """A map with all weight on some cells."""
    map_gg = torch.zeros(side, side)
    map_gg[rows, columns] = 1.0
    return map_gg / map_gg.sum()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["a", "dog", "runs"], ["a", "dog", "runs"]),
        ([" a", " dog", "s", " run", "."], ["a", "dogs", "run."]),
        (["A", " d", "og"], ["A", "dog"]),
        ([], []),
    ],
)
def test_tokens_are_joined_into_words(tokens, words):
    maps = torch.rand(len(tokens), 4, 4)
    found = words_of(tokens, [-1.0] * len(tokens), maps)
    assert [word.text for word in found] == words
    assert sum(word.log_prob for word in found) == -len(tokens)


def test_a_word_of_two_tokens_has_the_mean_of_their_maps():
    maps = torch.stack([spot(0, 0), spot(1, 1), spot(3, 3)])
    _, word = words_of([" a", " d", "og"], [-1.0, -2.0, -3.0], maps)
    assert word.log_prob == -5
    assert torch.equal(word.map_gg, (maps[1] + maps[2]) / 2)


def test_peak_box_and_centre_of_a_block():
    map_gg = spot(slice(2, 4), slice(5, 8))
    assert peak(map_gg) == pytest.approx((6 / 8, 3 / 8))
    x0, y0, x1, y1 = box(map_gg)
    assert (x0, y0, x1, y1) == pytest.approx((5 / 8, 2 / 8, 1, 4 / 8), abs=0.6 / 8)
    assert centre(map_gg) == pytest.approx((6.5 / 8, 3 / 8), abs=0.02)


def test_a_peak_between_two_cells_lies_between_them():
    """A small object over the border of two cells is in the middle of neither."""
    map_gg = spot(3, slice(2, 4)) + 0.1 * spot(7, 7)
    assert peak(map_gg) == pytest.approx((3 / 8, 3.5 / 8))
    assert peak(spot(0, 0)) == pytest.approx((0.5 / 8, 0.5 / 8))


def test_a_weaker_island_stays_out_of_the_box():
    map_gg = spot(slice(0, 2), slice(0, 2)) + 0.8 * spot(slice(6, 8), slice(6, 8))
    assert box(map_gg)[2] < 0.5
    assert centre(map_gg) == pytest.approx((1 / 8, 1 / 8), abs=0.02)


def test_a_flat_map_is_the_whole_picture():
    flat = torch.full((4, 4), 1 / 16)
    assert box(flat) == (0, 0, 1, 1)
    assert centre(flat) == pytest.approx((0.5, 0.5))


def test_a_map_of_a_part_lies_in_the_photo():
    """The middle third of a wide photo: its left edge is not the photo's."""
    seen = (1 / 3, 0.0, 2 / 3, 1.0)
    assert on_photo((0.0, 0.5), seen) == pytest.approx([1 / 3, 0.5])
    assert on_photo((0.0, 0.25, 1.0, 0.5), seen) == pytest.approx([1 / 3, 0.25, 2 / 3, 0.5])
    word = Word("dog", -0.5, spot(0, 0))
    assert word_as_dict(word)["place"] == "upper left"
    assert word_as_dict(word, seen)["place"] == "upper"
    # Box and centre are drawn within the map.
    for name in ("map", "box", "centre"):
        assert word_as_dict(word, seen)[name] == word_as_dict(word)[name]


@pytest.mark.parametrize(
    ("point", "name"),
    [((0.1, 0.1), "upper left"), ((0.5, 0.9), "lower"), ((0.9, 0.5), "right"),
     ((0.5, 0.5), "middle")],
)  # fmt: skip
def test_places_have_names(point, name):
    assert place_name(*point) == name


def test_only_content_words_have_a_map():
    map_gg = spot(1, 2, side=4)
    page = word_as_dict(Word("dog.", -0.5, map_gg))
    assert page["text"] == "dog." and {"box", "centre"} <= page.keys()
    values = base64.b64decode(page["map"])
    assert len(values) == 16 and values[6] == 255 and sum(values) == 255
    for text in ("The", "of", ".", ""):
        assert word_as_dict(Word(text, 0.0, map_gg)) == {"text": text, "probability": 1.0}


def test_maps_are_the_same_a_part_at_a_time(tiny_export, monkeypatch):
    """All captions at once took gigabytes for a large model and many tokens."""
    captioner = Captioner.load(tiny_export)
    memory_BPD = captioner.encode(torch.randn(1, 3, 32, 32)).expand(5, -1, -1)
    ids = [[4, 5, 6], [5], [6, 4], [4], [5, 6, 4, 5]]
    whole = captioner.attention_memory(memory_BPD, ids)
    monkeypatch.setattr("handler.captioner.ATTENDED", 8)
    parts = captioner.attention_memory(memory_BPD, ids)
    assert [len(maps) for maps in parts] == [3, 1, 2, 1, 4]
    torch.testing.assert_close(parts, whole)
