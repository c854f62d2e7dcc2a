"""Attention maps as a picture: one panel a word, the photo dark where the model did not look."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANEL, LABEL, GAP, COLUMNS = 224, 30, 8, 5


def overlay(photo: Image.Image, words: Sequence[str], maps_Tgg: Tensor) -> Image.Image:
    """Draws the photo (RGB, square as the model saw it) and a panel a word. Brightness alone
    carries the map, which any eye can read; each map is scaled to its own maximum."""
    photo = photo.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    panels = [("", photo)]
    for word, map_gg in zip(words, maps_Tgg, strict=True):
        heat = Image.fromarray((map_gg / map_gg.max().clamp(min=1e-9)).numpy() * 255)
        heat = heat.convert("L").resize((PANEL, PANEL), Image.Resampling.BICUBIC)
        light = 0.15 + 0.85 * np.asarray(heat, dtype=np.float32)[:, :, None] / 255
        panels.append((word, Image.fromarray((np.asarray(photo) * light).astype(np.uint8))))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (columns * (PANEL + GAP) + GAP, rows * (PANEL + LABEL + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for number, (word, panel) in enumerate(panels):
        x = GAP + number % columns * (PANEL + GAP)
        y = GAP + number // columns * (PANEL + LABEL + GAP)
        draw.text((x + 2, y), word.strip()[:22], fill="black", font=font)
        sheet.paste(panel, (x, y + LABEL))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
