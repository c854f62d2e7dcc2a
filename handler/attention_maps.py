"""Attention maps as a picture: one panel a word, warm where the model looked."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

PANEL, LABEL, GAP, COLUMNS = 224, 30, 8, 5
FONT_SIZE = 20
# Viridis at five points: brighter always means more, to any eye and in grey print.
COLOURS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32
)
# What the PNG says of itself, so that nothing else is replaced by another one. Pillow writes it
# before the pixels.
TITLE = ("Title", "Word maps of a caption")
# How much of the colour lies over the grey photo.
OPACITY = 0.55


def overlay(photo: Image.Image, words: Sequence[str], maps_Tgg: Tensor) -> Image.Image:
    """Draws the photo (RGB, square, as the model saw it) and, for each of the T words, its map over
    it. Each map is scaled to its own largest value."""
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
    """The photo in grey under the colours of a map (g, g) of weights."""
    weights = Image.fromarray((map_gg / map_gg.max().clamp(min=1e-9)).float().numpy())
    weights_HW = np.asarray(weights.resize(photo.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(weights_HW, stops, channel) for channel in COLOURS.T], axis=-1)
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[:, :, None]
    return Image.fromarray((grey * (1 - OPACITY) + colour * OPACITY).astype(np.uint8))


def shortened(
    word: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    """As much of a word as fits above its panel."""
    while len(word) > 1 and draw.textlength(word, font=font) > PANEL - 4:
        word = word.removesuffix("…")[:-1] + "…"
    return word


def png_bytes(image: Image.Image) -> bytes:
    """The picture of `overlay` as a PNG that `is_overlay` knows."""
    buffer, title = io.BytesIO(), PngInfo()
    title.add_text(*TITLE)
    image.save(buffer, "PNG", pnginfo=title)
    return buffer.getvalue()


def is_overlay(content: bytes) -> bool:
    return b"tEXt" + "\0".join(TITLE).encode() in content[:256]
