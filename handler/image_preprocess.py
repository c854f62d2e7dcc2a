"""Converts the bytes of a photo to an RGB picture, and that to a normalized tensor.

Training, evaluation and serving all use this preprocessing, so that a model never gets two versions
of a photo.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

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
from handler.image_resize import Box, Resizing
from handler.image_walk import CHEAP_PIXELS, Effort, walk

__all__ = [
    "MAX_BYTES",
    "PHOTO_SUFFIXES",
    "Box",
    "ImageTooComplex",
    "ImageTooLarge",
    "InvalidImage",
    "UnsupportedMediaType",
    "Patience",
    "CheckedPhoto",
    "PreprocessConfig",
    "check",
    "decode",
    "decode_resized",
    "preprocess",
    "resize",
    "seen_region",
    "sniff",
    "to_tensor",
]

Interpolation = Literal["bicubic", "bilinear"]
INTERPOLATIONS = get_args(Interpolation)


@dataclass(frozen=True)
class PreprocessConfig:
    """How a photo becomes a tensor: side in pixels, mean and standard deviation of the channels
    (0-1), and `resize`: squash the whole photo to the square, or crop its middle.

    `resize_to` is the side to which the photo is resized before its middle is cropped, if it is
    more than `image_size` (DeiT: 256, then 224).
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Literal["squash", "crop"] = "squash"
    interpolation: Interpolation = "bicubic"
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
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"preprocessing: interpolation is {self.interpolation!r}; give bicubic or bilinear"
            )

    @property
    def resizing(self) -> Resizing:
        """The fields that determine how a photo is resized."""
        side = self.resize_to or self.image_size
        bicubic = self.interpolation == "bicubic"
        return Resizing(self.image_size, side, self.resize == "crop", bicubic)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreprocessConfig":
        """From a section of a config file. Raises UserError naming an unknown or wrong field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(
                    f"preprocessing: field {name!r} is unknown; the fields are {', '.join(known)}"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The input of `from_dict`, as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def preprocess(
    photo: bytes | bytearray | memoryview | Image.Image, config: PreprocessConfig
) -> Tensor:
    """A photo as input of the encoder: float32 (3, S, S), normalized. Raises InvalidImage."""
    return to_tensor(decode_resized(photo, config), config)


@dataclass(frozen=True)
class CheckedPhoto:
    """The bytes of a photo that are decoded, Pillow's name of its format, and what is known about
    the effort."""

    data: bytes
    kind: str
    effort: Effort


def check(photo: bytes | bytearray | memoryview) -> CheckedPhoto:
    """Detects the format of a photo and scans its bytes, without decoding it.

    Raises InvalidImage or one of its subclasses UnsupportedMediaType and ImageTooLarge.
    """
    if not isinstance(photo, (bytes, bytearray, memoryview)):
        raise InvalidImage(
            f"a photo is of type {type(photo).__name__}; give the bytes of its file, as from "
            "Path('photo.jpg').read_bytes(), or a PIL image"
        )
    data = bytes(photo)
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"the image has more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise InvalidImage("the image is empty")
    kind = sniff(data)
    if kind is None:
        raise UnsupportedMediaType(f"the content is none of {FORMATS}")
    try:
        data, effort = walk(data, kind)
    except ValueError as error:
        raise InvalidImage(f"the image is damaged: {error}") from error
    return CheckedPhoto(data, kind, effort)


def decode(
    photo: bytes | bytearray | memoryview | Image.Image | CheckedPhoto,
    patience: Patience | None = None,
) -> Image.Image:
    """Decodes a photo to RGB, upright and with alpha over white; of several frames or pages the
    first.

    Decoding takes at most 2 s of processor time, one more for every 16 megapixels of its header,
    and 512 MiB, or 12 bytes per pixel if that is more. Photos that are decoded one after the other
    while a client waits for all of them share a `patience`: after slow ones, others may take less.

    Raises InvalidImage or one of its subclasses UnsupportedMediaType, ImageTooLarge and
    ImageTooComplex.
    """
    return _decode(photo, None, patience or Patience())


def decode_resized(
    photo: bytes | bytearray | memoryview | Image.Image | CheckedPhoto,
    config: PreprocessConfig,
    patience: Patience | None = None,
) -> Image.Image:
    """`decode` and `resize`, faster: RGB (S, S). A large JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, in the frequency domain, as long as both sides are at least twice the side to which it is
    resized. tests/test_image_preprocess.py limits the difference."""
    return _decode(photo, config.resizing, patience or Patience())


def _decode(
    photo: bytes | bytearray | memoryview | Image.Image | CheckedPhoto,
    resizing: Resizing | None,
    patience: Patience,
) -> Image.Image:
    if isinstance(photo, Image.Image):
        check_size(photo.size)
        rgb = decode_photo(photo)
        return rgb if resizing is None else resizing.apply(rgb)
    if not isinstance(photo, CheckedPhoto):
        photo = check(photo)
    data, kind = photo.data, photo.kind
    if photo.effort == Effort.CHEAP:
        image = open_photo(data, kind)
        if kind == "JPEG" or image.width * image.height <= CHEAP_PIXELS:
            rgb = decode_photo(image, data, None if resizing is None else resizing.side)
            return rgb if resizing is None else resizing.apply(rgb)
    return decode_elsewhere(data, kind, photo.effort, resizing, patience)


def resize(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """Resizes a photo (to a square, or by its short side) and crops its middle: RGB (S, S)."""
    return config.resizing.apply(image)


def seen_region(size: tuple[int, int], config: PreprocessConfig) -> Box:
    """The region of an upright photo of this size (width, height) that is the model's input, and
    that word maps cover: (x0, y0, x1, y1) as shares of the photo's width and height."""
    left, top, right, bottom = config.resizing.box(size)
    width, height = size
    return left / width, top / height, right / width, bottom / height


def to_tensor(image: Image.Image, config: PreprocessConfig) -> Tensor:
    """An RGB picture as float32 (3, height, width), scaled to 0-1 and normalized."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    pixels_CHW = pixels_HWC.permute(2, 0, 1).contiguous().float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return pixels_CHW.sub_(mean).div_(std)
