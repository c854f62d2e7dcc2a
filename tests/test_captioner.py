"""What Captioner.caption takes as its photos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler.captioner import Captioner, check_photos


@pytest.mark.parametrize(
    "photos",
    ["a.jpg", Path("a.jpg"), b"x", bytearray(b"x"), memoryview(b"x"), np.zeros((2, 2, 3))],
)
def test_one_thing_in_place_of_a_list_is_refused_by_name(photos):
    """A path was looped over letter by letter, bytes number by number."""
    captioner = object.__new__(Captioner)
    with pytest.raises(TypeError, match=f"type {type(photos).__name__}; give a list of photos"):
        captioner.caption(photos)


@pytest.mark.parametrize("photos", [[], [b"x"], (b"x",), [Image.new("RGB", (2, 2))]])
def test_lists_and_tuples_are_taken(photos):
    check_photos(photos)
