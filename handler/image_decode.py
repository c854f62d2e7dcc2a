"""Decodes the bytes of a photo to an RGB picture, in this process. This module does not import
torch, so that the separate process for slow photos (see `handler.decode_process`) starts quickly.

Formats are detected from the content. Colour profiles are ignored, as by torchvision and Hugging
Face.
"""

import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Imported to register them: Pillow itself would register them only with all other plugins.
from PIL import AvifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

from handler.errors import ImageTooLarge, InvalidImage
from handler.image_walk import webp_size

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 64_000_000
# The limit of JPEG. Pillow needs 8 bytes per row besides the pixels.
MAX_SIDE = 65_535
# Pixels converted to RGB at a time. Pillow stores 4 bytes per pixel: with 64 megapixels, the
# picture and its RGB have 490 MiB. A full-size intermediate (float64, an alpha mask) adds as much.
BAND_PIXELS = 2**20

FORMATS = "JPEG, PNG, WebP, AVIF, HEIC, BMP, GIF and TIFF"
# The suffixes that cameras and programs use for these formats.
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif"),
    *(".bmp", ".gif", ".tif", ".tiff"),
)
# Sizes of BMP headers, because a text may also begin with "BM".
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)

# The transpositions that undo EXIF's orientations 2 to 8.
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
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1
WEBP_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X")  # one of which is the first


# Big-endian 32-bit unsigned integers, which Pillow supports only in little-endian order. They are
# read as signed ones, which have the same bits.
TiffImagePlugin.OPEN_INFO[TiffImagePlugin.MM, 1, (1,), 1, (32,), ()] = ("I", "I;32BS")


def open_photo(data: bytes, kind: str) -> Image.Image:
    """Reads and checks the header of a photo; no pixel is decoded yet."""
    if kind == "WEBP" and data[12:16] in WEBP_CHUNKS and math.prod(webp_size(data)) > MAX_PIXELS:
        # Pillow's plugin takes memory for all pixels before it tells their number.
        raise too_many_pixels()
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_many_pixels() from error
    except MemoryError:
        raise
    except Exception as error:  # see decode_photo()
        if kind == "TIFF" and is_unknown_tiff(data):
            raise InvalidImage("this kind of TIFF is not supported") from error
        raise InvalidImage("the image is damaged: its header cannot be read") from error
    check_size(image.size)
    return image


def is_unknown_tiff(data: bytes) -> bool:
    """Whether a TIFF is valid, but has a pixel format for which Pillow has no mode."""
    try:
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        return "unknown" in str(error)
    except Exception:
        return False
    return False


def decode_photo(image: Image.Image, data: bytes = b"", min_side: int | None = None) -> Image.Image:
    """Converts an opened photo to RGB, upright and with alpha over white; of several frames or
    pages the first. `data` are the bytes from which it was opened; empty for a PIL image.

    Raises InvalidImage, and MemoryError if the memory limit of the process is reached.
    """
    try:
        if data and min_side is not None:
            image.draft("RGB", (2 * min_side, 2 * min_side))
        if image.format == "TIFF":
            in_native_order(image)
        if data and "_decoder" in vars(image):  # a PIL image is its caller's: it is not changed
            vars(image)["_decoder"] = OneFrame(vars(image)["_decoder"])
        image.load()
        turn = orientation(image)
        if data:
            # WebP and AVIF keep another copy of the pixels here, HEIC of several pictures here.
            image.fp = None  # type: ignore[attr-defined]
            vars(image).pop("_heif_file", None)
        rgb = to_rgb(image, data)
        del image  # before a turned copy is made
        return rgb if turn is None else rgb.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:
        # Pillow raises a dozen types of exceptions for damaged files (OSError, SyntaxError,
        # struct.error, TypeError, ...).
        raise InvalidImage("the image is damaged or truncated: it cannot be decoded") from error


class OneFrame:
    """Pillow's decoder of a WebP or AVIF, released after one frame. Its buffers take 8 bytes per
    pixel, which would otherwise be held while the frame is copied."""

    def __init__(self, decoder: Any) -> None:
        self.decoders = [decoder]

    def get_next(self) -> Any:
        return self.decoders.pop().get_next()

    def get_frame(self, number: int) -> Any:
        return self.decoders.pop().get_frame(number)


def in_native_order(image: Image.Image) -> None:
    """Corrects the byte order that Pillow assumes: libtiff returns 32-bit values in the order of
    the machine, independent of the file's."""
    if sys.byteorder == "little":
        image.tile = [  # type: ignore[attr-defined]
            tile._replace(args=(re.sub("^(F;32|I;32)B", r"\1", tile.args[0]), *tile.args[1:]))
            if tile.codec_name == "libtiff"
            else tile
            for tile in image.tile  # type: ignore[attr-defined]
        ]


def sniff(data: bytes) -> str | None:
    """Detects the format from the first bytes: Pillow's name, or None for any other content."""
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
    if data[4:8] == b"ftyp":
        return sniff_brands(data)
    return None


