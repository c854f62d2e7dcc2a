"""Writes a caption into a photo's metadata, as the alternative text that screen readers and photo
programs read: XMP's `Iptc4xmpCore:AltTextAccessibility` (IPTC Photo Metadata Standard 2021.1).

The picture is not decoded or encoded again: the XMP packet is inserted into the file as a JPEG
segment or as a PNG or WebP chunk, and all other bytes are copied. The text is added to an existing
XMP packet. A photo that already has an alternative text keeps it, whether it is in the packet, in a
JPEG's extended XMP or in a PNG's "Raw profile type xmp" (ImageMagick's). The offsets of the further
pictures in a JPEG (CIPA DC-007, Multi-Picture Format) are corrected.
"""

import os
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from handler.errors import UserError
from handler.files import write_atomic
from handler.image_preprocess import sniff

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# Extended XMP, for what does not fit into one segment. Each segment begins with the MD5 and the
# length of the whole, and the offset of its own part (XMP specification part 3, 1.1.3.1).
JPEG_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
EXTENDED_HEAD = struct.Struct(">32sII")
MPF, MPF_ENTRIES, MPF_ENTRY = b"MPF\0", 0xB002, 16
PNG_SIGNATURE, PNG_XMP = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp\0"
PNG_RAW_PROFILES = (b"Raw profile type xmp\0", b"Raw profile type APP1\0")
# The length of a JPEG segment has two bytes, which it includes.
MAX_SEGMENT = 65535 - 2
# No real metadata is larger than this when decompressed.
MAX_PACKET = 16 * 2**20
WEBP_XMP_FLAG, WEBP_ALPHA_FLAG = 0x04, 0x10
# What XML 1.0 does not allow, and control characters that it discourages.
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="' + RDF + '"></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
)


class NoAltText(UserError):
    """The photo cannot store an alternative text, by its format or because it is damaged."""


def write_alt_text(path: Path, text: str) -> bool:
    """Writes `text` into the photo at `path` (JPEG, PNG or WebP). The file is replaced atomically
    and keeps its permissions. Returns False and changes nothing if the photo already has an
    alternative text. Raises NoAltText or OSError."""
    path = Path(os.path.realpath(path))  # replaces the target of a link, not the link
    changed = with_alt_text(path.read_bytes(), text)
    if changed is not None:
        write_atomic(path, changed)
    return changed is not None


def alternative_text(caption: str) -> str:
    """A caption without the characters that XML forbids, and without spaces at its ends."""
    return FORBIDDEN.sub("", caption).strip()


def with_alt_text(photo: bytes, text: str) -> bytes | None:
    """The bytes of a photo with `text` in its metadata; None if it already has an alternative text.
    Raises NoAltText, also for an empty text."""
    text = alternative_text(text)
    if not text:
        raise NoAltText("its caption is empty; no alternative text is written")
    insert = {"JPEG": _into_jpeg, "PNG": _into_png, "WEBP": _into_webp}.get(sniff(photo) or "")
    if insert is None:
        raise NoAltText("only JPEG, PNG and WebP can store an alternative text")
    try:
        return insert(photo, text)
    except (struct.error, IndexError, zlib.error) as error:
        raise NoAltText("its structure is damaged") from error


def parse_packet(packet: str) -> ElementTree.Element:
    """The root element of an XMP packet. Raises NoAltText if the packet is not XMP."""
    if "<!DOCTYPE" in packet:  # its entities could expand to gigabytes
        raise NoAltText("its XMP declares a document type")
    try:
        return ElementTree.fromstring(
            re.sub(r"<\?xpacket[^>]*\?>", "", packet).strip("\ufeff\0 \n")
        )
    except ElementTree.ParseError as error:
        raise NoAltText(f"its XMP is damaged ({error})") from error


def has_alt_text(root: ElementTree.Element) -> bool:
    """Whether a packet has an alternative text. Raises NoAltText if it is empty, because XMP does
    not allow a second one."""
    name = f"{{{IPTC}}}AltTextAccessibility"
    texts = ["".join(element.itertext()) for element in root.iter(name)]
    texts += [element.attrib[name] for element in root.iter() if name in element.attrib]
    if texts and not any(text.strip() for text in texts):
        raise NoAltText("its XMP has an empty alternative text; fill it in, or remove it")
    return bool(texts)


