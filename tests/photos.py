"""Photographs for the tests: drawn, encoded, and made by hand where no encoder would."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


def smooth(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """A picture without hard edges, so that lossy formats stay near it."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def natural(width: int, height: int) -> Image.Image:
    """Smooth colours under noise, about as hard to code as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = pixels + rng.normal(0, 4, pixels.shape).astype(np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG made by hand: Pillow writes neither 16-bit colour nor false headers."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def huge_headers() -> dict[str, bytes]:
    """A few bytes that promise more pixels than there is memory for."""
    side = 30_000
    gif = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(6)
    gif += b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0\x02\x02D\x01\0;"
    bmp = b"BM" + struct.pack("<IIIIiiHHIIiiII", 90, 0, 54, 40, side, side, 1, 24, 0, *[0] * 5)
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    tiff = bytearray(encoded(Image.new("L", (8, 8)), "TIFF"))
    for tag in (256, 257):
        found = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff[found + 8 : found + 12] = struct.pack("<I", side)
    webp = bytearray(encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP"))
    size = webp.index(b"VP8X") + 12
    webp[size : size + 6] = struct.pack("<I", 16_000)[:3] * 2
    return {
        "PNG": png(side, side, 8, 6, b""),
        "GIF": gif,
        "BMP": bmp,
        "JPEG": bytes(jpeg),
        "TIFF": bytes(tiff),
        "WEBP": bytes(webp),
    }


def write_mixed_folder(folder: Path) -> Path:
    """Three photos, one in a folder below and one without a suffix, beside what is none."""
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.jpg", "deeper/b.PNG"):
        Image.new("RGB", (4, 4)).save(folder / name)
    Image.new("RGB", (4, 4)).save(folder / "no_suffix", "WEBP")
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder
