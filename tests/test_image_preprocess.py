"""Bytes to RGB to tensor: formats, modes, orientation, limits, damage."""

import contextlib
import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import FORMATS, encoded, huge_headers, png, smooth
from PIL import Image, ImageCms

from handler import image_decode
from handler.errors import UserError
from handler.image_decode import decode_photo, open_photo
from handler.image_preprocess import (
    ImageTooLarge,
    InvalidImage,
    PreprocessConfig,
    UnsupportedMediaType,
    decode,
    decode_resized,
    preprocess,
    resize,
    seen_region,
    to_tensor,
)

# Pillow warns about damaged TIFF and EXIF tags.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))


# --- formats and modes


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_told_by_its_content(kind):
    photo = decode(encoded(smooth(), kind))
    assert (photo.mode, photo.size) == ("RGB", (80, 60))
    # GIF has 256 colours and JPEG and WebP are lossy; the other three are exact.
    assert difference(photo, smooth()).mean() < {"GIF": 20, "JPEG": 5, "WEBP": 5}.get(kind, 0.001)


def test_bytes_bytearray_memoryview_and_image_are_the_same_photo():
    data = encoded(smooth(), "PNG")
    for photo in (bytearray(data), memoryview(data), Image.open(io.BytesIO(data))):
        assert decode(photo).tobytes() == smooth().tobytes()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")]
    + [("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("1", "TIFF"), ("P", "BMP"), ("L", "GIF")],
)
def test_every_mode_becomes_what_it_looks_like(mode, kind):
    original = smooth().convert(mode)
    photo = decode(encoded(original, kind))
    assert photo.mode == "RGB"
    assert difference(photo, original.convert("RGB")).mean() < 4


def test_lab_tiff():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(smooth(), *profiles, outputMode="LAB")
    assert difference(decode(encoded(lab, "TIFF")), smooth()).mean() < 2


def test_inverted_cmyk_of_adobe():
    """Photoshop's CMYK JPEGs hold inverted ink and say so in an Adobe segment."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(red, "JPEG", quality=95)
    assert b"Adobe" in data
    assert difference(decode(data), Image.new("RGB", (16, 16), (255, 0, 0))).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 128, 129, 256, 257, 25700, 40000, 65535]], dtype=np.uint16)
    photo = decode(encoded(Image.fromarray(values), kind))
    assert np.asarray(photo)[0, :, 1].tolist() == np.round(values[0] / 257).tolist()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiff_of_either_byte_order(order):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    # A TIFF by hand: one strip, then the tags.
    mark = order[0]
    tags = [(256, 3, 4), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, 8)]
    body = b"".join(
        struct.pack(f"{mark}HHI", tag, kind, 1)
        + (struct.pack(f"{mark}HH", value, 0) if kind == 3 else struct.pack(f"{mark}I", value))
        for tag, kind, value in tags
    )
    start = {"<": b"II*\0", ">": b"MM\0*"}[mark] + struct.pack(f"{mark}I", 16)
    data = start + values.astype(order).tobytes()
    data += struct.pack(f"{mark}H", len(tags)) + body + bytes(4)
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_32_bit_integers_in_python_are_16_bit_levels():
    values = np.array([[0, 257, 65535, 70000, -5]], dtype=np.int32)
    assert np.asarray(decode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255, 255, 0]


def test_16_bit_colour_is_at_most_a_level_off():
    values = [0, 255, 256, 4000, 33000, 65535]
    photo = decode(png(6, 1, 16, 2, b"\0" + b"".join(struct.pack(">HHH", v, v, v) for v in values)))
    assert np.abs(np.asarray(photo)[0, :, 0] - np.array(values) / 257).max() <= 1


def test_float_tiff_holds_fractions_or_levels():
    fractions = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    photo = decode(encoded(Image.fromarray(fractions), "TIFF"))
    assert np.asarray(photo)[0, :, 0].tolist() == [0, 128, 255, 0]
    levels = np.array([[0.0, 100.4, 300.0, -3.0]], dtype=np.float32)
    photo = decode(encoded(Image.fromarray(levels), "TIFF"))
    assert np.asarray(photo)[0, :, 0].tolist() == [0, 100, 255, 0]


def test_alpha_lies_over_white():
    rgba = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(0, 0, 0, 0), (200, 0, 0, 128), (10, 20, 30, 255)]):
        rgba.putpixel((x, 0), pixel)
    expected = Image.alpha_composite(Image.new("RGBA", (3, 1), "white"), rgba).convert("RGB")
    for kind in ("PNG", "TIFF"):
        assert difference(decode(encoded(rgba, kind)), expected).max() <= 1
    assert difference(decode(encoded(rgba, "WEBP", lossless=True, exact=True)), expected).max() <= 1


def test_transparent_palette_entries_are_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        photo = decode(encoded(palette, kind, transparency=0))
        assert [photo.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (250, 0, 0)]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0)])
def test_a_transparent_colour_of_a_png_that_python_opened_is_white(mode, key):
    """It was refused as damaged."""
    data = encoded(Image.new(mode, (4, 4), key), "PNG", transparency=key)
    assert decode(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_level_of_a_16_bit_png_is_white():
    name = b"tRNS" + struct.pack(">H", 500)
    extra = struct.pack(">I", 2) + name + struct.pack(">I", zlib.crc32(name))
    photo = decode(png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 500, 25700), extra))
    assert np.asarray(photo)[0, :, 0].tolist() == [255, 100]


def test_first_frame_and_first_page():
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        red, _, blue = decode(data).getpixel((4, 4))
        assert (red > 240, blue < 15) == (True, True), kind


def test_the_two_pictures_of_a_phone_are_one_jpeg():
    """Multi-picture JPEGs (MPO) are what many phones write; Pillow opens them as their own kind."""
    data = encoded(smooth(), "MPO", save_all=True, append_images=[smooth(seed=1)])
    assert difference(decode(data), smooth()).mean() < 5
    large = encoded(smooth(900, 900), "MPO")
    assert decode_photo(open_photo(large, "JPEG"), large, min_side=112).size == (225, 225)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "I", "F", "I;16"])
def test_pictures_of_many_bands_are_as_of_one(mode, monkeypatch):
    """Conversions go band by band, to hold two copies of a large photo and no more."""
    values = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.view(np.uint16)[:, :, 0].copy())
    elif mode == "LAB":
        image = Image.frombytes(mode, (40, 50), values[:, :, :3].tobytes())
    else:
        image = Image.fromarray(values).convert({"I": "L", "F": "L", "CMYK": "RGB"}.get(mode, mode))
        image = image.convert(mode)
    whole = decode(image)
    monkeypatch.setattr(image_decode, "BAND_PIXELS", 300)
    assert decode(image).tobytes() == whole.tobytes()


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation):
    """Each orientation stores the picture turned; upright, its red corner is at the top left."""
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Image.Transpose that stores it so
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode(encoded(stored, kind, exif=exif))
    assert photo.size == (32, 16)
    assert difference(photo, upright).mean() < 12


def test_orientation_survives_alpha_and_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (Image.new("RGBA", (4, 2)), Image.fromarray(np.zeros((2, 4), dtype=np.uint16))):
        assert decode(encoded(image, "PNG", exif=exif)).size == (2, 4)


def test_damaged_exif_does_not_spoil_a_photo():
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert decode(data).size == (80, 60)


# --- what is no photo


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"%PDF-1.7 ...",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypmp42\0\0\0\0",
        b"BMW is a maker of cars",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"PK\x03\x04",
        b"\x00" * 100,
        encoded(Image.new("RGB", (4, 4)), "PPM"),
        encoded(Image.new("RGB", (4, 4)), "JPEG2000"),
        encoded(Image.new("RGB", (16, 16)), "ICO"),
    ],
)
def test_other_content_is_unsupported(data):
    with pytest.raises(UnsupportedMediaType):
        decode(data)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(kind, share):
    data = encoded(smooth(), kind)
    with pytest.raises(InvalidImage) as caught:
        decode(data[: max(12, int(len(data) * share))])
    assert type(caught.value) is InvalidImage


def test_errors_are_one_type_for_library_users():
    assert issubclass(UnsupportedMediaType, InvalidImage)
    assert issubclass(ImageTooLarge, InvalidImage)
    assert issubclass(InvalidImage, ValueError)


@pytest.mark.parametrize("data", [b"", png(0, 5, 8, 0, b""), b"GIF89a" + bytes(20)])
def test_no_pixels(data):
    with pytest.raises(InvalidImage):
        decode(data)


def test_no_pixels_in_python():
    with pytest.raises(InvalidImage, match="no pixels"):
        decode(Image.new("RGB", (0, 3)))


# --- limits, before a pixel is decoded


def test_too_many_bytes():
    with pytest.raises(ImageTooLarge, match="16 MiB"):
        decode(encoded(smooth(), "JPEG") + bytes(16 * 2**20))


@pytest.mark.parametrize("kind", FORMATS)
def test_decompression_bombs_are_refused_by_their_header(kind):
    tracemalloc.start()
    with pytest.raises(ImageTooLarge, match="megapixels"):
        decode(huge_headers()[kind])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("sides", [(9000, 9000), (10_000, 8000), (13_000, 13_000)])
def test_a_webp_is_refused_by_its_header(sides):
    """Within Pillow's own limits its plugin took memory first, and ran into the process's limit."""
    width, height = (side - 1 for side in sides)
    header = b"\x2f" + (width | height << 14).to_bytes(4, "little") + bytes(8)
    chunk = b"VP8L" + len(header).to_bytes(4, "little") + header + b"\0"
    with pytest.raises(ImageTooLarge, match="megapixels"):
        decode(b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "GIF", "PNG"])
def test_the_frames_of_a_callers_image_stay(kind):
    frames = [smooth(40, 30, seed) for seed in range(3)]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    image = Image.open(content)
    decode(image)
    image.seek(1)
    image.load()
    assert difference(image.convert("RGB"), frames[1]).mean() < 12


def test_the_limit_itself_is_taken(monkeypatch):
    monkeypatch.setattr(image_decode, "MAX_PIXELS", 80 * 60)
    assert decode(encoded(smooth(), "PNG")).size == (80, 60)
    with pytest.raises(ImageTooLarge):
        decode(encoded(smooth(81, 60), "PNG"))


def test_a_line_of_pixels_is_refused():
    """Pillow keeps a pointer a row: 1 x 64,000,000 took 1.3 GB though within the megapixels."""
    with pytest.raises(ImageTooLarge, match="side"):
        decode(png(1, 64_000_000, 8, 0, b""))


def test_scans_are_not_counted_outside_the_picture():
    """A motion photo carries a film after its end, whose bytes look like markers by chance."""
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 500)
    assert decode(data + b"\xff\xda" * 500).size == (80, 60)


def test_a_gif_of_a_thousand_frames_costs_one():
    frames = [Image.new("L", (8, 8), i % 256) for i in range(1000)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (0, 0, 0)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32),
    flips=st.integers(1, 30),
    cut=st.floats(0, 1),
)
def test_damage_is_an_invalid_image_or_a_picture(kind, seed, flips, cut):
    data = bytearray(encoded(smooth(24, 18), kind))
    chance = random.Random(seed)
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if cut < 0.5:
        del data[int(len(data) * cut * 2) :]
    with contextlib.suppress(InvalidImage):
        assert decode(data).mode == "RGB"


# --- resize and tensor


def test_squash_takes_the_whole_photo():
    photo = Image.new("RGB", (300, 100), "white")
    photo.paste((255, 0, 0), (0, 0, 100, 100))
    small = resize(photo, PreprocessConfig(image_size=30))
    assert small.size == (30, 30)
    assert small.getpixel((3, 15)) == (255, 0, 0)
    assert small.getpixel((16, 15)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_crop_takes_the_middle_square(size):
    photo = Image.new("RGB", size, "white")
    middle = (size[0] // 2 - 50, size[1] // 2 - 50, size[0] // 2 + 50, size[1] // 2 + 50)
    photo.paste((255, 0, 0), middle)
    small = resize(photo, PreprocessConfig(image_size=30, resize="crop"))
    # The filter reaches a pixel over the edge, as it does when resizing first and cutting then.
    inside = small.crop((1, 1, 29, 29))
    assert inside.tobytes() == Image.new("RGB", (28, 28), (255, 0, 0)).tobytes()
    assert small.getpixel((0, 0))[1] < 40


@pytest.mark.parametrize(
    ("size", "fields", "region"),
    [
        ((300, 100), {"image_size": 20}, (0, 0, 1, 1)),
        ((300, 100), {"image_size": 20, "resize": "crop"}, (1 / 3, 0, 2 / 3, 1)),
        ((100, 400), {"image_size": 20, "resize": "crop"}, (0, 3 / 8, 1, 5 / 8)),
        ((640, 480), {"image_size": 224, "resize_to": 256}, (1 / 16, 1 / 16, 15 / 16, 15 / 16)),
        (
            (400, 200),
            {"image_size": 24, "resize_to": 32, "resize": "crop"},
            (0.3125, 0.125, 0.6875, 0.875),
        ),
    ],
)
def test_the_region_that_the_model_sees(size, fields, region):
    """Word maps of a model that sees the middle were drawn over the whole photo."""
    config = PreprocessConfig(**fields)
    x0, y0, x1, y1 = seen_region(size, config)
    assert (x0, y0, x1, y1) == pytest.approx(region)
    # That part alone, squashed, is what the model gets; the filter reaches over its edge.
    photo = smooth(*size)
    box = [round(x0 * size[0]), round(y0 * size[1]), round(x1 * size[0]), round(y1 * size[1])]
    whole = PreprocessConfig(image_size=config.image_size)
    seen, alone = resize(photo, config), resize(photo.crop(box), whole)
    assert difference(seen, alone).mean() < 2
    if region != (0, 0, 1, 1):
        assert difference(seen, resize(photo, whole)).mean() > 5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_is_pillows_antialiased_one(interpolation):
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    config = PreprocessConfig(image_size=32, interpolation=interpolation)
    photo = smooth(200, 150)
    assert (
        resize(photo, config).tobytes() == photo.resize((32, 32), filters[interpolation]).tobytes()
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_extreme_shapes(size, fit):
    data = encoded(Image.new("RGB", size, (10, 20, 30)), "PNG")
    tensor = preprocess(data, PreprocessConfig(image_size=16, resize=fit))
    assert tensor.shape == (3, 16, 16)
    assert torch.allclose(tensor[0], torch.tensor(10 / 255 * 2 - 1))


def test_tensor_is_normalised_as_torchvision_does_it():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    config = PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = functional.normalize(
        functional.to_dtype(functional.pil_to_tensor(smooth()), torch.float32, scale=True),
        config.mean,
        config.std,
    )
    tensor = to_tensor(smooth(), config)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, expected)


def natural(width: int, height: int) -> Image.Image:
    """Noise with a photograph's spectrum (amplitude falling as 1/f), brighter than coloured."""
    chance = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    waves = chance.normal(size=(3, *frequency.shape)) + 1j * chance.normal(
        size=(3, *frequency.shape)
    )
    field = np.fft.irfft2(waves / frequency**1.1, s=(height, width)).transpose(1, 2, 0)
    field = field[..., :1] + 0.4 * field
    return Image.fromarray((field / field.std() * 50 + 128).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(1800, 1350), (1000, 900)])
