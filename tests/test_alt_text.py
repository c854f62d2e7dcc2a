"""Alternative texts: written where screen readers look, pixels and all other metadata untouched."""

import hashlib
import io
import struct
import zlib
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from handler.client.alt_text import (
    IPTC,
    JPEG_EXTENDED,
    JPEG_XMP,
    MAX_SEGMENT,
    PACKET,
    NoAltText,
    add_to_packet,
    with_alt_text,
    write_alt_text,
)

TEXT = 'a dog & a "größe" <cat> 猫'
LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
OTHER = PACKET.replace(
    "</rdf:RDF>",
    '<rdf:Description rdf:about="uuid:1" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'dc:format="image/jpeg"/></rdf:RDF>' + " " * 2000,
)


def photo(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    mode = options.pop("mode", "RGB")
    picture = Image.effect_noise((33, 21), 90).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    data = Image.Exif()
    data[0x010E] = "described"
    data[0x0112] = 6
    return data


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PHOTOS = {
    "jpeg": lambda: photo("JPEG"),
    "progressive jpeg": lambda: photo("JPEG", progressive=True, exif=exif(), icc_profile=PROFILE),
    "jpeg with xmp": lambda: photo("JPEG", xmp=OTHER.encode(), exif=exif()),
    "png": lambda: photo("PNG", mode="RGBA", exif=exif(), icc_profile=PROFILE),
    "png with xmp": lambda: photo("PNG", pnginfo=png_text(compressed=False)),
    "png with compressed xmp": lambda: photo("PNG", pnginfo=png_text(compressed=True)),
    "lossy webp": lambda: photo("WEBP"),
    "lossless webp": lambda: photo("WEBP", lossless=True),
    "lossless webp with alpha": lambda: photo("WEBP", lossless=True, mode="RGBA"),
    "webp with xmp": lambda: photo("WEBP", xmp=OTHER.encode(), exif=exif(), icc_profile=PROFILE),
}


def png_text(compressed: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", OTHER, zip=compressed)
    info.add_text("Comment", "kept")
    return info


def packet_of(data: bytes) -> str:
    return xmp_of(Image.open(io.BytesIO(data)))


def xmp_of(image: Image.Image) -> str:
    image.load()
    found = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    return found.decode() if isinstance(found, bytes) else found


def alt_text(data: bytes) -> str:
    packet = packet_of(data)
    root = ElementTree.fromstring(packet[packet.index("<x:") : packet.rindex("<?")].strip())
    [element] = root.iter(f"{{{IPTC}}}AltTextAccessibility")
    [item] = element.iter(LI)
    assert item.get("{http://www.w3.org/XML/1998/namespace}lang") == "x-default"
    return item.text or ""


@pytest.mark.parametrize("name", PHOTOS)
def test_the_text_is_there_and_the_rest_as_it_was(name):
    before = PHOTOS[name]()
    after = with_alt_text(before, TEXT)
    assert after is not None and alt_text(after) == TEXT
    old, new = (Image.open(io.BytesIO(data)) for data in (before, after))
    assert (old.format, old.mode, old.size) == (new.format, new.mode, new.size)
    assert old.tobytes() == new.tobytes()
    assert old.getexif() == new.getexif()
    xmp = ("xmp", "XML:com.adobe.xmp")
    assert {k: v for k, v in old.info.items() if k not in xmp} == {
        k: v for k, v in new.info.items() if k not in xmp
    }
    if "with" in name and "xmp" in name:
        assert 'dc:format="image/jpeg"' in packet_of(after)
        assert packet_of(after).count('rdf:about="uuid:1"') == 2
    assert with_alt_text(after, "another") is None


@pytest.mark.parametrize("name", PHOTOS)
def test_the_compressed_pixels_are_the_same_bytes(name):
    before = PHOTOS[name]()
    after = with_alt_text(before, TEXT)
    assert pixels(before) == pixels(after) != []


def pixels(data: bytes) -> list[bytes]:
    """What is compressed in a file."""
    if data[:2] == b"\xff\xd8":
        return [data[data.index(b"\xff\xda") :]]
    if data[:4] == b"RIFF":
        found, start = [], 12
        while start < len(data):
            kind, size = struct.unpack_from("<4sI", data, start)
            if kind in (b"VP8 ", b"VP8L", b"ALPH"):
                found.append(data[start : start + 8 + size])
            start += 8 + size + size % 2
        assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
        return found
    found, start = [], 8
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start + 4 : start + 8 + size]
        assert zlib.crc32(chunk) == struct.unpack_from(">I", data, start + 8 + size)[0]
        if kind == b"IDAT":
            found.append(chunk)
        start += 12 + size
    return found


def test_exif_stays_before_the_packet():
    """Readers look for EXIF in the first segments."""
    after = with_alt_text(photo("JPEG", exif=exif()), TEXT)
    assert after is not None
    assert after.index(b"Exif\0") < after.index(JPEG_XMP) < after.index(b"\xff\xdb")


# --- packets elsewhere in the file


def described(text: str = "theirs", keyword: str = "AltTextAccessibility") -> str:
    """A packet in which somebody has described the photo."""
    given = f"<rdf:Description xmlns:i='{IPTC}' i:{keyword}='{text}'/></rdf:RDF>"
    return PACKET.replace("</rdf:RDF>", given)


def raw_profile(packet: str, name: str, head: bytes = b"") -> str:
    data = head + packet.encode()
    digits = data.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    return f"\n{name}\n{len(data):8}\n{lines}\n"


def png_with_profile(packet: str, kind: str, itxt: str | None = None) -> bytes:
    """A PNG as ImageMagick writes it, before version 7 or from a JPEG."""
    info = PngImagePlugin.PngInfo()
    if itxt:
        info.add_itxt("XML:com.adobe.xmp", itxt)
    if kind == "APP1":
        info.add_text("Raw profile type APP1", raw_profile(packet, "app1", JPEG_XMP), zip=True)
    elif kind == "iTXt":
        info.add_itxt("Raw profile type xmp", raw_profile(packet, "xmp"), zip=True)
    else:
        info.add_text("Raw profile type xmp", raw_profile(packet, "xmp"), zip=kind == "zTXt")
    return photo("PNG", pnginfo=info)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "APP1"])