def add_to_packet(packet: str, text: str) -> str | None:
    """An XMP packet with the text added; None if it already has one. Raises NoAltText if the packet
    is not XMP."""
    root = parse_packet(packet)
    if has_alt_text(root):
        return None
    end = list(re.finditer(r"</(\w[\w.-]*):RDF\s*>|<(\w[\w.-]*):RDF([^>]*)/>", packet))
    if not end or root.find(f".//{{{RDF}}}RDF") is None and root.tag != f"{{{RDF}}}RDF":
        raise NoAltText("its XMP contains no RDF")
    # All descriptions of a packet must have the same rdf:about.
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


def _add(packets: Sequence[bytes], text: str, others: Sequence[bytes] = ()) -> bytes | None:
    """The first of a photo's packets with the text added, or a new packet; None if a packet already
    has an alternative text, or one of the `others`, which are only read."""
    try:
        decoded = [packet.decode("utf-8") for packet in (*packets, *others)]
    except UnicodeDecodeError as error:
        raise NoAltText("its XMP is not UTF-8") from error
    if any(has_alt_text(parse_packet(packet)) for packet in decoded):
        return None
    after = add_to_packet(decoded[0] if packets else PACKET, text)
    return None if after is None else after.encode()


def _into_jpeg(photo: bytes, text: str) -> bytes | None:
    """The packet is an APP1 segment; a new one is inserted after those of JFIF and EXIF."""
    start = insert_at = 2
    packets: list[tuple[int, int]] = []
    extended: list[bytes] = []
    pictures: tuple[int, int] | None = None
    while photo[start] == 0xFF and photo[start + 1] not in (0xDA, 0xD9):
        if photo[start + 1] == 0xFF:  # fill bytes
            start += 1
            continue
        end = start + 2 + struct.unpack_from(">H", photo, start + 2)[0]
        if end > len(photo):
            raise NoAltText("its structure is damaged")
        marker, content = photo[start + 1], photo[start + 4 : end]
        if marker == 0xE1 and content.startswith(JPEG_XMP):
            packets.append((start, end))
        if marker == 0xE1 and content.startswith(JPEG_EXTENDED):
            extended.append(content[len(JPEG_EXTENDED) :])
        if marker == 0xE2 and content.startswith(MPF):
            pictures = (start + 4 + len(MPF), end)
        if marker == 0xE0 or marker == 0xE1 and content.startswith(b"Exif\0"):
            insert_at = end
        start = end
    own = [photo[first + 4 + len(JPEG_XMP) : last] for first, last in packets]
    packet = _add(own, text, _joined(extended))
    if packet is None:
        return None
    if len(JPEG_XMP) + len(packet) > MAX_SEGMENT:
        # Removes the padding that XMP writers leave for later changes.
        packet = re.sub(rb"\s{100,}(?=<\?xpacket end)", b"\n", packet)
    if len(JPEG_XMP) + len(packet) > MAX_SEGMENT:
        raise NoAltText("its XMP is full: a JPEG can store 64 KB of it")
    first, last = packets[0] if packets else (insert_at, insert_at)
    length = struct.pack(">H", 2 + len(JPEG_XMP) + len(packet))
    segment = b"\xff\xe1" + length + JPEG_XMP + packet
    if pictures is not None:
        photo = _moved(photo, pictures, last, len(segment) - (last - first))
    return photo[:first] + segment + photo[last:]


def _joined(parts: Sequence[bytes]) -> list[bytes]:
    """Joins the segments of extended XMP that have the same MD5 to packets."""
    segments: dict[bytes, list[tuple[int, int, bytes]]] = defaultdict(list)
    for part in parts:
        digest, length, offset = EXTENDED_HEAD.unpack_from(part)
        segments[digest].append((offset, length, part[EXTENDED_HEAD.size :]))
    packets = []
    for pieces in segments.values():
        packet = b""
        for offset, _, piece in sorted(pieces):
            if offset != len(packet):
                raise NoAltText("its extended XMP is damaged")
            packet += piece
        if any(length != len(packet) for _, length, _ in pieces):
            raise NoAltText("its extended XMP is damaged")
        packets.append(packet)
    return packets


