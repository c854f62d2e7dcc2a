"""Alternative texts: written where screen readers look, pixels and all other metadata untouched."""

import io
import struct
import zlib
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from handler.client.alt_text import (
    IPTC,
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