def test_a_raw_profile_is_a_packet_too(kind):
    """A PNG of ImageMagick's got a second alternative text beside the one it had."""
    assert with_alt_text(png_with_profile(described(), kind), TEXT) is None
    before = png_with_profile(OTHER, kind)
    after = with_alt_text(before, TEXT)
    assert after is not None and alt_text(after) == TEXT
    assert 'dc:format="image/jpeg"' in packet_of(after)  # the new packet lacks nothing
    profiles = [chunk for chunk in chunks(before) if b"Raw profile" in chunk]
    assert profiles and profiles == [chunk for chunk in chunks(after) if b"Raw profile" in chunk]
    assert with_alt_text(after, "another") is None


def test_a_packet_beside_a_raw_profile():
    assert with_alt_text(png_with_profile(described(), "zTXt", itxt=OTHER), TEXT) is None
    assert with_alt_text(png_with_profile(OTHER, "zTXt", itxt=described()), TEXT) is None


def test_a_raw_profile_of_exif_is_none():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type APP1", raw_profile("", "app1", b"Exif\0\0II*\0"), zip=True)
    after = with_alt_text(photo("PNG", pnginfo=info), TEXT)
    assert after is not None and alt_text(after) == TEXT


@pytest.mark.parametrize("profile", ["", "\nxmp\n 9\n3c", "\nxmp\n 2\nxxxx", "\nxmp\n a\n3c"])
def test_a_damaged_raw_profile_is_left_alone(profile):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type xmp", profile)
    with pytest.raises(NoAltText, match="raw profile of XMP is damaged"):
        with_alt_text(photo("PNG", pnginfo=info), TEXT)


def chunks(data: bytes) -> list[bytes]:
    found, start = [], 8
    while start < len(data):
        size = struct.unpack_from(">I", data, start)[0]
        found.append(data[start : start + 12 + size])
        start += 12 + size
    return found


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(content)) + content


