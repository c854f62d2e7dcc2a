"""Draws attention maps as a picture with one panel per word."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANEL, LABEL, GAP, COLUMNS = 224, 30, 8, 5
FONT_SIZE = 20
# Five points of the colour map Viridis, whose brightness increases with the value, so that it can
# be read with any colour vision and in greyscale.
COLOURS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32
)
# Opacity of the colours over the grey photo.
OPACITY = 0.55


def overlay(photo: Image.Image, words: Sequence[str], maps_Tgg: Tensor) -> Image.Image:
    """Draws the photo (RGB, square, as the model saw it), then for each of the T words the photo
    with the word's map. Each map is scaled by its largest value."""
    photo = photo.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    panels = [("", photo)]
    panels += [(word, heat(photo, map_gg)) for word, map_gg in zip(words, maps_Tgg, strict=True)]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (columns * (PANEL + GAP) + GAP, rows * (PANEL + LABEL + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (word, panel) in enumerate(panels):
        x = GAP + number % columns * (PANEL + GAP)
        y = GAP + number // columns * (PANEL + LABEL + GAP)
        draw.text((x + 2, y), shortened(word.strip(), draw, font), fill="black", font=font)
        sheet.paste(panel, (x, y + LABEL))
    return sheet


def heat(photo: Image.Image, map_gg: Tensor) -> Image.Image:
    """The photo in grey, overlaid with the colours of a map (g, g) of weights."""
    weights = Image.fromarray((map_gg / map_gg.max().clamp(min=1e-9)).float().numpy())
    weights_HW = np.asarray(weights.resize(photo.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(weights_HW, stops, channel) for channel in COLOURS.T], axis=-1)
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[:, :, None]
    return Image.fromarray((grey * (1 - OPACITY) + colour * OPACITY).astype(np.uint8))


def shortened(
    word: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    """The word, cut to the width of its panel."""
    while len(word) > 1 and draw.textlength(word, font=font) > PANEL - 4:
        word = word.removesuffix("…")[:-1] + "…"
    return word


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
