"""Every photo, whatever its bytes, is answered within its processor time and memory, and shows the
colours that a browser shows."""

import contextlib
import math
import os
import select
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from cost import INTERPRETER_MIB, cost_of, forget_processes
from hostile import (
    HOSTILE,
    MEGAPIXELS,
    RED,
    bmp,
    grey_tiff,
    png_of,
    red_png,
    scans,
    segment,
)
from photos import chunk, encoded, heic, natural, smooth
from PIL import Image

from handler import decode_process
from handler.image_preprocess import ImageTooComplex, InvalidImage, Patience, decode
from handler.image_walk import Effort, walk

WHITE = (255, 255, 255)
# A text of 2 MB, as drawing tools write their workflow.
NODES = zlib.compress(os.urandom(10**6).hex().encode())
DEEP = b"\x12\x34\x56\x78\x9a\xbc"  # a colour of 16 bits a channel
MASKS = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)

# One of each way to be stopped: by the walk, by the time, by the memory, by the size.
OFTEN = {
    "jpeg, tiny EXIF segments",
    "jpeg, thousands of scans",
    "png, colour profiles",
    "png, 63 megapixels of a kilobyte",
    "gif, a comment of one-byte blocks",
    "bmp, run length, one pixel a run",
    "tiff, millions of strips",
    "tiff, strips of the same slow bytes",
    "avif that is none",
}


def most_mib(megapixels: float) -> float:
    """What a photo may take, and the interpreter that decodes it."""
    return max(512, 12 * megapixels * 10**6 / 2**20) + INTERPRETER_MIB


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE],
)
def test_a_hostile_photo_is_answered_in_time(name):
    """8 seconds to minutes of a core each; two of 131 KB stopped the server for two minutes."""
    data = HOSTILE[name]()
    assert len(data) <= 2**24
    forget_processes()
    cost, megapixels = cost_of(data), MEGAPIXELS.get(name, 0)
    assert cost.seconds < 2 + megapixels / 16
    assert cost.mib < most_mib(megapixels)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (red_png(chunk(b"zTXt", b"workflow\0\0" + NODES)), RED),
        (red_png(chunk(b"iCCP", b"a\0\0not a profile")), RED),
        (png_of(b"\x55\x55", 8, 2, 0, chunk(b"tRNS", b"\0\1")), WHITE),
        (png_of(b"\xaa\xaa", 8, 2, 0, chunk(b"tRNS", b"\0\1")), (170,) * 3),
        (png_of(b"\x33\x33\x33\x33", 8, 4, 0, chunk(b"tRNS", b"\0\3")), WHITE),
        (png_of(b"\x33\x33\x33\x33", 8, 4, 0, chunk(b"tRNS", b"\0\x33")), (51,) * 3),
        (png_of(b"\x00", 8, 1, 0, chunk(b"tRNS", b"\0\0")), WHITE),
        (png_of(b"\xff", 8, 1, 0, chunk(b"tRNS", b"\0\0")), WHITE),
        (png_of(b"\x00", 8, 1, 0, chunk(b"tRNS", b"\0\1")), (0,) * 3),
        (png_of(bytes([7]) * 8, 8, 8, 0, chunk(b"tRNS", b"\0\7")), WHITE),
        (png_of(bytes([7]) * 8, 8, 8, 0, chunk(b"tRNS", b"\0\6")), (7,) * 3),
        (png_of(bytes(RED) * 8, 8, 8, 2, chunk(b"tRNS", b"\0\xc8\0\x1e\0\x28")), WHITE),
        (png_of(bytes(RED) * 8, 8, 8, 2, chunk(b"tRNS", b"\0\xc8\0\x1e\0\x29")), RED),
        (png_of(DEEP * 8, 8, 16, 2, chunk(b"tRNS", DEEP)), WHITE),
        (png_of((DEEP[:-1] + b"\xbd") * 8, 8, 16, 2, chunk(b"tRNS", DEEP)), (0x12, 0x56, 0x9A)),
        (grey_tiff(bytes(512), 16, photometric=0), WHITE),
        (grey_tiff(b"\xff" * 512, 16, photometric=0), (0,) * 3),
        (grey_tiff(b"\x80\x80" * 256, 16), (128,) * 3),
        (grey_tiff(b"\x80" * 1024, 32), (128,) * 3),
        (grey_tiff(b"\x80" * 1024, 32, order=">"), (128,) * 3),
        (grey_tiff(zlib.compress(struct.pack(">f", 0.5) * 256), 32, 1, ">", 3, 8), (128,) * 3),
        (grey_tiff(zlib.compress(struct.pack("<f", 0.5) * 256), 32, 1, "<", 3, 8), (128,) * 3),
        (grey_tiff(struct.pack(">f", 0.5) * 256, 32, 1, ">", 3), (128,) * 3),
        (grey_tiff(struct.pack("<f", 0.25) * 256, 32, 0, "<", 3), (191,) * 3),
        (bmp(8, 8, 32, 3, (bytes(RED[::-1]) + b"\0") * 64, masks=MASKS), RED),
        (bmp(8, 8, 32, 3, (bytes(RED[::-1]) + b"\x80") * 64, masks=MASKS), (227, 142, 147)),
    ],
)  # fmt: skip
def test_colours_are_those_of_a_browser(data, colour):
    pixel = decode(data).getpixel((4, 4))
    assert all(abs(a - b) <= 1 for a, b in zip(pixel, colour, strict=True)), pixel