def test_reduced_jpeg_decoding_changes_little(size):
    """Decoded at 1/2 or 1/4, then resized: within 1 level in the mean and 10 at the worst."""
    config = PreprocessConfig()
    data = encoded(natural(*size), "JPEG", quality=90)
    reduced = decode_photo(open_photo(data, "JPEG"), data, min_side=224)
    assert 448 <= min(reduced.size) < min(size)
    off = difference(decode_resized(data, config), resize(decode(data), config))
    assert off.mean() < 1
    assert off.max() <= 10


def test_small_jpegs_are_decoded_whole():
    data, config = encoded(smooth(500, 448), "JPEG"), PreprocessConfig()
    assert decode_resized(data, config).tobytes() == resize(decode(data), config).tobytes()


@pytest.mark.parametrize("how", [PreprocessConfig(64), PreprocessConfig(48, resize="crop",
                         resize_to=64, interpolation="bilinear")])  # fmt: skip
@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_resized_in_the_decoding_process_or_here(kind, how):
    """The process that decodes what is not known to be cheap resizes as this one does."""
    data = encoded(smooth(150, 120), kind)
    assert decode_resized(data, how).tobytes() == resize(decode(data), how).tobytes()


def test_a_python_image_is_left_alone():
    """Reduced decoding changes the picture's size, which would be seen by its owner."""
    image = Image.open(io.BytesIO(encoded(smooth(1000, 1000), "JPEG")))
    decode_resized(image, PreprocessConfig(100))
    assert image.size == (1000, 1000)


# --- config


def test_config_goes_through_json_types():
    config = PreprocessConfig(image_size=64, mean=(0.1, 0.2, 0.3), resize="crop")
    values = config.to_dict()
    assert values["mean"] == [0.1, 0.2, 0.3]
    assert PreprocessConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": "224"}, "image_size"),
        ({"mean": [0.5]}, "mean"),
        ({"mean": [0.5, 0.5, "x"]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"resize": "stretch"}, "resize"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"colour": 1}, "colour"),
    ],
)
def test_config_names_the_wrong_field(values, field):
    with pytest.raises(UserError, match=field):
        PreprocessConfig.from_dict(values)
