"""Draws attention maps as a picture with one panel per word."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from handler.image_resize import Box
from handler.words import Word

# The longer side of a panel in pixels, and other lengths of the picture.
PANEL, LABEL, GAP, COLUMNS = 224, 30, 8, 5
# Room for a word above a narrow photo.
LEAST_WIDTH = 96
FONT_SIZE = 20
# Five points of the colour map Viridis, whose brightness increases with the value, so that it can
# be read with any colour vision and in greyscale.
COLOURS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32
)
# The title of the PNG, by which a file that this project wrote is recognized: nothing else is
# replaced by another one. Pillow writes it before the pixels.
TITLE = ("Title", "Word maps of a caption")
# Opacity of the colours over the grey photo.
OPACITY = 0.55


def shrunk(photo: Image.Image) -> Image.Image:
    """The photo in the size in which `overlay` draws it."""
    scale = PANEL / max(photo.size)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC)


def overlay(photo: Image.Image, words: Sequence[Word], seen: Box) -> Image.Image:
    """Draws the photo (RGB), then for each word the photo with the word's map over the region
    `seen`, in fractions of the photo. Each map is scaled by its largest value. Words that do not
    name anything visible have no map: where the model looked for them means nothing."""
    photo = shrunk(photo)
    width, height = photo.size
    panels = [("", photo)]
    for word in words:
        grey = photo.convert("L").convert("RGB")
        panel = heat(photo, word.map_gg, seen) if word.names_something else grey
        panels.append((word.text, panel))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    across, down = max(width, LEAST_WIDTH) + GAP, height + LABEL + GAP
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (text, panel) in enumerate(panels):
        x = GAP + number % columns * across
        y = GAP + number // columns * down
        label = shortened(text.strip(), across - GAP, draw, font)
        draw.text((x + 2, y), label, fill="black", font=font)
        sheet.paste(panel, (x, y + LABEL))
    return sheet


def heat(photo: Image.Image, map_gg: Tensor, seen: Box) -> Image.Image:
    """The photo in grey, its region `seen` overlaid with the colours of a map (g, g)."""
    left, top, right, bottom = (
        round(edge * photo.size[index % 2]) for index, edge in enumerate(seen)
    )
    size = max(1, right - left), max(1, bottom - top)
    weights = Image.fromarray((map_gg / map_gg.max().clamp(min=1e-9)).float().numpy())
    weights_HW = np.asarray(weights.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(weights_HW, stops, channel) for channel in COLOURS.T], axis=-1)
    coloured = Image.fromarray(colour.astype(np.uint8))
    panel = photo.convert("L").convert("RGB")
    place = (left, top, left + size[0], top + size[1])
    panel.paste(Image.blend(panel.crop(place), coloured, OPACITY), place)
    return panel


def shortened(
    word: str,
    width: int,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> str:
    """The word, cut to a width in pixels."""
    while len(word) > 1 and draw.textlength(word, font=font) > width - 4:
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