@pytest.mark.parametrize(
    ("bits", "form", "samples", "photometric"), [(64, 3, 1, 1), (8, 1, 6, 5), (24, 1, 1, 1)]
)
def test_a_kind_of_tiff_that_is_not_read_is_named(bits, form, samples, photometric):
    data = grey_tiff(bytes(256 * bits * samples // 8), bits, photometric, "<", form, 1, samples)
    with pytest.raises(InvalidImage, match="this kind of TIFF is not supported"):
        decode(data)


def test_a_directory_beyond_any_file_is_damage():
    """An offset of 64 bits raised OverflowError, and the server answered 500."""
    with pytest.raises(InvalidImage):
        decode(b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**64 - 1) + bytes(32))


# --- AVIF and HEIC ---


WRITERS = {
    "AVIF": lambda image, **options: encoded(image, "AVIF", quality=95, **options),
    "HEIC": lambda image, **options: heic(image, quality=95, **options),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_avif_and_heic_are_read(kind):
    photo = smooth(160, 120)
    read = decode(WRITERS[kind](photo))
    difference = np.asarray(read).astype(int) - np.asarray(photo)
    assert read.size == photo.size and abs(difference).mean() < 3


@pytest.mark.parametrize("kind", WRITERS)
def test_their_alpha_lies_over_white(kind):
    photo = Image.new("RGBA", (64, 64), (*RED, 255))
    photo.paste((0, 0, 0, 0), (0, 0, 32, 64))
    read = decode(WRITERS[kind](photo))
    assert min(read.getpixel((8, 32))) > 250
    assert all(abs(a - b) < 6 for a, b in zip(read.getpixel((56, 32)), RED, strict=True))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", WRITERS)
def test_their_orientation_is_applied(kind, orientation):
    photo = smooth(96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = decode(WRITERS[kind](photo, exif=exif.tobytes()))
    turn = {1: 0, 3: 180, 6: 270, 8: 90}[orientation]
    expected = photo.rotate(turn, expand=True)
    difference = np.asarray(read).astype(int) - np.asarray(expected)
    assert read.size == expected.size and abs(difference).mean() < 6


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_ones_are_invalid(kind, share):
    data = WRITERS[kind](smooth(160, 120))
    with pytest.raises(InvalidImage):
        decode(data[: int(share * len(data))])


LARGE = {
    "JPEG": lambda image: encoded(image, "JPEG", quality=88),
    "progressive JPEG": lambda image: encoded(image, "JPEG", quality=88, progressive=True),
    "PNG with alpha": lambda image: encoded(with_alpha(image), "PNG", compress_level=3),
    "WebP": lambda image: encoded(image, "WEBP", quality=80, method=0),
    "AVIF": lambda image: encoded(image, "AVIF", quality=75, speed=10),
    "AVIF with alpha": lambda image: encoded(with_alpha(image), "AVIF", quality=60, speed=10),
    "HEIC": lambda image: heic(image, quality=55, enc_params={"preset": "ultrafast"}),
    "HEIC with alpha": lambda image: heic(
        with_alpha(image), quality=50, enc_params={"preset": "ultrafast"}
    ),
}


def with_alpha(image: Image.Image) -> Image.Image:
    """As a program may write it in 16 MiB: colours in blocks of 64 pixels."""
    small = image.resize((image.width // 8, image.height // 8))
    small.putalpha(Image.linear_gradient("L").resize(small.size))
    return small.resize(image.size, Image.Resampling.NEAREST)


@pytest.mark.slow
@pytest.mark.parametrize("height", [6000, 8000])
@pytest.mark.parametrize("kind", LARGE)
def test_ordinary_photos_of_48_and_64_megapixels_are_read(kind, height):
    tile = np.asarray(natural(1000, 1000))
    data = LARGE[kind](Image.fromarray(np.tile(tile, (height // 1000, 8, 1))))
    forget_processes()
    cost, megapixels = cost_of(data), 8000 * height / 10**6
    print(f"{kind} of {megapixels:.0f} megapixels, {len(data):,} bytes: {cost}")
    assert cost.size == (8000, height)
    assert cost.seconds < 2 + megapixels / 16
    assert cost.mib < most_mib(megapixels)


# --- what is ordinary stays in this process ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_ordinary_photos_are_decoded_at_once(kind, monkeypatch):
    monkeypatch.setattr("handler.image_preprocess.decode_elsewhere", None)
    assert decode(encoded(smooth(), kind)).size == smooth().size


def test_what_cameras_and_programs_write_is_ordinary():
    photo = smooth(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    film = b"\0\0\0\x18ftypmp42" + os.urandom(2**20)
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(3000))
    thumbnail = segment(0xE1, b"Exif\0\0" + encoded(photo, "JPEG"))
    progressive = encoded(photo, "JPEG", progressive=True, exif=exif)
    depth = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))
    for data in (
        progressive,
        progressive + film,
        progressive[:2] + profile + thumbnail + 200 * depth + progressive[2:] + film,
        encoded(photo, "MPO", save_all=True, append_images=[photo]),
        encoded(photo.convert("CMYK"), "JPEG"),
    ):
        cut, effort = walk(data, "JPEG")
        assert effort == Effort.CHEAP
        assert np.array_equal(decode(data), decode(cut))


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": bytes(8)}])
def test_a_large_webp_is_not_opened_in_this_process(options, monkeypatch):
    """Pillow allocates 8 bytes per pixel for it, beside those of the process that decodes it."""
    monkeypatch.setattr("handler.image_preprocess.open_photo", None)
    photo = Image.new("RGB", (4000, 2001), RED)
    data = encoded(photo, "WEBP", method=0, **options)
    assert data[12:16] == {"lossless": b"VP8L", "exif": b"VP8X"}.get(*options or [""], b"VP8 ")
    assert decode(data).size == photo.size


def test_a_png_in_many_pieces_is_the_same_picture():
    whole = encoded(smooth(), "PNG")
    start = whole.index(b"IDAT")
    length = int.from_bytes(whole[start - 4 : start], "big")
    pixels = whole[start + 4 : start + 4 + length]
    pieces = b"".join(chunk(b"IDAT", pixels[i : i + 1]) for i in range(length))
    many = whole[: start - 4] + pieces + whole[start + 8 + length :]
    assert many.count(b"IDAT") > 2000
    assert np.array_equal(decode(many), decode(whole))


# --- the process that decodes ---


def test_one_process_takes_one_photo_after_the_other():
    avif = encoded(smooth(), "AVIF")
    decode(avif)
    [process] = decode_process._idle.processes
    for _ in range(3):
        decode(avif)
        with pytest.raises(InvalidImage):
            decode(avif[:-100])
    assert decode_process._idle.processes == [process]
    process.process.kill()
    process.process.wait()
    assert decode(avif).size == smooth().size


def test_a_photo_that_overran_ends_no_more_than_a_fork():
    forget_processes()
    avif = encoded(smooth(), "AVIF")
    decode(avif)
    [process] = decode_process._idle.processes
    for _ in range(2):
        with pytest.raises(ImageTooComplex, match="too much time or memory"):
            decode(scans(4000, 5000), patience=Patience(0.05))
        assert decode(avif).size == smooth().size
    assert decode_process._idle.processes == [process]


@contextlib.contextmanager
def decoder_after(code: str) -> Iterator[None]:
    """Lets processes that decode run `code` before they begin."""
    start = decode_process.START
    decode_process.START = start.replace("from handler", f"{code}; from handler")
    forget_processes()
    try:
        yield
    finally:
        decode_process.START = start
        forget_processes()


def test_a_decoder_that_crashes_is_told_from_one_that_overran():
    code = "import os; from handler import decode_worker as w; w.open_photo = lambda *_: os.abort()"
    with decoder_after(code), pytest.raises(InvalidImage, match="its decoder failed"):
        decode(encoded(smooth(), "AVIF"))


def test_patience_is_spent_by_what_is_slow_for_its_size():
    patience = Patience()
    patience.spend(-0.5)
    assert patience.share == 1
    patience.spend(0.3 * decode_process.SECONDS)
    assert patience.share == pytest.approx(0.7)
    shares = []
    for _ in range(7):
        patience.spend(math.inf)
        shares.append(patience.share)
    assert shares[:2] == [0.2, 0.1] and sum(shares) < 0.4


def test_less_patience_ends_it_sooner():
    assert cost_of(scans(4000, 5000), Patience(0.1)).seconds < 1.2


def test_memory_is_limited():
    """The limit of the address space holds in the decoder's own C code."""
    data = encoded(Image.new("RGB", (7000, 7000), RED), "AVIF", speed=10)
    code = "from handler import decode_worker as w; w.MEMORY = w.MEMORY_A_PIXEL = 0"
    with decoder_after(f"{code}; w.UNTOUCHED = 20 * 2**20"), pytest.raises(InvalidImage):
        decode(data)


def test_threads_have_processes_of_their_own():
    avif = encoded(smooth(), "AVIF")
    sizes = []
    threads = [threading.Thread(target=lambda: sizes.append(decode(avif).size)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [smooth().size] * 6


def test_a_fork_does_not_use_its_parents_process():
    avif = encoded(smooth(), "AVIF")
    decode(avif)
    child = os.fork()
    if child == 0:
        os._exit(0 if decode(avif).size == smooth().size else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert decode(avif).size == smooth().size


def run_elsewhere(code: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": os.path.join(root, "tests")}
    begin = "import os; from handler.image_preprocess import decode; from photos import *;"
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        cwd=root,  # which is '' in sys.path
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_process_is_found_from_another_folder():
    code = "os.chdir('/'); print(decode(encoded(smooth(), 'AVIF')).size)"
    assert run_elsewhere(code).stdout == f"{smooth().size}\n"


def test_more_than_a_thousand_open_files_change_nothing():
    """select() takes no descriptor above 1023, and the photo was called too complex."""
    code = (
        "import resource; most = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most));"
        "files = [open(os.devnull) for _ in range(1100)];"
        "print(*(decode(encoded(smooth(), 'AVIF')).size for _ in range(2)))"
    )
    done = run_elsewhere(code)
    assert done.stdout == f"{smooth().size} {smooth().size}\n", done.stderr


def test_damage_between_two_photos_is_noticed():
    """A process that was ended from outside while it waited has said so, unasked."""
    forget_processes()
    avif = encoded(smooth(), "AVIF")
    decode(avif)
    [process] = decode_process._idle.processes
    [fork] = psutil.Process(process.process.pid).children()
    fork.kill()
    assert select.select([process.socket], [], [], 10)[0]
    assert decode(avif).size == smooth().size


def test_it_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "photo.avif").write_bytes(encoded(smooth(), "AVIF"))
    code = (
        "import os; from pathlib import Path; from handler.image_preprocess import decode;"
        "import psutil; decode(Path('photo.avif').read_bytes());"
        "print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    processes = [int(pid) for pid in done.stdout.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
