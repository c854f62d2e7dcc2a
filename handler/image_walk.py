"""Determines whether decoding a photo is certain to be cheap, and which of its bytes to decode.

Pillow loops in Python over the repeated parts of its formats: segments, chunks, extensions,
directory entries. A file of 16 MiB may contain millions of them. The functions of this module scan
a file in linear time without decoding it. For ordinary photos they show that decoding takes no
longer than the number of pixels requires; from a PNG they also remove what is not part of the
picture. Other photos are decoded in a process with a time limit (see `handler.decode_process`).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum

import numpy as np

# Limits for ordinary photos. Google's cameras write a depth map as hundreds of JPEG segments, and
# Photoshop writes a large PNG as thousands of chunks.
MAX_SEGMENTS, MAX_BLOCKS, MAX_ENTRIES, MAX_IMAGE_CHUNKS = 1000, 2000, 300, 2000
MAX_CHUNKS = 200_000
# A PNG or WebP of at most so many bytes is cheap, whatever it contains: empty blocks of a deflate
# stream, or thousands of a WebP's tables, cost 0.1 s per megabyte.
CHEAP_BYTES = 4 * 2**20
# Larger pictures take more than 0.3 s in the worst case; a JPEG is reduced as it is decoded.
CHEAP_PIXELS = 8_000_000
# Each scan of a progressive JPEG covers the whole picture. Encoders write about ten scans. A scan
# costs at most this many seconds per pixel, and all scans may take 0.3 s.
ORDINARY_SCANS, SECONDS_PER_SCANNED_PIXEL, SECONDS_OF_SCANS = 16, 1.5e-8, 0.3
# Fill bytes may precede a marker. Restart markers and a few others have no segment.
JPEG_MARKER = re.compile(rb"\xff{1,16}([\x02-\xcf\xda-\xfe])", re.DOTALL)
JPEG_TABLES, JPEG_SCAN, JPEG_EXIF, JPEG_PHOTOSHOP = 0xDB, 0xDA, 0xE1, 0xED
# Maximum bytes of all segments of a kind that Pillow parses in Python or joins. EXIF fits into one.
JPEG_BYTES = {JPEG_TABLES: 4096, JPEG_EXIF: 2**16, JPEG_PHOTOSHOP: 2**20}
JPEG_FRAME_BYTES = 8 + 3 * 4  # of a frame's header: four components
# Chunks of a PNG that change its pixels or its orientation; all others are left out.
PNG_ONCE = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IEND")
PNG_CHUNK = struct.Struct(">I4s")
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Pillow refuses a whole PNG for a text above 1 MiB. Orientation is written in far less: EXIF takes
# two hexadecimal digits a byte.
MAX_PNG_TEXT, MAX_PNG_TEXTS = 2**18, 50
# Bytes per value in a TIFF's directory entry, by type.
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
              16: 8, 17: 8, 18: 8}  # fmt: skip
# Strips or tiles: at most one per row in a picture of MAX_SIDE. Pillow needs 10 us for each.
MAX_STRIPS, CHEAP_STRIPS = 70_000, 5000
TIFF_STRIPS = (273, 279, 324, 325)
# Tiles may be larger than the picture; Pillow reads all values of the directories that it knows.
TIFF_TILES_AND_DIRECTORIES = (322, 34665, 34853, 40965)
TIFF_COMPRESSION, TIFF_UNCOMPRESSED = 259, 1


class Effort(IntEnum):
    """What is known about decoding a photo: CHEAP for its number of pixels; BOUNDED by its bytes
    and pixels, but not cheap; or nothing (UNKNOWN)."""

    CHEAP = 0
    BOUNDED = 1
    UNKNOWN = 2


def walk(data: bytes, kind: str) -> tuple[bytes, Effort]:
    """The bytes to decode, and what is known about decoding them. `kind` is Pillow's name of the
    format. Raises ValueError if the content cannot be a photo of this format."""
    if kind == "PNG":
        data = png_image(data)
        return data, Effort.CHEAP if len(data) <= CHEAP_BYTES else Effort.BOUNDED
    if kind == "JPEG":
        return jpeg_picture(data)
    return data, WALKS[kind](data) if kind in WALKS else Effort.BOUNDED


def jpeg_header(data: bytes) -> tuple[int, int] | None:
    """The offset of a JPEG's first scan and the number of pixels. None if the JPEG is neither
    baseline nor progressive, or if the segments before the scan are unusual."""
    position, pixels, spent = 2, None, dict.fromkeys(JPEG_BYTES, 0)
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.match(data, position)
        if marker is None or marker.end() + 9 > len(data):
            return None
        code, position = marker[1][0], marker.end()
        length = int.from_bytes(data[position : position + 2], "big")
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            # Beyond: lossless, arithmetic, hierarchical. Pillow lists the components of all frames.
            if code > 0xC2 or pixels is not None or length > JPEG_FRAME_BYTES:
                return None
            height, width = struct.unpack(">HH", data[position + 3 : position + 7])
            pixels = width * height
        is_other = code == JPEG_EXIF and data[position + 2 : position + 6] != b"Exif"
        if code in spent and not is_other:
            spent[code] += length
            if spent[code] > JPEG_BYTES[code]:
                return None
        position += length
        if code == JPEG_SCAN:
            return None if pixels is None else (position, pixels)
    return None


def jpeg_picture(data: bytes) -> tuple[bytes, Effort]:
    """A JPEG without the data after its end (a phone's second picture or video), and the effort:
    bounded if there are few segments and few scans, cheap for a baseline or small JPEG."""
    header = jpeg_header(data)
    if header is None:
        return data, Effort.UNKNOWN
    position, pixels = header
    # numpy finds two bytes in a photo of 2 MB in 0.5 ms, bytes.find() in 2 ms.
    bytes_N = np.frombuffer(data, np.uint8, offset=position)
    offset_M = np.flatnonzero(bytes_N[:-1] == 0xFF)
    codes_M = bytes_N[offset_M + 1]
    ends = np.flatnonzero(codes_M == 0xD9)
    if len(ends):
        codes_M = codes_M[: ends[0]]
        data = data[: position + int(offset_M[ends[0]]) + 2]
    # Counts scans anywhere, because libjpeg may see other ends of scans than this module.
    scans = 1 + int((codes_M == 0xDA).sum())
    seconds = (scans - 1) * SECONDS_PER_SCANNED_PIXEL * pixels
    # Within a scan, 0xff is a marker unless 0 or the number of a restart marker follows.
    markers = int(((codes_M != 0) & ((codes_M < 0xD0) | (codes_M > 0xD7))).sum())
    if scans > ORDINARY_SCANS or markers > MAX_SEGMENTS:
        return data, Effort.UNKNOWN
    return data, Effort.CHEAP if seconds < SECONDS_OF_SCANS else Effort.BOUNDED


def gif_effort(data: bytes) -> Effort:
    """Cheap if there are few blocks and sub-blocks before the first picture."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while position < len(data) and blocks < MAX_BLOCKS:
        introducer = data[position]
        if introducer == 0x2C:
            return Effort.CHEAP
        if introducer != 0x21:
            return Effort.UNKNOWN
        position += 2
        while position < len(data) and data[position] and blocks < MAX_BLOCKS:
            position += 1 + data[position]
            blocks += 1
        position += 1
        blocks += 1
    return Effort.UNKNOWN


def webp_effort(data: bytes) -> Effort:
    """Bounded if there are few chunks, and cheap if they and the picture are small. When it opens a
    WebP, Pillow allocates 8 bytes per pixel."""
    position, chunks = 12, 0
    while position + 8 <= len(data) and chunks <= MAX_BLOCKS:
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
        chunks += 1
    if chunks > MAX_BLOCKS:
        return Effort.UNKNOWN
    width, height = webp_size(data)
    cheap = len(data) <= CHEAP_BYTES and width * height <= CHEAP_PIXELS
    return Effort.CHEAP if cheap else Effort.BOUNDED


def webp_size(data: bytes) -> tuple[int, int]:
    """The width and height of a WebP, from the header of its first chunk."""
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
        return width + 1, height + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    sides = (int.from_bytes(data[start : start + 2], "little") for start in (26, 28))
    width, height = (side & 0x3FFF for side in sides)
    return width, height


def bmp_effort(data: bytes) -> Effort:
    """Cheap unless it is run-length encoded, which Pillow decodes in Python."""
    header = int.from_bytes(data[14:18], "little")
    plain = header == 12 or data[30:34] in (bytes(4), b"\x03\0\0\0", b"\x06\0\0\0")
    return Effort.CHEAP if plain else Effort.UNKNOWN


def tiff_effort(data: bytes) -> Effort:
    """Cheap for an uncompressed picture in few strips, in a directory of few entries and without
    further directories. The cost of a compressed picture depends on its strips, thousands of which
    may share the same bytes. Raises ValueError for millions of strips."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack(order + "H", data[2:4])[0] == 43
    try:
        [start] = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        [count] = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        size, head = (20, 8) if big else (12, 2)
        cheap, spent = count <= MAX_ENTRIES, 0
        for number in range(min(count, MAX_ENTRIES)):
            entry = start + head + number * size
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            [values] = struct.unpack_from(order + ("Q" if big else "I"), data, entry + 4)
            if tag in TIFF_STRIPS and values > MAX_STRIPS:
                raise ValueError(f"a TIFF of {values} strips")
            cheap &= tag not in TIFF_STRIPS or values <= CHEAP_STRIPS
            cheap &= tag not in TIFF_TILES_AND_DIRECTORIES
            spent += values * TIFF_SIZES.get(kind, 1)
            if tag == TIFF_COMPRESSION:
                [compression] = struct.unpack_from(order + "H", data, entry + (12 if big else 8))
                cheap &= compression == TIFF_UNCOMPRESSED
    except (struct.error, OverflowError):
        return Effort.UNKNOWN
    return Effort.CHEAP if cheap and spent <= len(data) else Effort.UNKNOWN


WALKS = {
    "GIF": gif_effort,
    "WEBP": webp_effort,
    "BMP": bmp_effort,
    "TIFF": tiff_effort,
}


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, end) of the content of every chunk up to IEND. Raises ValueError for too
    many chunks."""
    position, chunks = 8, 0
    while position + 12 <= len(data):
        length, name = PNG_CHUNK.unpack_from(data, position)
        yield name, position + 8, min(len(data), position + 8 + length)
        position += 12 + length
        chunks += 1
        if name == b"IEND":
            return
        if chunks > MAX_CHUNKS:
            raise ValueError(f"a PNG of more than {MAX_CHUNKS} chunks")


def png_image(data: bytes) -> bytes:
    """A PNG without its colour profile, further frames, duplicate chunks and long texts, and with
    its picture in one chunk if it had many. Unchanged if there is nothing to remove or join."""
    kept: list[tuple[int, int]] = []
    once: set[bytes] = set()
    dropped = pieces = texts = 0
    for name, start, end in png_chunks(data):
        pieces += name == b"IDAT"
        texts += name in PNG_TEXT
        if name in PNG_TEXT:
            keep = texts <= MAX_PNG_TEXTS and is_short_text(data, name, start, end)
        else:
            keep = name == b"IDAT" or (name in PNG_ONCE and name not in once)
        if keep:
            kept.append((start - 8, min(len(data), end + 4)))
            once.add(name)
        dropped += not keep
    if pieces > MAX_IMAGE_CHUNKS:
        return data[:8] + one_piece(data, kept)
    if dropped:
        return data[:8] + b"".join(data[start:end] for start, end in kept)
    return data


def one_piece(data: bytes, kept: list[tuple[int, int]]) -> bytes:
    """The chunks, with all pieces of the picture joined at the position of the first."""
    is_piece = [data[start + 4 : start + 8] == b"IDAT" for start, _ in kept]
    spans = list(zip(kept, is_piece, strict=True))
    picture = b"".join(data[start + 8 : end - 4] for (start, end), piece in spans if piece)
    chunks = [data[start:end] for (start, end), piece in spans if not piece]
    first = is_piece.index(True)
    before = sum(not piece for piece in is_piece[:first])
    body = b"IDAT" + picture
    joined = struct.pack(">I", len(picture)) + body + struct.pack(">I", zlib.crc32(body))
    return b"".join([*chunks[:before], joined, *chunks[before:]])


def is_short_text(data: bytes, name: bytes, start: int, end: int) -> bool:
    """Whether a text is valid and has less than `MAX_PNG_TEXT` bytes uncompressed."""
    if end - start > 2**16:
        return False
    content = data[start:end]
    if name == b"tEXt":
        return True
    key, _, rest = content.partition(b"\0")
    if name == b"zTXt":
        compressed = rest[1:]
    elif rest[:1] != b"\1":
        return True
    else:  # iTXt: flag, method, language, 0, translated key, 0, text
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(compressed, MAX_PNG_TEXT)
    except zlib.error:
        return False
    return len(text) < MAX_PNG_TEXT