def sniff_brands(data: bytes) -> str | None:
    """AVIF or HEIF, by the brands of an ISO base media file; None for videos."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[start : start + 4] for start in (8, *range(16, size - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return "HEIF"
    return None


def check_size(size: tuple[int, int]) -> None:
    """Refuses pictures without pixels or with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage("the image has no pixels")
    if width * height > MAX_PIXELS:
        raise too_many_pixels()
    if max(width, height) > MAX_SIDE:
        raise ImageTooLarge(f"the image has a side of more than {MAX_SIDE} pixels")


def too_many_pixels() -> ImageTooLarge:
    return ImageTooLarge(f"the image has more than {MAX_PIXELS // 10**6} megapixels")


def to_rgb(image: Image.Image, data: bytes = b"") -> Image.Image:
    """Converts any mode of Pillow to 8-bit RGB."""
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getextrema()[1]:
        # An alpha channel of zeros was never filled: browsers show such a picture as opaque.
        return image.convert("RGB")
    keyed = "transparency" in image.info and image.mode in ("1", "L", "RGB")
    if data and image.format == "PNG" and keyed:
        return over_white_by_key(image, data)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = white_level(image)
    rgb = Image.new("RGB", image.size)
    for top, band in bands(image):
        rgb.paste(band_to_rgb(band, white), (0, top))
    return rgb


def over_white_by_key(image: Image.Image, data: bytes) -> Image.Image:
    """Replaces the transparent colour of a PNG by white. This colour has as many bits as the file;
    Pillow would compare it with the decoded pixels, which have 8 bits per channel."""
    bits, key = data[24], image.info.pop("transparency")
    low = None
    if image.mode == "RGB" and bits == 16:
        # Decode the PNG again for the low byte of each channel.
        low = Image.open(io.BytesIO(data), formats=["PNG"])
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
    elif image.mode != "RGB":
        key = key * 255 // (2**bits - 1)
    rgb = image.convert("RGB") if image.mode != "RGB" else image
    for top, band in bands(image):
        if low is None:
            hidden = is_colour(band, key)
        else:
            box = (0, top, low.width, top + band.height)
            hidden = is_colour(band, [value >> 8 for value in key])
            hidden &= is_colour(low.crop(box), [value & 255 for value in key])
        rgb.paste((255, 255, 255), (0, top), Image.fromarray(hidden.astype(np.uint8) * 255))
    return rgb


def is_colour(image: Image.Image, colour: int | Sequence[int]) -> np.ndarray:
    """Which pixels have exactly this colour: booleans (height, width)."""
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if isinstance(colour, int):
        return pixels == colour
    # One channel after the other: numpy takes five times as long to reduce an axis of three.
    red, green, blue = (pixels[..., channel] == value for channel, value in enumerate(colour))
    return red & green & blue


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields the picture in horizontal bands of about BAND_PIXELS: (top row, band)."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def white_level(image: Image.Image) -> float:
    """The value of white in a picture with more than 8 bits per pixel. Integers have 16 bits, or 12
    or 32 in some TIFFs; floats are fractions (if none is above 1) or 8-bit levels. Negative if 0 is
    white."""
    tags = getattr(image, "tag_v2", {})
    sign = -1 if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else 1
    if image.mode == "F":
        return sign if all(finite(band).max() <= 1 for _, band in bands(image)) else 255 * sign
    bits = tags.get(TIFF_BITS_PER_SAMPLE)
    if bits == (32,) and tags.get(TIFF_SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,):
        return sign * (2**32 - 1)
    return sign * (4095 if bits == (12,) else 65535)


def band_to_rgb(image: Image.Image, white_level: float) -> Image.Image:
    if image.mode.startswith("I"):
        image = from_integers(image, abs(int(white_level)), white_level < 0)
    elif image.mode == "F":
        values = finite(image) * (255 / abs(white_level))
        levels = values.round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - levels if white_level < 0 else levels)
    elif image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def from_integers(image: Image.Image, highest: int, inverted: bool) -> Image.Image:
    """Converts 16 bits per pixel to grey levels, value / 257 rounded (Pillow clips at 255).

    A 12-bit TIFF has its values in the low bits, a 32-bit TIFF as signed integers with the same
    bits. 16-bit colour is not handled here: Pillow reads it as 8 bits by dropping the low byte,
    which is wrong by one level at most.
    """
    values = np.asarray(image)
    if highest > 65535:
        values, highest = values.view(np.uint32) >> 16, 65535
    levels = ((np.arange(65536) * 255 + highest // 2) // highest).clip(0, 255).astype(np.uint8)
    grey = Image.fromarray((255 - levels if inverted else levels)[values.clip(0, 65535)])
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def finite(image: Image.Image) -> np.ndarray:
    """The values of a float picture; values that are not finite become black."""
    return np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that undoes the camera's rotation, by the EXIF of a loaded picture. (Pillow
    rotates a TIFF when it loads it, and removes the EXIF tag.)"""
    try:
        return ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return None
