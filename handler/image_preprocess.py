"""A photograph's bytes -> RGB picture -> normalised tensor.

The only preprocessing there is: training, evaluation and serving all come through here, so that a
model never sees two versions of one photo.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from handler.decode_process import Patience, decode_elsewhere
from handler.errors import (
    ImageTooComplex,
    ImageTooLarge,
    InvalidImage,
    UnsupportedMediaType,
    UserError,
)
from handler.image_decode import (
    FORMATS,
    MAX_BYTES,
    PHOTO_SUFFIXES,
    check_size,
    decode_photo,
    open_photo,
    sniff,
)
from handler.image_walk import walk

__all__ = [
    "MAX_BYTES",
    "PHOTO_SUFFIXES",
    "ImageTooComplex",
    "ImageTooLarge",
    "InvalidImage",
    "UnsupportedMediaType",
    "Patience",
    "PreprocessConfig",
    "decode",
    "preprocess",
    "resize",
    "sniff",
    "to_tensor",
]

# Larger pictures take more than 0.3 s in the worst case; a JPEG is reduced as it is decoded.
CHEAP_PIXELS = 8_000_000
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class PreprocessConfig:
    """How a photo becomes a tensor: side in pixels, normalisation of the 0-1 channels, fitting.

    `resize_to` is the side that the photo is resized to before its middle is cut out, where that is
    more than `image_size` (as for DeiT: 256, then 224).
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Literal["squash", "crop"] = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_to: int | None = None

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= 4096:
            raise UserError(f"preprocessing: image_size is {self.image_size!r}; give 1 to 4096")
        if self.resize_to is not None and (
            type(self.resize_to) is not int or not self.image_size <= self.resize_to <= 4096
        ):
            raise UserError(
                f"preprocessing: resize_to is {self.resize_to!r}; give image_size to 4096, or null"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise UserError(f"preprocessing: {name} is {values!r}; give three numbers")
            if any(type(v) not in (int, float) or not np.isfinite(v) for v in values):
                raise UserError(f"preprocessing: {name} is {values!r}; give three finite numbers")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if min(self.std) <= 0:
            raise UserError(f"preprocessing: std is {self.std!r}; give numbers above 0")
        if self.resize not in ("squash", "crop"):
            raise UserError(f"preprocessing: resize is {self.resize!r}; give squash or crop")
        if self.interpolation not in RESAMPLING:
            raise UserError(
                f"preprocessing: interpolation is {self.interpolation!r}; give bicubic or bilinear"
            )

    @property
    def side(self) -> int:
        """Pixels that a photo's side is resized to; under `crop`, its short side."""
        return self.resize_to or self.image_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreprocessConfig":
        """From a config file's section. Raises UserError naming an unknown or wrong field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(
                    f"preprocessing: field {name!r} is unknown; the fields are {', '.join(known)}"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def preprocess(
    photo: bytes | bytearray | memoryview | Image.Image, config: PreprocessConfig
) -> Tensor:
    """A photo as the encoder takes it: float32 (3, S, S), normalised. Raises InvalidImage."""
    return to_tensor(resize(decode(photo, min_side=config.side), config), config)


def decode(
    photo: bytes | bytearray | memoryview | Image.Image,
    min_side: int | None = None,
    patience: Patience | None = None,
) -> Image.Image:
    """A photo in RGB, upright, its alpha laid over white; the first frame or page.

    With `min_side` (the side it will be resized to), a large JPEG is decoded at 1/2, 1/4 or 1/8 of
    its size, in the frequency domain, as long as both sides stay at least twice `min_side`: several
    times faster. tests/test_image_preprocess.py bounds what that changes after the resize.

    Decoding takes at most 2 s of processor time, one more for every 16 megapixels of its header,
    and 512 MiB, or 12 bytes a pixel where that is more. Photos that are decoded one after the other
    while someone waits for all of them share a `patience`: after slow ones, others may take less.

    Raises InvalidImage, or its kinds UnsupportedMediaType, ImageTooLarge and ImageTooComplex.
    """
    if isinstance(photo, Image.Image):
        check_size(photo.size)
        return decode_photo(photo)
    data = bytes(photo)
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"the image has more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise InvalidImage("the image is empty")
    kind = sniff(data)
    if kind is None:
        raise UnsupportedMediaType(f"the content is none of {FORMATS}")
    try:
        data, cheap = walk(data, kind)
    except ValueError as error:
        raise InvalidImage(f"the image is damaged: {error}") from error
    if cheap:
        image = open_photo(data, kind)
        if kind == "JPEG" or image.width * image.height <= CHEAP_PIXELS:
            return decode_photo(image, data, min_side)
    return decode_elsewhere(data, kind, min_side, patience or Patience())


def resize(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """RGB of (S, S): the middle of the photo once it is resized (squashed to a square, or by its
    short side). The same geometry as resizing first and cutting then, as Hugging Face does it."""
    size, side = config.image_size, config.side
    # Cutting before the resize keeps a strip of 1 x 60,000 from growing to S x 60,000 S.
    box = []
    for length in image.size:
        resized = side * length // min(image.size) if config.resize == "crop" else side
        start = (resized - size) // 2
        box.append((start * length / resized, (start + size) * length / resized))
    (left, right), (top, bottom) = box
    return image.resize(
        (size, size), RESAMPLING[config.interpolation], box=(left, top, right, bottom)
    )


def to_tensor(image: Image.Image, config: PreprocessConfig) -> Tensor:
    """An RGB picture as float32 (3, height, width), 0-1, then less `mean`, over `std`."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    pixels_CHW = pixels_HWC.permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return pixels_CHW.sub_(mean).div_(std)
