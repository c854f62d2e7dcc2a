"""A photograph's bytes -> RGB picture -> normalised tensor.

The only preprocessing there is: training, evaluation and serving all come through here, so that a
model never sees two versions of one photo. Formats are told by content. Colour profiles are
ignored, as torchvision and Hugging Face ignore them.
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch

# Pillow registers these two only with all of its other plugins, none of which is wanted here.
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401
from torch import Tensor

from handler.errors import UserError

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 64_000_000
# JPEG's own limit. Pillow pays 8 bytes a row beside the pixels: 1 x 64,000,000 takes a gigabyte.
MAX_SIDE = 65_535
# A progressive JPEG repeats itself over the whole picture once a scan. Encoders write about ten; a
# file of thousands of nearly empty ones is small, passes the pixel limit and takes minutes. The
# larger the picture, the fewer are taken: eight such files may share a batch.
MAX_JPEG_SCANS, MAX_SCANNED_PIXELS = 100, 20 * MAX_PIXELS
# Pixels converted to RGB at a time. Pillow holds 4 bytes a pixel: at 64 megapixels, the picture and
# its RGB are 490 MiB, and each whole intermediate (float64, an alpha mask) would be as much again.
BAND_PIXELS = 2**20

FORMATS = "JPEG, PNG, WebP, BMP, GIF and TIFF"
# Sizes of the BMP headers in use: "BM" alone also begins many a text.
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)

# EXIF's orientations 2 to 8, undone.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112
TIFF_BITS_PER_SAMPLE = 258

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class InvalidImage(UserError):
    """It starts like a photo of a known format but cannot be decoded."""


class UnsupportedMediaType(InvalidImage):
    """It is not of a known format at all."""


class ImageTooLarge(InvalidImage):
    """More bytes or more pixels than are taken."""


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
    photo: bytes | bytearray | memoryview | Image.Image, min_side: int | None = None
) -> Image.Image:
    """A photo in RGB, upright, its alpha laid over white; the first frame or page.

    With `min_side` (the side it will be resized to), a large JPEG is decoded at 1/2, 1/4 or 1/8 of
    its size, in the frequency domain, as long as both sides stay at least twice `min_side`: several
    times faster. tests/test_image_preprocess.py bounds what that changes after the resize.

    Raises InvalidImage, or its kinds UnsupportedMediaType and ImageTooLarge.
    """
    if isinstance(photo, Image.Image):
        check_size(photo.size)
        image = photo
    else:
        image = open_photo(photo)
    try:
        if min_side is not None and image is not photo:
            image.draft("RGB", (2 * min_side, 2 * min_side))
        image.load()
        turn = orientation(image)
        if image is not photo:
            # WebP keeps another copy of the pixels here.
            image.fp = None  # type: ignore[attr-defined]
        rgb = to_rgb(image)
        del image  # before a turned copy is made
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:
        # Pillow meets damage with a dozen kinds of exception (OSError, SyntaxError, struct.error,
        # TypeError, MemoryError, ...): whatever it cannot decode is not a photo.
        raise InvalidImage("the image is damaged or truncated: it cannot be decoded") from error


def open_photo(data: bytes | bytearray | memoryview) -> Image.Image:
    """The photo's header, read and checked; no pixel is decoded yet."""
    data = bytes(data)
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"the image has more than {MAX_BYTES // 2**20} MiB")
    if not data:
        raise InvalidImage("the image is empty")
    kind = sniff(data)
    if kind is None:
        raise UnsupportedMediaType(f"the content is none of {FORMATS}")
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_many_pixels() from error
    except Exception as error:  # see decode()
        raise InvalidImage("the image is damaged: its header cannot be read") from error
    check_size(image.size)
    if kind == "JPEG":
        most = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
        if jpeg_scans(data, most) > most:
            raise InvalidImage(f"the image has more than {most} JPEG scans")
    return image


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that `data` starts like, None for any other content."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    reserved, header = data[6:10], int.from_bytes(data[14:18], "little")
    if data.startswith(b"BM") and (reserved == bytes(4) or header in BMP_HEADERS):
        return "BMP"
    return None


def jpeg_scans(data: bytes, most: int) -> int:
    """How many scans a JPEG has before its end; counts no further than `most` + 1.

    Walks the markers: application segments (thumbnails) and what follows the end (the second
    picture or the film of a phone's photo) are not looked into.
    """
    # Within a scan 0xff is a marker unless 0 or a restart marker follows; more 0xff are padding.
    marker = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
    scans, position = 0, 2
    while scans <= most:
        found = marker.search(data, position)
        if found is None or found[1] == b"\xd9":
            break
        scans += found[1] == b"\xda"
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        position = found.end() + (length if found[1] != b"\x01" else 0)
    return scans


def check_size(size: tuple[int, int]) -> None:
    """Refuses pictures of no pixel or of too many."""
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage("the image has no pixels")
    if width * height > MAX_PIXELS:
        raise too_many_pixels()
    if max(width, height) > MAX_SIDE:
        raise ImageTooLarge(f"the image has a side of more than {MAX_SIDE} pixels")


def too_many_pixels() -> ImageTooLarge:
    return ImageTooLarge(f"the image has more than {MAX_PIXELS // 10**6} megapixels")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow decodes to, as 8-bit RGB."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = white_level(image)
    rgb = Image.new("RGB", image.size)
    for top, band in bands(image):
        rgb.paste(band_to_rgb(band, white), (0, top))
    return rgb


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in horizontal bands of about BAND_PIXELS: (top row, band)."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def white_level(image: Image.Image) -> float:
    """The value that is white where a pixel is a number of more than 8 bits: integers have 16 bits,
    or 12 in some TIFFs; floats hold fractions (nothing above 1) or 8-bit levels."""
    if image.mode == "F":
        return 1 if all(finite(band).max() <= 1 for _, band in bands(image)) else 255
    bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE)
    return 4095 if bits == (12,) else 65535


def band_to_rgb(image: Image.Image, white_level: float) -> Image.Image:
    if image.mode.startswith("I"):
        image = from_integers(image, int(white_level))
    elif image.mode == "F":
        values = finite(image) * (255 / white_level)
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def from_integers(image: Image.Image, highest: int) -> Image.Image:
    """16 bits a pixel as grey levels, value / 257 rounded (Pillow itself would clip at 255).

    12-bit TIFF arrives in the low bits. Colour of 16 bits never arrives here: Pillow reads it as
    8 bits by dropping the low byte, at most one level off.
    """
    levels = ((np.arange(65536) * 255 + highest // 2) // highest).clip(0, 255).astype(np.uint8)
    values = np.asarray(image).clip(0, 65535)
    grey = Image.fromarray(levels[values])
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def finite(image: Image.Image) -> np.ndarray:
    """The values of a float picture; what is no number is black."""
    return np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What undoes the camera's rotation, as the EXIF of a loaded picture tells it (a TIFF is
    turned by Pillow as it loads, and then tells nothing)."""
    try:
        return ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return None


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
