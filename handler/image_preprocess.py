"""A photograph's bytes -> the encoder's tensor. The only preprocessing there is: training,
evaluation and serving all come through here.

Six formats are read, told by their content: JPEG, PNG, WebP, BMP, GIF (first frame), TIFF (first
page). Whatever the mode, the result is 8-bit RGB, upright.
"""

import io
import math
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from handler.errors import UserError

MAX_BYTES = 16 * 1024 * 1024
MAX_PIXELS = 64_000_000
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
RESIZES = ("squash", "crop")
SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
}


class InvalidImage(UserError):
    """Starts like a photograph, but cannot be decoded."""


class UnsupportedMediaType(InvalidImage):
    """Not one of the six formats."""


class ImageTooLarge(InvalidImage):
    """More bytes or more pixels than the limits allow."""


@dataclass(frozen=True)
class PreprocessConfig:
    """`resize`: `squash` the whole photo to the square, or `crop` the centre after scaling the
    short side. `mean` and `std` are of RGB in 0..1."""

    image_size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: str = "squash"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        size = self.image_size
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 4096:
            raise UserError(f"preprocessing.image_size must be 1 to 4096, not {size!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(
                isinstance(v, int | float) and math.isfinite(v) for v in values
            )
            if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
                raise UserError(f"preprocessing.{name} must be three numbers, not {values!r}")
        if self.resize not in RESIZES:
            raise UserError(f"preprocessing.resize must be one of {', '.join(RESIZES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"preprocessing.interpolation must be one of {', '.join(INTERPOLATIONS)}"
            )

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "PreprocessConfig":
        """From `config.json`; raises UserError for an unknown field."""
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise UserError(f"preprocessing.{name} is unknown; known are {sorted(known)}")
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**lists)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that `data` starts like, or None."""
    for name, starts in SIGNATURES.items():
        if data.startswith(starts):
            return name
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def decode(
    photo: bytes | bytearray | memoryview | Image.Image, min_side: int | None = None
) -> Image.Image:
    """Decodes a photo to upright 8-bit RGB.

    `min_side` (pixels) allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, as long as both
    sides stay at least that long. Raises UnsupportedMediaType, ImageTooLarge or InvalidImage.
    """
    if isinstance(photo, Image.Image):
        if photo.width * photo.height > MAX_PIXELS:
            raise ImageTooLarge(f"the photo has more than {MAX_PIXELS // 1_000_000} megapixels")
        if not photo.width or not photo.height:
            raise InvalidImage("the photo has no pixels")
        return _to_rgb(photo)
    data = bytes(photo)
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"the photo has more than {MAX_BYTES // 1024**2} MiB")
    format_name = sniff(data)
    if format_name is None:
        raise UnsupportedMediaType(
            "the content is none of JPEG, PNG, WebP, BMP, GIF and TIFF; convert it to one of them"
        )
    try:
        with warnings.catch_warnings():
            # Size is checked below, by the header, before anything is decoded.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[format_name])
            if image.width * image.height > MAX_PIXELS:
                raise ImageTooLarge(
                    f"the photo has more than {MAX_PIXELS // 1_000_000} megapixels"
                )
            if min_side is not None and format_name == "JPEG" and image.mode in ("L", "RGB"):
                image.draft(image.mode, (min_side, min_side))
            image.load()
            return _to_rgb(image)
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"the photo has more than {MAX_PIXELS // 1_000_000} megapixels"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise InvalidImage(f"the {format_name} photo is damaged and cannot be decoded") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I"):
            grey = grey / 257  # 16-bit: 65535 -> 255, scaled and not clipped
        elif np.isfinite(grey).all() and grey.size and grey.max() <= 1.0:
            grey = grey * 255  # float pages hold 0..1 by convention
        grey = np.nan_to_num(grey, nan=0.0, posinf=255.0, neginf=0.0)
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """An RGB photo as the square that the encoder takes, with Pillow's antialiased resampling."""
    size, width, height = config.image_size, image.width, image.height
    filter_ = INTERPOLATIONS[config.interpolation]
    if (width, height) == (size, size):
        return image
    if config.resize == "squash":
        return image.resize((size, size), filter_)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), filter_, box=(left, top, left + side, top + side))


def to_tensor(image: Image.Image, config: PreprocessConfig) -> Tensor:
    """An RGB photo as float32 (3, H, W), normalised by the config's mean and std."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()
    mean = torch.tensor(config.mean).view(3, 1, 1) * 255
    std = torch.tensor(config.std).view(3, 1, 1) * 255
    return (pixels - mean) / std


def preprocess(
    photo: bytes | bytearray | memoryview | Image.Image, config: PreprocessConfig
) -> Tensor:
    """A photo as the encoder takes it: float32 (3, S, S).

    A big JPEG is decoded at a fraction of its size, at least twice the square's, and then resized:
    within a mean of one 8-bit level of the full decode.
    """
    return to_tensor(resize(decode(photo, 2 * config.image_size), config), config)