def _moved(photo: bytes, index: tuple[int, int], insert_at: int, added: int) -> bytes:
    """Corrects the index of a JPEG of several pictures for `added` bytes that will be inserted
    before `insert_at`, in the first picture. `index` is (start of its header, end). The first
    picture becomes longer; the offsets of the others, which count from the header, grow if the
    header itself does not move."""
    header, end = index
    order = {b"II": "<", b"MM": ">"}.get(photo[header : header + 2])
    if order is None:
        raise NoAltText("its index of pictures is damaged")
    fields = header + struct.unpack_from(f"{order}I", photo, header + 4)[0]
    changed = bytearray(photo)
    for number in range(struct.unpack_from(f"{order}H", photo, fields)[0]):
        tag, _, size, start = struct.unpack_from(f"{order}HHII", photo, fields + 2 + 12 * number)
        if tag != MPF_ENTRIES:
            continue
        if header + start + size > end:
            raise NoAltText("its index of pictures is damaged")
        for entry in range(header + start, header + start + size - MPF_ENTRY + 1, MPF_ENTRY):
            # Behind the attributes are the size of the picture and its offset, 0 for the first.
            length, offset = struct.unpack_from(f"{order}II", photo, entry + 4)
            if not offset and length:
                length += added
            elif offset and header < insert_at:
                offset += added
            struct.pack_into(f"{order}II", changed, entry + 4, length, offset)
    return bytes(changed)


def _into_png(photo: bytes, text: str) -> bytes | None:
    """The packet is an uncompressed iTXt chunk; a new one is inserted after IHDR, the first chunk.
    It starts as a copy of the XMP in a raw profile, if an older program wrote one."""
    start = len(PNG_SIGNATURE)
    insert_at = 0
    packets: list[tuple[int, int, bytes]] = []
    profiles: list[bytes] = []
    while start < len(photo):
        size, kind = struct.unpack_from(">I4s", photo, start)
        content, end = photo[start + 8 : start + 8 + size], start + 12 + size
        if end > len(photo):
            raise NoAltText("its structure is damaged")
        if kind == b"IHDR":
            insert_at = end
        if kind == b"iTXt" and content.startswith(PNG_XMP):
            packets.append((start, end, _itxt(content, PNG_XMP)))
        if kind in (b"tEXt", b"zTXt", b"iTXt") and content.startswith(PNG_RAW_PROFILES):
            profiles += _raw_profile(kind, content)
        if kind == b"IEND":
            break
        start = end
    if not insert_at:
        raise NoAltText("its structure is damaged")
    changed = _add([packet for *_, packet in packets] or profiles, text, profiles)
    if changed is None:
        return None
    first, last = packets[0][:2] if packets else (insert_at, insert_at)
    content = PNG_XMP + b"\0\0\0\0" + changed  # not compressed, no language, no translated keyword
    chunk = b"iTXt" + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return photo[:first] + chunk + photo[last:]


def _raw_profile(kind: bytes, content: bytes) -> list[bytes]:
    """The XMP packets in a text chunk as ImageMagick writes it: name and length of the profile,
    then its bytes in hexadecimal."""
    keyword, _, text = content.partition(b"\0")
    if kind == b"zTXt":
        text = _inflated(text[1:])
    elif kind == b"iTXt":
        text = _itxt(content, keyword + b"\0")
    try:
        _, length, digits = text.split(None, 2)
        profile = bytes.fromhex(digits.decode("ascii"))
        if len(profile) != int(length):
            raise ValueError
    except ValueError as error:
        raise NoAltText("its raw profile of XMP is damaged") from error
    if keyword.endswith(b"xmp"):
        return [profile]
    # "APP1" is a JPEG segment, either XMP or EXIF.
    return [profile[len(JPEG_XMP) :]] if profile.startswith(JPEG_XMP) else []


def _inflated(compressed: bytes) -> bytes:
    return zlib.decompressobj().decompress(compressed, MAX_PACKET)


def _itxt(content: bytes, keyword: bytes) -> bytes:
    """The text of an iTXt chunk with this keyword."""
    compressed, rest = content[len(keyword)], content[len(keyword) + 2 :]
    _, _, rest = rest.partition(b"\0")
    _, _, text = rest.partition(b"\0")
    return _inflated(text) if compressed else text


def _into_webp(photo: bytes, text: str) -> bytes | None:
    """The packet is the last chunk of an extended file; a simple file is made an extended one."""
    end = min(len(photo), 8 + struct.unpack_from("<I", photo, 4)[0])
    chunks: list[tuple[bytes, bytes]] = []
    start = 12
    while start + 8 <= end:
        kind, size = struct.unpack_from("<4sI", photo, start)
        if start + 8 + size > end:
            raise NoAltText("its structure is damaged")
        chunks.append((kind, photo[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2
    packet = _add([content for kind, content in chunks if kind == b"XMP "], text)
    if packet is None:
        return None
    first = next((chunk for chunk in chunks if chunk[0] == b"XMP "), None)
    chunks = [chunk for chunk in chunks if chunk is not first]
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
    """The VP8X chunk for a simple file: flags, and the size of its only picture."""
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
