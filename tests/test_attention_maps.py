"""The heat-map picture: panels, scaling, labels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from handler.attention_maps import COLUMNS, GAP, LABEL, PANEL, heat, overlay, png_bytes

PHOTO = Image.new("RGB", (96, 96), (128, 128, 128))


@pytest.mark.parametrize(("words", "columns", "rows"), [(0, 1, 1), (2, 3, 1), (4, 5, 1), (5, 5, 2)])
def test_one_panel_a_word_after_the_photo(words, columns, rows):
    sheet = overlay(PHOTO, ["word"] * words, torch.full((words, 4, 4), 1 / 16))
    assert columns <= COLUMNS
    assert sheet.size == (columns * (PANEL + GAP) + GAP, rows * (PANEL + LABEL + GAP) + GAP)
    photo = sheet.crop((GAP, GAP + LABEL, GAP + PANEL, GAP + LABEL + PANEL))
    assert photo.tobytes() == Image.new("RGB", (PANEL, PANEL), (128, 128, 128)).tobytes()


def test_where_the_model_looked_is_brightest():
    weights = torch.zeros(4, 4)
    weights[1, 2] = 0.003  # scaled to its own largest value
    light = np.asarray(heat(PHOTO, weights).convert("L"))
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 24, column // 24) == (1, 2)
    assert light.max() > light.min() + 60


def test_a_map_of_nothing_is_drawn():
    assert heat(PHOTO, torch.zeros(4, 4)).size == PHOTO.size


def test_labels_stay_above_their_panels():
    """A long word was drawn into its neighbour's label."""
    maps = torch.full((2, 2, 2), 0.25)
    alone = overlay(PHOTO, ["", "x"], maps)
    beside = overlay(PHOTO, ["Donaudampfschifffahrtsgesellschaft" * 9, "x"], maps)
    label = (GAP + 2 * (PANEL + GAP), 0, 3 * (PANEL + GAP), LABEL)
    assert alone.crop(label).tobytes() == beside.crop(label).tobytes()


def test_words_of_any_script_are_drawn():
    overlay(PHOTO, ["größe", "猫", "🐈", "\ufffd", " \n "], torch.full((5, 2, 2), 0.25))


def test_png():
    assert Image.open(io.BytesIO(png_bytes(PHOTO))).format == "PNG"
