"""A caption into a photo's own metadata, as the alternative text that screen readers and photo
programs read: XMP's `Iptc4xmpCore:AltTextAccessibility` (IPTC Photo Metadata Standard 2021.1).

Nothing is decoded or encoded again: the packet is put into the file's own frame (a JPEG segment, a
PNG or WebP chunk) and every other byte stays where it was. An XMP packet that is there is kept, and
the text is added to it; a photo that has an alternative text already keeps that.
"""

import os
import re
import stat
import struct
import zlib
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from handler.errors import UserError
from handler.files import write_atomic
from handler.image_preprocess import sniff

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
PNG_SIGNATURE, PNG_XMP = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp\0"
# A JPEG segment's length counts itself and has two bytes.
MAX_SEGMENT = 65535 - 2
# More than this of inflated metadata is nobody's.
MAX_PACKET = 16 * 2**20
WEBP_XMP_FLAG, WEBP_ALPHA_FLAG = 0x04, 0x10
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="' + RDF + '"></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
)


class NoAltText(UserError):
    """The photo cannot take an alternative text: another format, or damaged metadata."""


def write_alt_text(path: Path, text: str) -> bool:
    """Writes `text` into the photo at `path` (JPEG, PNG or WebP), beside it first and then in its
    place, with its permissions. False, and nothing is touched, where the photo has an alternative
    text. Raises NoAltText, or OSError."""
    path = Path(os.path.realpath(path))  # a link stays one
    data = path.read_bytes()
    changed = with_alt_text(data, text)
    if changed is None:
        return False
    mode = stat.S_IMODE(path.stat().st_mode)
    write_atomic(path, changed)
    path.chmod(mode)
    return True


def with_alt_text(photo: bytes, text: str) -> bytes | None:
    """The bytes of a photo with `text` in its metadata; None where it has one already."""
    insert = {"JPEG": _into_jpeg, "PNG": _into_png, "WEBP": _into_webp}.get(sniff(photo) or "")
    if insert is None:
        raise NoAltText("only JPEG, PNG and WebP take an alternative text")
    try:
        return insert(photo, text)
    except (struct.error, IndexError, zlib.error) as error:
        raise NoAltText("its structure is damaged") from error


def add_to_packet(packet: str, text: str) -> str | None:
    """An XMP packet with the text added; None where it holds one. Raises NoAltText for a packet
    that is no XMP."""
    if "<!DOCTYPE" in packet:  # entities could be anything
        raise NoAltText("its XMP declares a document type")
    try:
        root = ElementTree.fromstring(
            re.sub(r"<\?xpacket[^>]*\?>", "", packet).strip("\ufeff\0 \n")
        )
    except ElementTree.ParseError as error:
        raise NoAltText(f"its XMP is damaged ({error})") from error
    for element in root.iter():
        if element.tag == f"{{{IPTC}}}AltTextAccessibility":
            if "".join(element.itertext()).strip():
                return None
            raise NoAltText("its XMP has an empty alternative text; fill it in, or remove it")
        if element.attrib.get(f"{{{IPTC}}}AltTextAccessibility", "").strip():
            return None
    end = list(re.finditer(r"</(\w[\w.-]*):RDF\s*>|<(\w[\w.-]*):RDF([^>]*)/>", packet))
    if not end or root.find(f".//{{{RDF}}}RDF") is None and root.tag != f"{{{RDF}}}RDF":
        raise NoAltText("its XMP holds no RDF")
    # All descriptions of a packet are about the same thing.
    about = next((e.get(f"{{{RDF}}}about", "") for e in root.iter(f"{{{RDF}}}Description")), "")
    description = (
        f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="{escape(about)}" '
        f'xmlns:Iptc4xmpCore="{IPTC}"><Iptc4xmpCore:AltTextAccessibility><rdf:Alt>'
        f'<rdf:li xml:lang="x-default">{escape(text, quote=False)}</rdf:li>'
        "</rdf:Alt></Iptc4xmpCore:AltTextAccessibility></rdf:Description>"
    )
    last = end[-1]
    if last[2]:  # <rdf:RDF/>
        description = f"<{last[2]}:RDF{last[3]}>{description}</{last[2]}:RDF>"
        return packet[: last.start()] + description + packet[last.end() :]
    return packet[: last.start()] + description + packet[last.start() :]


def _add(packet: bytes | None, text: str) -> bytes | None:
    try:
        before = PACKET if packet is None else packet.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoAltText("its XMP is not UTF-8") from error
    after = add_to_packet(before, text)
    return None if after is None else after.encode()


