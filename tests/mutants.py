"""Photographs that were tampered with: what a hostile or broken client may send."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from photos import FORMATS, chunk, encoded, heic, huge_headers, png, smooth
from PIL import Image

SIGNATURES = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x24\0\0\0WEBPVP8 ", b"GIF89a"]
SIGNATURES += [b"\0\0\0\x1cftyp" + brand + b"\0\0\0\0mif1" for brand in (b"avif", b"heic")]
SIGNATURES += [b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0"]
# Numbers that a header should not hold.
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 65_535, 16_383, 30_000]
OTHER_CONTENT = {
    "text": b"a photograph of a dog",
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "HTML": b"<html><script>alert(1)</script></html>",
    "film": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "zip": b"PK\x03\x04\x14\0\0\0\0\0" + bytes(30),
    "pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x02os\x94.",
    "metric": b"[METRICS]evil.Count:1|#a:b|#type:COUNTER|#hostname:x,1",
    "nothing but zeros": bytes(1000),
}


def originals() -> dict[str, bytes]:
    """Sound photographs of every format and many modes, small so that mutations hit something."""
    photo, frames = smooth(40, 30), [smooth(20, 16, seed) for seed in range(3)]
    wide = Image.fromarray((np.arange(40 * 30).reshape(30, 40) * 50).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {kind: encoded(photo, kind) for kind in FORMATS}
    found |= {f"{kind} in grey": encoded(photo.convert("L"), kind) for kind in FORMATS}
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        found[f"{kind} of three"] = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:]
        )
    alpha = photo.copy()
    alpha.putalpha(photo.convert("L"))
    kinds = ("PNG", "WEBP", "TIFF", "AVIF")
    found |= {f"{kind} with alpha": encoded(alpha, kind) for kind in kinds}
    found |= {"AVIF": encoded(photo, "AVIF", exif=exif.tobytes()), "HEIC with alpha": heic(alpha)}
    found |= {"HEIC": heic(photo, exif=exif.tobytes()), "HEIC in grey": heic(photo.convert("L"))}
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[name] = encoded(photo, "TIFF", compression=name)
    return found | {
        "progressive JPEG": encoded(photo, "JPEG", progressive=True, exif=exif),
        "CMYK JPEG": encoded(photo.convert("CMYK"), "JPEG"),
        "palette PNG": encoded(photo.convert("P"), "PNG", transparency=3),
        "16-bit PNG": encoded(wide, "PNG"),
        "16-bit TIFF": encoded(wide, "TIFF"),
        "float TIFF": encoded(photo.convert("F"), "TIFF"),
        "lossless WebP": encoded(photo, "WEBP", lossless=True, exif=exif.tobytes()),
    }


def mutants(
    count: int, seed: int, sound: dict[str, bytes] | None = None
) -> Iterator[tuple[str, bytes]]:
    """`count` mutated photographs with the recipe of each; the same seed gives the same ones.
    `sound` are what they are made of: `originals()` unless given."""
    chance = random.Random(seed)
    sound = sound or originals()
    for number in range(count):
        name = chance.choice(list(sound))
        mutate = chance.choice(MUTATIONS)
        data = bytearray(sound[name])
        mutate(data, chance, sound[chance.choice(list(sound))])
        yield f"{number} of seed {seed}: {name}, {mutate.__name__}", bytes(data)


def flip(data: bytearray, chance: random.Random, other: bytes) -> None:
    for _ in range(chance.choice((1, 3, 30))):
        data[chance.randrange(len(data))] = chance.randrange(256)


def flip_in_the_header(data: bytearray, chance: random.Random, other: bytes) -> None:
    for _ in range(chance.choice((1, 3))):
        data[chance.randrange(min(120, len(data)))] ^= 1 << chance.randrange(8)


def write_extremes(data: bytearray, chance: random.Random, other: bytes) -> None:
    """Absurd dimensions, lengths, offsets and counts."""
    for _ in range(chance.choice((1, 2, 4))):
        layout = chance.choice(("<I", ">I", "<H", ">H"))
        size = struct.calcsize(layout)
        place = chance.randrange(min(200, len(data) - size))
        value = chance.choice(EXTREMES) % 256**size
        data[place : place + size] = struct.pack(layout, value)


def truncate(data: bytearray, chance: random.Random, other: bytes) -> None:
    del data[chance.randrange(len(data)) :]


def cut_out(data: bytearray, chance: random.Random, other: bytes) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice((1, 10, 200))]


def repeat(data: bytearray, chance: random.Random, other: bytes) -> None:
    start = chance.randrange(len(data))
    part = data[start : start + chance.choice((4, 50, 1000))]
    data[start:start] = part * chance.choice((1, 10, 100))


def give_the_header_of_another_format(data: bytearray, chance: random.Random, other: bytes) -> None:
    signature = chance.choice(SIGNATURES)
    data[: chance.choice((0, len(signature)))] = signature


def splice(data: bytearray, chance: random.Random, other: bytes) -> None:
    data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]


def append(data: bytearray, chance: random.Random, other: bytes) -> None:
    """Polyglots: a photograph that is something else as well."""
    data += chance.choice([other, *OTHER_CONTENT.values(), bytes(100_000)])


def prepend(data: bytearray, chance: random.Random, other: bytes) -> None:
    data[:0] = chance.choice([other, *OTHER_CONTENT.values(), b"\n", b"\xef\xbb\xbf"])


MUTATIONS = (
    flip,
    flip_in_the_header,
    write_extremes,
    truncate,
    cut_out,
    repeat,
    give_the_header_of_another_format,
    splice,
    append,
    prepend,
)


def bombs() -> dict[str, bytes]:
    """Small files that ask for much, all of which are to be refused, or cost little."""
    unpacked = b"a\0\0" + zlib.compress(bytes(50 * 2**20))
    rows = bytes(72)
    found = {f"{kind} of 900 megapixels": data for kind, data in huge_headers().items()}
    frames = [Image.new("L", (8, 8), i % 256) for i in range(1000)]
    jpeg = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    tags = b"".join(struct.pack("<HHII", 65_000, 2, 2**31, 8) for _ in range(5000))
    itself = struct.pack("<HHIII", 256, 3, 1, 8, 8)
    return found | {
        "a line of pixels": png(1, 64_000_000, 8, 0, b""),
        "PNG of 50 MiB of text": png(8, 8, 8, 0, rows, chunk(b"zTXt", unpacked)),
        "PNG of 50 MiB of profile": png(8, 8, 8, 0, rows, chunk(b"iCCP", unpacked)),
        "PNG of more rows than it has": png(8000, 8000, 8, 6, bytes(100)),
        "PNG of less rows than it has": png(8, 8, 8, 0, bytes(50 * 2**20)),
        "GIF of a thousand frames": encoded(
            frames[0], "GIF", save_all=True, append_images=frames[1:]
        ),
        "JPEG of ten thousand scans": jpeg[:-2] + 10_000 * scan + b"\xff\xd9",
        "TIFF of endless tags": b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + tags + bytes(4),
        "TIFF that is its own next page": b"II*\0\x08\0\0\0\x01\0" + itself,
        "a signature alone": b"\x89PNG\r\n\x1a\n",
    }


def greatest() -> dict[str, bytes]:
    """Photographs of 64 megapixels, the most that is taken, in a few kilobytes each."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8000, 8000), (1, 2, 3, 128)).save(
        buffer, "WEBP", lossless=True, quality=0, method=0
    )
    row = b"\0" + bytes(8000 * 4)
    return {"WebP": buffer.getvalue(), "PNG": png(8000, 8000, 8, 6, row * 8000)}
