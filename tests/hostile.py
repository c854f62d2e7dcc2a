"""Photos that would take seconds to hours of a processor, or gigabytes, were nothing to stop them.
Each shows what a decoder repeats, allocates or takes apart in Python."""

import struct
import zlib
from collections.abc import Callable

from photos import chunk, encoded
from PIL import Image

RED = (200, 30, 40)
PICTURE = Image.new("RGB", (8, 8), RED)
ROOM = 2**24 - 4096
# Where a TIFF's first strip lies.
FIRST = 8


def flood(piece: bytes, room: int = ROOM) -> bytes:
    return piece * (room // len(piece))


# --- JPEG ---


def segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def full_segment(code: int, piece: bytes, start: bytes = b"") -> bytes:
    return segment(code, start + flood(piece, 65_533 - len(start)))


def segments(piece: bytes) -> bytes:
    """A JPEG behind as many such segments as fit."""
    photo = encoded(PICTURE, "JPEG", quality=95)
    return photo[:2] + flood(piece) + photo[2:]


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG with `count` further scans."""
    photo = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    return photo[:-2] + photo[photo.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


# --- PNG ---


def png_of(rows: bytes, size: int, depth: int, colour: int, *extra: bytes) -> bytes:
    lines = zlib.compress(b"".join(b"\0" + rows for _ in range(size)))
    return png_around(chunk(b"IDAT", lines), size, depth, colour, *extra)


def png_around(picture: bytes, size: int, depth: int, colour: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", size, size, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, picture, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def red_png(*extra: bytes) -> bytes:
    return png_of(bytes(RED) * 8, 8, 8, 2, *extra)


# A block of a deflate stream that holds nothing but two full Huffman tables and its end.
EMPTY_BLOCK = bytes.fromhex("ec1d036018306cb66ddbb66ddbb66ddbb66ddbb66ddcb66ddb4c6adb78248000")


def slow_deflate(content: bytes, room: int) -> bytes:
    """A zlib stream of this content behind as many empty blocks as fit."""
    stream = zlib.compress(content)
    return stream[:2] + flood(EMPTY_BLOCK, room) + stream[2:]


def keyed_png(side: int) -> bytes:
    """16 bits a channel and a colour that is transparent: Pillow decodes it twice for us."""
    deflate = zlib.compressobj(1)
    lines = b"".join(deflate.compress(bytes(1 + 6 * side)) for _ in range(side))
    picture = chunk(b"IDAT", lines + deflate.flush())
    return png_around(picture, side, 16, 2, chunk(b"tRNS", bytes(6)))


# --- BMP ---


def bmp(
    width: int, height: int, bits: int, compression: int, content: bytes, **more: bytes
) -> bytes:
    masks, palette = more.get("masks", b""), more.get("palette", b"")
    header = 56 if masks else 40
    info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(content),
                       2835, 2835, len(palette) // 4, 0) + masks + palette  # fmt: skip
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + len(info) + len(content), 0, 0, 14 + len(info))
        + (info + content)
    )


# --- TIFF ---


def tiff(entries: list[tuple[int, int, int, bytes]], first: bytes, order: str = "<") -> bytes:
    """A TIFF of one directory, (tag, type, count, values) an entry, behind the bytes at FIRST."""
    first += bytes(len(first) % 2)
    start = FIRST + len(first)
    fields, values_at, blobs = b"", start + 2 + 12 * len(entries) + 4, b""
    for tag, kind, count, value in sorted(entries):
        packed = value.ljust(4, b"\0")
        if len(value) > 4:
            packed = struct.pack(order + "I", values_at + len(blobs))
            blobs += value
        fields += struct.pack(order + "HHI", tag, kind, count) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + first + struct.pack(order + "H", len(entries)) + fields + bytes(4) + blobs


def longs(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def grey(width: int, height: int, compression: int) -> list[tuple[int, int, int, bytes]]:
    """Entries of 8 bits a pixel, but for where the pixels are."""
    shorts = {258: 8, 259: compression, 262: 1, 277: 1}
    return [(256, 4, 1, longs(width)), (257, 4, 1, longs(height))] + [
        (tag, 3, 1, struct.pack("<H", value)) for tag, value in shorts.items()
    ]


def grey_tiff(
    strip: bytes, bits: int, photometric: int = 1, order: str = "<", form: int = 1,
    compression: int = 1, samples: int = 1,
) -> bytes:  # fmt: skip
    """16 x 16 pixels."""
    short = lambda *values: struct.pack(order + "H" * len(values), *values)  # noqa: E731
    entries = [(256, 3, 1, short(16)), (257, 3, 1, short(16)), (259, 3, 1, short(compression)),
               (258, 3, samples, short(*[bits] * samples)), (262, 3, 1, short(photometric)),
               (273, 4, 1, struct.pack(order + "I", FIRST)), (277, 3, 1, short(samples)),
               (278, 3, 1, short(16)), (279, 4, 1, struct.pack(order + "I", len(strip))),
               (339, 3, samples, short(*[form] * samples))]  # fmt: skip
    return tiff(entries, strip, order)


def same_strips(width: int, rows: int, count: int, compression: int, strip: bytes) -> bytes:
    """A TIFF of `count` strips of so many rows, all the same bytes of the file."""
    entries = [(278, 4, 1, longs(rows)), (273, 4, count, longs(*[FIRST] * count)),
               (279, 4, count, longs(*[len(strip)] * count))]  # fmt: skip
    return tiff(grey(width, rows * count, compression) + entries, strip)


def huge_tile(side: int) -> bytes:
    """16 x 16 pixels in a tile of nothing."""
    deflate = zlib.compressobj(9)
    strip = b"".join(deflate.compress(bytes(side)) for _ in range(side)) + deflate.flush()
    entries = [(322, 4, 1, longs(side)), (323, 4, 1, longs(side)), (324, 4, 1, longs(FIRST)),
               (325, 4, 1, longs(len(strip)))]  # fmt: skip
    return tiff(grey(16, 16, 8) + entries, strip)


def exif_numbers() -> bytes:
    """A TIFF whose EXIF is one entry of two million fractions."""
    count = ROOM // 8 - 100
    directory = struct.pack("<HHHII", 1, 40_000, 5, count, FIRST + 18) + bytes(4)
    entries = [(278, 4, 1, longs(16)), (273, 4, 1, longs(FIRST)), (279, 4, 1, longs(256)),
               (34665, 4, 1, longs(FIRST))]  # fmt: skip
    return tiff(grey(16, 16, 1) + entries, directory + longs(1) * 2 * count)


MEGABYTE = zlib.compress(bytes(2**20 - 1), 9)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "jpeg, tiny EXIF segments": lambda: segments(segment(0xE1, b"Exif\0\0" + b"0123456789")),
    "jpeg, empty comments": lambda: segments(segment(0xFE, b"")),
    "jpeg, empty APP0": lambda: segments(segment(0xE0, b"")),
    "jpeg, Photoshop resources": lambda: segments(
        segment(0xED, b"Photoshop 3.0\x008BIM" + bytes(8))
    ),
    "jpeg, ICC pieces": lambda: segments(segment(0xE2, b"ICC_PROFILE\0\1\xff")),
    "jpeg, quantisation tables": lambda: segments(segment(0xDB, bytes(65))),
    "jpeg, full segments of Photoshop resources": lambda: segments(
        full_segment(0xED, b"8BIM" + bytes(8), b"Photoshop 3.0\0")
    ),
    "jpeg, full segments of quantisation tables": lambda: segments(full_segment(0xDB, bytes(65))),
    "jpeg, frames of thousands of components": lambda: segments(
        full_segment(0xC0, b"\1\x11\0", b"\x08\0\x08\0\x08\3")
    ),
    "jpeg, EXIF of megabytes": lambda: segments(
        full_segment(0xE1, b"\0", b"Exif\0\0II*\0\x08\0\0\0")
    ),
    "jpeg, fill bytes": lambda: segments(b"\xff"),
    "jpeg, thousands of scans": lambda: scans(3990, 5000),
    "jpeg, comments behind the first scan": lambda: encoded(PICTURE, "JPEG")[:-2]
    + flood(segment(0xFE, b"")) + b"\xff\xd9",
    "png, colour profiles": lambda: red_png(flood(chunk(b"iCCP", b"a\0\0" + MEGABYTE))),
    "png, compressed texts": lambda: red_png(flood(chunk(b"zTXt", b"a\0\0" + MEGABYTE))),
    "png, international texts": lambda: red_png(
        flood(chunk(b"iTXt", b"a\0\1\0\xff\0\0" + MEGABYTE))
    ),
    "png, empty texts": lambda: red_png(flood(chunk(b"tEXt", b"a\0"))),
    "png, empty EXIF": lambda: red_png(flood(chunk(b"eXIf", b""))),
    "png, unknown chunks": lambda: red_png(flood(chunk(b"xxXx", b""))),
    "png, frame controls": lambda: red_png(
        chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), flood(chunk(b"fcTL", bytes(26)))
    ),
    "png, empty pieces of the picture": lambda: red_png(flood(chunk(b"IDAT", b""))),
    "png, blocks that hold nothing": lambda: png_around(
        chunk(b"IDAT", slow_deflate((b"\0" + bytes(RED) * 8) * 8, ROOM - 4096)), 8, 8, 2
    ),
    "png, 64 megapixels of a transparent colour": lambda: keyed_png(7990),
    "png, 63 megapixels of a kilobyte": lambda: png_of(bytes(3), 7999, 8, 2),
    "gif, empty comments": lambda: encoded(PICTURE, "GIF")[:13] + bytes(3 * 256)
    + flood(b"!\xfe\x01a\x00") + b"\x3b",
    "gif, a comment of one-byte blocks": lambda: encoded(PICTURE, "GIF")[:13] + b"!\xfe"
    + flood(b"\x01a"),
    "bmp, run length, one pixel a run": lambda: bmp(
        8000, 1000, 8, 1, (b"\1\5" * 8000 + b"\0\0") * 1000, palette=bytes(1024)
    ),
    "bmp, ends of lines": lambda: bmp(8000, 8000, 8, 1, b"\1\5\0\0" * 8000, palette=bytes(1024)),
    "bmp, 4 bits, ends of lines": lambda: bmp(
        8000, 8000, 4, 2, b"\1\5\0\0" * 8000, palette=bytes(64)
    ),
    "tiff, millions of strips": lambda: tiff(
        [*grey(9, 8, 1), (278, 4, 1, longs(1)), (273, 1, ROOM, bytes(ROOM)), (279, 4, 1, longs(9))],
        b""),
    "tiff, millions of numbers": lambda: tiff(
        [*grey(9, 8, 1), (65000, 3, ROOM // 2, bytes(ROOM))], b""),
    "tiff, EXIF of millions of numbers": exif_numbers,
    "tiff, strips of the same slow bytes": lambda: same_strips(
        8, 1, 4000, 8, slow_deflate(bytes(8), 200_000)
    ),
    "tiff, strips of eighty JPEG scans": lambda: same_strips(1600, 1600, 16, 7, scans(1600, 80)),
    "tiff, a tile of a gigabyte": lambda: huge_tile(32768),
    "webp, empty chunks": lambda: b"RIFF" + struct.pack("<I", ROOM)
    + b"WEBPVP8X\x0a\0\0\0" + bytes(10)
    + flood(b"XXXX\0\0\0\0"),
    "webp, 64 megapixels": lambda: encoded(
        Image.new("RGB", (7990, 7990), RED), "WEBP", lossless=True, quality=0, method=0
    ),
    "avif that is none": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(ROOM),
    "heic that is none": lambda: b"\0\0\0\x1cftypheic\0\0\0\0heicmif1" + bytes(ROOM),
}  # fmt: skip

# Of those whose header names many.
MEGAPIXELS = {
    "jpeg, thousands of scans": 15.9,
    "png, 63 megapixels of a kilobyte": 64,
    "png, 64 megapixels of a transparent colour": 64,
    "bmp, run length, one pixel a run": 8,
    "bmp, ends of lines": 64,
    "bmp, 4 bits, ends of lines": 64,
    "tiff, strips of eighty JPEG scans": 41,
    "webp, 64 megapixels": 64,
}
