"""The heat-map picture: panels, scaling, labels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from handler.attention_maps import (
    COLUMNS,
    GAP,
    LABEL,
    LEAST_WIDTH,
    PANEL,
    heat,
    overlay,
    png_bytes,
)
from handler.words import Word

PHOTO = Image.new("RGB", (96, 96), (128, 128, 128))
WHOLE = (0.0, 0.0, 1.0, 1.0)


def words(*texts: str) -> list[Word]:
    return [Word(text, 0.0, torch.full((4, 4), 1 / 16)) for text in texts]


@pytest.mark.parametrize(("count", "columns", "rows"), [(0, 1, 1), (2, 3, 1), (4, 5, 1), (5, 5, 2)])
def test_one_panel_a_word_after_the_photo(count, columns, rows):
    sheet = overlay(PHOTO, words(*["word"] * count), WHOLE)
    assert columns <= COLUMNS
    assert sheet.size == (columns * (PANEL + GAP) + GAP, rows * (PANEL + LABEL + GAP) + GAP)
    photo = sheet.crop((GAP, GAP + LABEL, GAP + PANEL, GAP + LABEL + PANEL))
    assert photo.tobytes() == Image.new("RGB", (PANEL, PANEL), (128, 128, 128)).tobytes()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (5000, 3), (3, 5000), (1, 1)])
def test_a_photo_keeps_its_shape(size):
    """Every photo was drawn as a square."""
    sheet = overlay(Image.new("RGB", size, "red"), words("word"), WHOLE)
    width, height = (max(1, round(side * PANEL / max(size))) for side in size)
    assert sheet.size == (2 * (max(width, LEAST_WIDTH) + GAP) + GAP, height + LABEL + 2 * GAP)
    assert sheet.getpixel((GAP, GAP + LABEL)) == (255, 0, 0)
    assert sheet.getpixel((GAP + width - 1, GAP + LABEL + height - 1)) == (255, 0, 0)


def test_where_the_model_looked_is_brightest():
    weights = torch.zeros(4, 4)
    weights[1, 2] = 0.003  # scaled to its own largest value
    light = np.asarray(heat(PHOTO, weights, WHOLE).convert("L"))
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 24, column // 24) == (1, 2)
    assert light.max() > light.min() + 60


def test_a_map_covers_what_the_model_saw():
    """The middle of the photo: the rest stays grey."""
    panel = np.asarray(heat(PHOTO, torch.eye(4), (0.25, 0.0, 0.75, 1.0)), np.int16)
    coloured = (panel.max(-1) - panel.min(-1)) > 10
    assert not coloured[:, :24].any() and not coloured[:, 72:].any()
    assert coloured[:, 24:72].mean() > 0.9


def test_function_words_have_no_map():
    """Their corners glowed as if they meant something."""
    sheet = np.asarray(overlay(PHOTO, words("a", "dog"), WHOLE), np.int16)[GAP + LABEL : -GAP]
    photo, a, dog = (sheet[:, GAP + i * (PANEL + GAP) :][:, :PANEL] for i in range(3))
    assert (a == photo).all()  # grey as it is
    assert (dog.max(-1) - dog.min(-1)).mean() > 20


def test_a_map_of_nothing_is_drawn():
    assert heat(PHOTO, torch.zeros(4, 4), WHOLE).size == PHOTO.size


def test_labels_stay_above_their_panels():
    """A long word was drawn into its neighbour's label."""
    alone = overlay(PHOTO, words("", "x"), WHOLE)
    beside = overlay(PHOTO, words("Donaudampfschifffahrtsgesellschaft" * 9, "x"), WHOLE)
    label = (GAP + 2 * (PANEL + GAP), 0, 3 * (PANEL + GAP), LABEL)
    assert alone.crop(label).tobytes() == beside.crop(label).tobytes()


def test_words_of_any_script_are_drawn():
    overlay(PHOTO, words("größe", "猫", "🐈", "\ufffd", " \n "), WHOLE)


def test_png():
    assert Image.open(io.BytesIO(png_bytes(PHOTO))).format == "PNG"