def _into_jpeg(photo: bytes, text: str) -> bytes | None:
    """The packet is an APP1 segment of its own; a new one comes after those of JFIF and EXIF."""
    start = place = 2
    found: tuple[int, int] | None = None
    while photo[start] == 0xFF and photo[start + 1] not in (0xDA, 0xD9):
        if photo[start + 1] == 0xFF:  # fill bytes
            start += 1
            continue
        end = start + 2 + struct.unpack_from(">H", photo, start + 2)[0]
        if end > len(photo):
            raise NoAltText("its structure is damaged")
        marker, content = photo[start + 1], photo[start + 4 : end]
        if marker == 0xE1 and content.startswith(JPEG_XMP):
            found = (start, end)
            break
        if marker == 0xE0 or marker == 0xE1 and content.startswith(b"Exif\0"):
            place = end
        start = end
    first, last = found or (place, place)
    packet = _add(photo[first + 4 + len(JPEG_XMP) : last] if found else None, text)
    if packet is None:
        return None
    if len(JPEG_XMP) + len(packet) > MAX_SEGMENT:
        # Room that was left for later changes is there to be used.
        packet = re.sub(rb"\s{100,}(?=<\?xpacket end)", b"\n", packet)
    if len(JPEG_XMP) + len(packet) > MAX_SEGMENT:
        raise NoAltText("its XMP is full: a JPEG holds 64 KB of it")
    length = struct.pack(">H", 2 + len(JPEG_XMP) + len(packet))
    return photo[:first] + b"\xff\xe1" + length + JPEG_XMP + packet + photo[last:]


def _into_png(photo: bytes, text: str) -> bytes | None:
    """The packet is an iTXt chunk, uncompressed; a new one comes after IHDR, the first."""
    start = len(PNG_SIGNATURE)
    place, found, packet = 0, None, None
    while start < len(photo):
        size, kind = struct.unpack_from(">I4s", photo, start)
        content, end = photo[start + 8 : start + 8 + size], start + 12 + size
        if end > len(photo):
            raise NoAltText("its structure is damaged")
        if kind == b"IHDR":
            place = end
        if kind == b"iTXt" and content.startswith(PNG_XMP):
            found, packet = (start, end), _itxt(content)
            break
        if kind == b"IEND":
            break
        start = end
    if not place:
        raise NoAltText("its structure is damaged")
    changed = _add(packet, text)
    if changed is None:
        return None
    first, last = found or (place, place)
    content = PNG_XMP + b"\0\0\0\0" + changed  # not compressed, no language, no translated keyword
    chunk = b"iTXt" + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return photo[:first] + chunk + photo[last:]


def _itxt(content: bytes) -> bytes:
    """The text of an iTXt chunk."""
    compressed, rest = content[len(PNG_XMP)], content[len(PNG_XMP) + 2 :]
    _, _, rest = rest.partition(b"\0")
    _, _, packet = rest.partition(b"\0")
    return zlib.decompressobj().decompress(packet, MAX_PACKET) if compressed else packet


def _into_webp(photo: bytes, text: str) -> bytes | None:
    """The packet is the last chunk of an extended file; a simple file becomes an extended one."""
    end = min(len(photo), 8 + struct.unpack_from("<I", photo, 4)[0])
    chunks: list[tuple[bytes, bytes]] = []
    start = 12
    while start + 8 <= end:
        kind, size = struct.unpack_from("<4sI", photo, start)
        if start + 8 + size > end:
            raise NoAltText("its structure is damaged")
        chunks.append((kind, photo[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2
    packet = _add(next((content for kind, content in chunks if kind == b"XMP "), None), text)
    if packet is None:
        return None
    chunks = [(kind, content) for kind, content in chunks if kind != b"XMP "]
    if chunks[0][0] != b"VP8X":
        chunks.insert(0, (b"VP8X", _extended_header(*chunks[0])))
    header = bytearray(chunks[0][1])
    header[0] |= WEBP_XMP_FLAG
    chunks[0] = (b"VP8X", bytes(header))
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in [*chunks, (b"XMP ", packet)]
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body + photo[end:]


def _extended_header(kind: bytes, content: bytes) -> bytes:
    """The VP8X chunk of a simple file: flags, and the size that its only picture has."""
    flags = 0
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 1)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags = WEBP_ALPHA_FLAG if bits >> 28 & 1 else 0
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 6))
    else:
        raise NoAltText("its structure is damaged")
    return (
        struct.pack("<I", flags)
        + struct.pack("<I", width - 1)[:3]
        + struct.pack("<I", height - 1)[:3]
    )
