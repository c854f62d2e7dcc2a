"""Finds where the model looked for a word: the peak of its attention map, the centre, and a box.

Dimension key: g cells along one side of the map. Positions are fractions of the map's
width and height, x to the right and y down. A map covers the region of a photo that the model saw
(`handler.image_preprocess.seen_region`); `on_photo` converts positions to those in the photo.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handler.words import Word

# A box surrounds the cells around the peak that have at least this share of the peak's value.
BOX_SHARE = 0.5
# Each cell of a map is interpolated to FINE x FINE before a box is found.
FINE = 4
# The region of a map that covers the whole photo.
WHOLE = (0.0, 0.0, 1.0, 1.0)


def prompt_of(caption: str, tokens: Sequence[str]) -> str:
    """The prompt at the start of a caption: the text before its generated tokens. (Tokens of a
    word-level vocabulary contain no spaces.)"""
    for space in ("", " "):
        generated = space.join(tokens).strip()
        if caption.endswith(generated):
            return caption.removesuffix(generated).strip()
    return ""


def peak(map_gg: Tensor) -> tuple[float, float]:
    """The peak of the map, (x, y): the centre of gravity of its largest cell and the cells around
    it. The attention to an object on the border of two cells is spread over both."""
    height, width = map_gg.shape
    row, column = divmod(int(map_gg.argmax()), width)
    top, left = max(0, row - 1), max(0, column - 1)
    x, y = _gravity(map_gg[top : row + 2, left : column + 2])
    return (left + x) / width, (top + y) / height


def box(map_gg: Tensor, share: float = BOX_SHARE) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) around the connected region that contains the peak and has at least
    `share` of the peak's value."""
    fine = F.interpolate(map_gg[None, None].float(), scale_factor=FINE, mode="bilinear")[0, 0]
    is_large = fine >= share * fine.max()
    row, column = divmod(int(fine.argmax()), fine.size(1))
    inside = torch.zeros_like(is_large)
    inside[row, column] = True
    while True:  # grow by one cell in each direction until the connected region is filled
        grown = F.max_pool2d(inside[None].float(), 3, stride=1, padding=1)[0].bool() & is_large
        if torch.equal(grown, inside):
            break
        inside = grown
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    height, width = inside.shape
    return (
        int(columns[0]) / width,
        int(rows[0]) / height,
        (int(columns[-1]) + 1) / width,
        (int(rows[-1]) + 1) / height,
    )


def centre(map_gg: Tensor) -> tuple[float, float]:
    """The centre of gravity, (x, y), of the weight inside the map's box."""
    height, width = map_gg.shape
    x0, y0, x1, y1 = box(map_gg)
    # Each cell is weighted by the part of it that is in the box.
    inside_gg = map_gg * _covered(y0, y1, height)[:, None] * _covered(x0, x1, width)[None, :]
    x, y = _gravity(inside_gg)
    return x / width, y / height


def _gravity(weights: Tensor) -> tuple[float, float]:
    """The centre of gravity, (x, y), in cells."""
    rows, columns = (torch.arange(length) + 0.5 for length in weights.shape)
    total = weights.sum().clamp(min=1e-12)
    return float((weights.sum(0) * columns).sum() / total), float(
        (weights.sum(1) * rows).sum() / total
    )


def _covered(low: float, high: float, cells: int) -> Tensor:
    """The fraction of each cell that lies between two positions."""
    edges = torch.arange(cells + 1) / cells
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * cells


def on_photo(positions: Sequence[float], seen: Sequence[float]) -> list[float]:
    """Converts positions on a map (x, y, x, y, ...) to fractions of the photo's size. `seen` is the
    region (x0, y0, x1, y1) of the photo that the map covers."""
    x0, y0, x1, y1 = seen
    sides = ((x0, x1 - x0), (y0, y1 - y0))
    return [sides[i % 2][0] + value * sides[i % 2][1] for i, value in enumerate(positions)]


def place_name(x: float, y: float) -> str:
    """A point in words, for screen readers: "upper left", "middle"."""
    row = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return f"{row} {column}".strip() or "middle"


def word_as_dict(word: Word, seen: Sequence[float] = WHOLE) -> dict[str, Any]:
    """A word for a template. A content word has its map in base64, g * g bytes row by row, scaled
    so that the largest is 255; the box and the centre on the map; and the location in the photo, of
    which the map covers the region `seen`, in words. Where the model looked for other words means
    nothing."""
    page: dict[str, Any] = {"text": word.text, "probability": math.exp(word.log_prob)}
    if not word.names_something:
        return page
    scaled = (word.map_gg / word.map_gg.max().clamp(min=1e-9) * 255).round().to(torch.uint8)
    return page | {
        "map": base64.b64encode(scaled.numpy().tobytes()).decode(),
        "box": [round(edge, 4) for edge in box(word.map_gg)],
        "centre": [round(value, 4) for value in centre(word.map_gg)],
        "place": place_name(*on_photo(peak(word.map_gg), seen)),
    }
