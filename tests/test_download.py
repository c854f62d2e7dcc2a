"""The download against a local server that breaks off, refuses and lies."""

import hashlib
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from handler.errors import UserError
from training import prepare
from training.data import download
from training.data.download import download_flickr8k, fetch, unpack
from training.data.flickr import read_flickr8k
from training.data.manifest import read_manifest

BODY = bytes(range(256)) * 4000


class Mirror(ThreadingHTTPServer):
    """Serves `files`; the first `breaks` answers stop after `stop_after` bytes."""

    files: dict[str, bytes]
    breaks = 0
    stop_after = 300_000
    ranges_honoured = True
    failures: list[int]
    asked: list[tuple[str, str | None]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        mirror, wanted = self.server, self.headers.get("Range")
        mirror.asked.append((self.path, wanted))
        body = mirror.files.get(self.path.lstrip("/"))
        if mirror.failures or body is None:
            self.send_error(mirror.failures.pop() if mirror.failures else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted and mirror.ranges_honoured:
            self.send_response(206 if start < len(body) else 416)
            span = f"{start}-{len(body) - 1}" if start < len(body) else "*"
            self.send_header("Content-Range", f"bytes {span}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mirror.breaks:
            mirror.breaks -= 1
            body = body[: mirror.stop_after]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror(("127.0.0.1", 0), Answer) as server:
        server.files, server.failures, server.asked = {"file.zip": BODY}, [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_loaded_once_and_its_sum_recorded(mirror: Mirror, tmp_path: Path) -> None:
    target = tmp_path / "file.zip"
    for _ in range(2):
        fetch(f"{mirror.url}/file.zip", target, hashlib.md5(BODY).hexdigest())
    assert target.read_bytes() == BODY and len(mirror.asked) == 1
    assert (tmp_path / "file.zip.sha256").read_text().split() == [
        hashlib.sha256(BODY).hexdigest(),
        "file.zip",
    ]


def test_a_broken_connection_is_taken_up_where_it_broke(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = 2
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip", pause_s=0)
    assert (tmp_path / "file.zip").read_bytes() == BODY
    assert len(mirror.asked) == 3 and mirror.asked[1][1] not in (None, "bytes=0-")


def test_an_earlier_run_is_continued(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(BODY[:1000])
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip")
    assert (tmp_path / "file.zip").read_bytes() == BODY
    assert mirror.asked == [("/file.zip", "bytes=1000-")]


def test_a_part_that_is_complete_already_is_taken(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(BODY)
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip")
    assert (tmp_path / "file.zip").read_bytes() == BODY


def test_a_server_without_ranges_starts_over(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges_honoured = False
    (tmp_path / "file.zip.part").write_bytes(BODY[:1000])
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip")
    assert (tmp_path / "file.zip").read_bytes() == BODY


def test_a_server_in_trouble_is_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.failures = [503, 429]
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip", pause_s=0)
    assert len(mirror.asked) == 3


def test_endless_trouble_ends_and_a_refusal_ends_at_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.failures = [503] * 9
    with pytest.raises(UserError, match="5 times"):
        fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip", pause_s=0)
    mirror.failures, mirror.asked = [], []
    with pytest.raises(UserError, match="404"):
        fetch(f"{mirror.url}/none.zip", tmp_path / "none.zip")
    assert len(mirror.asked) == 1


def test_a_wrong_sum_is_refused_and_the_file_removed(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="md5"):
        fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip", "0" * 32)
    assert list(tmp_path.iterdir()) == []
    fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip")
    (tmp_path / "file.zip").write_bytes(b"of the user")
    with pytest.raises(UserError, match="sha256.*; remove it"):
        fetch(f"{mirror.url}/file.zip", tmp_path / "file.zip")
    assert (tmp_path / "file.zip").read_bytes() == b"of the user"


def test_no_server_and_no_url_are_one_error(tmp_path: Path, mirror: Mirror) -> None:
    with pytest.raises(UserError, match="ConnectionError"):
        fetch("http://127.0.0.1:1/file.zip", tmp_path / "file.zip", pause_s=0)
    with pytest.raises(UserError, match="nonsense"):
        fetch("nonsense", tmp_path / "file.zip")


def zipped(files: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_the_zips_become_the_original_layout(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files = {
        "Flickr8k_Dataset.zip": zipped({"Flicker8k_Dataset/a.jpg": b"x", "__MACOSX/._a": b""}),
        "Flickr8k_text.zip": zipped(
            {"Flickr8k.token.txt": b"a.jpg#0\tA dog .\n", "Flickr_8k.trainImages.txt": b"a.jpg\n"}
        ),
    }
    folder = download_flickr8k(tmp_path, mirror.url)
    assert [photo.id for photo in read_flickr8k(folder).photos] == ["a.jpg"]
    assert not (folder / "__MACOSX").exists()
    assert download_flickr8k(tmp_path, mirror.url) == folder and len(mirror.asked) == 2
    assert set(download.MD5) == set(mirror.files)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no zip", "damaged"),
        (zipped({"../out.txt": b"x"}), "inside"),
        (zipped({"a.txt": b"caption"}).replace(b"caption", b"Caption"), "CRC"),
    ],
)
def test_a_damaged_zip_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file.zip").write_bytes(content)
    with pytest.raises(UserError, match=said):
        unpack(tmp_path / "file.zip", tmp_path / "out")
    assert not (tmp_path / "out.txt").exists()


def test_whatever_byte_is_wrong_the_zip_is_refused_or_whole(tmp_path: Path) -> None:
    """A broken deflate stream raises zlib.error, a set encryption flag RuntimeError."""
    content = BODY[:600]
    good = zipped({"a.txt": content}, zipfile.ZIP_DEFLATED)
    refused = 0
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 0xFF
        (tmp_path / "file.zip").write_bytes(data)
        try:
            unpack(tmp_path / "file.zip", tmp_path / str(position))
        except UserError as error:
            assert "file.zip" in str(error)
            refused += 1
    assert refused > len(good) / 2


def test_a_mirror_is_one_option_away(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (9, 7)).save(photo, "JPEG")
    mirror.files = {
        "Flickr8k_Dataset.zip": zipped({"Flicker8k_Dataset/a.jpg": photo.getvalue()}),
        "Flickr8k_text.zip": zipped(
            {"Flickr8k.token.txt": b"a.jpg#0\tA dog .\n", "Flickr_8k.trainImages.txt": b"a.jpg\n"}
        ),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", "flickr8k", "--mirror", mirror.url])
    prepare.main()
    manifest = read_manifest(tmp_path / "build" / "data" / "flickr8k")
    assert [row.captions for row in manifest.split("train")] == [("A dog .",)]
    assert manifest.path(manifest.rows[0]).is_file()