def extended(packet: str, parts: int = 3, announced: int = 0) -> list[bytes]:
    """The segments of extended XMP, the last first."""
    data = packet.encode()
    digest = hashlib.md5(data).hexdigest().upper().encode()
    length = announced or len(data)
    edges = [len(data) * part // parts for part in range(parts + 1)]
    return [
        segment(0xE1, JPEG_EXTENDED + digest + struct.pack(">II", length, low) + data[low:high])
        for low, high in pairwise(edges)
    ][::-1]


def with_segments(jpeg: bytes, segments: list[bytes]) -> bytes:
    """Behind the segments that are there, before the tables."""
    place = jpeg.index(b"\xff\xdb")
    return jpeg[:place] + b"".join(segments) + jpeg[place:]


def bare(packet: str) -> str:
    """Extended XMP stands without the frame of a packet."""
    return packet[packet.index("<x:") : packet.rindex("<?")]


def test_extended_xmp_is_a_packet_too():
    jpeg = photo("JPEG", xmp=OTHER.encode(), exif=exif())
    assert with_alt_text(with_segments(jpeg, extended(bare(described()))), TEXT) is None
    before = with_segments(jpeg, extended(bare(described(keyword="Other"))))
    after = with_alt_text(before, TEXT)
    assert after is not None and alt_text(after) == TEXT
    assert after.endswith(before[before.index(JPEG_EXTENDED) :])
    assert with_alt_text(after, "another") is None


@pytest.mark.parametrize(
    "segments",
    [
        extended(bare(described()))[1:],
        extended(bare(described()), announced=99),
        extended(bare(described())) * 2,
        extended("<x>"),
        [segment(0xE1, JPEG_EXTENDED + b"short")],
    ],
)
def test_damaged_extended_xmp_is_left_alone(segments):
    with pytest.raises(NoAltText, match="damaged"):
        with_alt_text(with_segments(photo("JPEG"), segments), TEXT)


def test_a_second_packet_of_a_webp_is_kept():
    """All but the first were dropped."""
    one = photo("WEBP", xmp=OTHER.encode())
    packet = described().encode()
    second = b"XMP " + struct.pack("<I", len(packet)) + packet + b"\0" * (len(packet) % 2)
    both = one[:4] + struct.pack("<I", len(one) - 8 + len(second)) + one[8:] + second
    assert with_alt_text(both, TEXT) is None
    other = both.replace(b"AltTextAccessibility", b"AnotherAccessibility")
    after = with_alt_text(other, TEXT)
    assert after is not None and b"AnotherAccessibility" in after and TEXT[:5].encode() in after


# --- several pictures in one JPEG


def pictures(order: str = "<", xmp: bytes = b"", behind: bool = True) -> bytes:
    """Three pictures in one file (an MPO of Pillow's, in either byte order); the packet behind the
    index of the pictures, or before it."""
    colours = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    colours[0].save(buffer, "MPO", save_all=True, append_images=colours[1:])
    data = buffer.getvalue()
    start = data.index(b"MPF\0") - 4
    size = 2 + struct.unpack_from(">H", data, start + 2)[0]
    lengths = [length for length, _ in index(data)]
    packet = segment(0xE1, JPEG_XMP + xmp) if xmp else b""
    offsets = [0, lengths[0] - start - 8 + (len(packet) if behind else 0)]
    offsets.append(offsets[1] + lengths[1])
    lengths[0] += len(packet)
    # Version, number of pictures, entries (at 50), no further index; then the entries.
    content = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, 3)
    content += struct.pack(f"{order}HHI4s", 0xB000, 7, 4, b"0100")
    content += struct.pack(f"{order}HHII", 0xB001, 4, 1, 3)
    content += struct.pack(f"{order}HHII", 0xB002, 7, 48, 50) + bytes(4)
    for length, offset in zip(lengths, offsets, strict=True):
        content += struct.pack(f"{order}IIIHH", 0x030000, length, offset, 0, 0)
    assert len(content) <= size - 8
    listed = segment(0xE2, b"MPF\0" + content.ljust(size - 8, b"\0"))
    parts = [listed, packet] if behind else [packet, listed]
    return data[:start] + b"".join(parts) + data[start + size :]


def index(data: bytes) -> list[tuple[int, int]]:
    """Size and offset of each picture, as Pillow reads them."""
    with Image.open(io.BytesIO(data)) as image:
        return [(entry["Size"], entry["DataOffset"]) for entry in image.mpinfo[0xB002]]


def shown(data: bytes) -> list[tuple[int, ...]]:
    """The colour of each picture, found by its offset."""
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("MPO", 3)
        colours = []
        for number in range(3):
            image.seek(number)
            colours.append(image.convert("RGB").getpixel((8, 8)))
        return colours


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("xmp", [b"", OTHER.encode(), PACKET.encode()], ids=["no", "", "empty"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_other_pictures_of_a_jpeg_are_still_found(order, xmp, behind):
    """The second picture of a phone's portrait, or of a stereo camera, was lost."""
    before = pictures(order, xmp, behind)
    colours = shown(before)
    assert len(set(colours)) == 3
    after = with_alt_text(before, TEXT)
    assert after is not None and alt_text(after) == TEXT
    assert shown(after) == colours
    # The first is longer by what was inserted, and its end is where the second begins.
    added = len(after) - len(before)
    old, new = index(before), index(after)
    assert new[0] == (old[0][0] + added, 0)
    assert [size for size, _ in new[1:]] == [size for size, _ in old[1:]]
    assert after[new[0][0] :] == before[old[0][0] :]


@pytest.mark.parametrize(
    ("field", "value"), [(8 + 2 + 24 + 8, 200), (8 + 2 + 24 + 4, 10**6), (4, 2**31), (0, 7)]
)
def test_a_lying_index_of_pictures_is_left_alone(field, value):
    """Following it, the bytes of a picture would be changed."""
    data = bytearray(pictures())
    struct.pack_into("<I", data, data.index(b"MPF\0") + 4 + field, value)
    with pytest.raises(NoAltText, match="damaged"):
        with_alt_text(bytes(data), TEXT)


# --- what cannot be written


@pytest.mark.parametrize("text", ["", "  ", "\x00\x1b"])
def test_a_text_of_nothing_is_not_written(text):
    """It became an empty alternative text, which nothing replaced later."""
    with pytest.raises(NoAltText, match="its caption is empty"):
        with_alt_text(photo("JPEG"), text)


@pytest.mark.parametrize("name", ["jpeg", "png", "lossy webp"])
def test_characters_that_xml_forbids_are_left_out(name):
    text = " a\x00 \x1b[1mdog\x7f \ufffe\ud800\U0001f415\x85 "
    after = with_alt_text(PHOTOS[name](), text)
    assert after is not None and alt_text(after) == "a [1mdog \U0001f415"


@pytest.mark.parametrize(
    "given",
    [
        f"<rdf:Description xmlns:i='{IPTC}' i:AltTextAccessibility=''/>",
        f"<rdf:Description xmlns:i='{IPTC}'><i:AltTextAccessibility/></rdf:Description>",
    ],
)
def test_an_empty_text_of_somebody_elses_is_said(given):
    with pytest.raises(NoAltText, match="empty alternative text"):
        add_to_packet(PACKET.replace("</rdf:RDF>", f"{given}</rdf:RDF>"), TEXT)


def test_padding_makes_room_and_a_full_segment_is_refused():
    room = MAX_SEGMENT - len(JPEG_XMP) - len(PACKET.encode()) - 10
    padded = PACKET.replace("<?xpacket end", " " * room + "<?xpacket end")
    after = with_alt_text(photo("JPEG", xmp=padded.encode()), TEXT)
    assert after is not None and alt_text(after) == TEXT
    full = PACKET.replace("</rdf:RDF>", f"<!--{'x' * (room - 10)}--></rdf:RDF>")
    with pytest.raises(NoAltText, match="full"):
        with_alt_text(photo("JPEG", xmp=full.encode()), TEXT)


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        ("<x>", "damaged"),
        ("<x/>", "no RDF"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><x/>', "document type"),
        (PACKET.replace("<rdf:RDF", "<rdf:RFD"), "damaged"),
    ],
)
def test_packets_that_are_none_are_refused(packet, says):
    with pytest.raises(NoAltText, match=says):
        add_to_packet(packet, TEXT)


def test_other_prefixes_and_empty_packets():
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    for packet in (f'<R:RDF xmlns:R="{rdf}"/>', f'<R:RDF xmlns:R="{rdf}">\n</R:RDF>'):
        root = ElementTree.fromstring(add_to_packet(packet, TEXT) or "")
        assert [item.text for item in root.iter(LI)] == [TEXT]


def test_a_text_of_somebody_elses_is_kept():
    given = f"<rdf:Description xmlns:i='{IPTC}' i:AltTextAccessibility='theirs'/></rdf:RDF>"
    assert add_to_packet(PACKET.replace("</rdf:RDF>", given), TEXT) is None


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(form):
    with pytest.raises(NoAltText, match="JPEG, PNG and WebP"):
        with_alt_text(photo(form), TEXT)


@pytest.mark.parametrize("name", PHOTOS)
def test_a_cut_file_is_refused_or_changed_in_its_head_alone(name):
    whole = PHOTOS[name]()
    for length in range(16, len(whole), 97):
        try:
            after = with_alt_text(whole[:length], TEXT)
        except NoAltText:
            continue
        assert after is not None


def test_the_file_keeps_its_place_and_its_permissions(tmp_path):
    path, link = tmp_path / "photo.jpg", tmp_path / "link.jpg"
    path.write_bytes(photo("JPEG"))
    path.chmod(0o640)
    link.symlink_to(path)
    assert write_alt_text(link, TEXT)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert alt_text(path.read_bytes()) == TEXT
    content = path.read_bytes()
    assert not write_alt_text(path, "another")
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.jpg", "photo.jpg"]
