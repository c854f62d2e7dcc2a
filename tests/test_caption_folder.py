"""Captions of a whole folder: one row a photo, which says what it was made from."""

import hashlib
import json
import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from photos import encoded, smooth, write_mixed_folder
from PIL import Image

from handler.client import folder as folder_module
from handler.client.connection import ServerError
from handler.client.folder import (
    CaptionFile,
    caption_folder,
    find_photos,
    in_order,
    write_alt_texts,
)
from handler.errors import UserError
from handler.files import write_atomic

NAMES = ["a.jpg", "deeper/b.PNG", "no_suffix"]


@pytest.fixture
def folder(tmp_path):
    return write_mixed_folder(tmp_path / "photos")


class Asked:
    """A server that captions a photo by its size and counts what it was asked."""

    def __init__(self, checkpoint: str = "sha256:one", precision: str = "fp32") -> None:
        self.photos: list[bytes] = []
        self.model = {"checkpoint": checkpoint, "precision": precision}

    def __call__(self, photo: bytes, **options: object) -> dict:
        self.photos.append(photo)
        caption = f"größe {len(photo)} 猫 {self.model['checkpoint']} {options.get('num_beams')}"
        return {"caption": caption, "captions": [{"caption": caption}], "model": self.model}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


# --- the folder


def test_a_linked_folder_is_captioned_and_long_names_are_written(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    name = "n" * 244 + ".png"
    (other / name).write_bytes(encoded(smooth(), "PNG"))
    (folder / "link").symlink_to(other)
    (folder / "deeper/up").symlink_to(folder)
    assert list(find_photos(folder)) == ["a.jpg", "deeper/b.PNG", f"link/{name}", "no_suffix"]
    write_atomic(other / name, b"changed")
    assert (other / name).read_bytes() == b"changed"


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    """Its photos were left out without a word."""
    scan = os.scandir

    def forbidden(path):
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=f"{folder}/deeper: Permission denied"):
        find_photos(folder)


def test_photos_are_told_by_content_or_name(folder, monkeypatch):
    (folder / "broken.jpg").write_text("no photo")
    names = ["a.jpg", "broken.jpg", "deeper/b.PNG", "no_suffix"]
    assert list(find_photos(folder)) == names

    def forbidden(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A photo without permission was passed over: nobody heard that it has no caption.
    monkeypatch.setattr(Path, "open", forbidden)
    assert list(find_photos(folder)) == names[:-1]


def test_a_row_says_what_it_is_of(folder, tmp_path):
    out = tmp_path / "out" / "captions.jsonl"
    assert caption_folder(Asked(), folder, out, {"num_beams": 3, "seed": None}) == []
    rows = rows_of(out)
    assert [row["image"] for row in rows] == NAMES
    photo = (folder / "a.jpg").read_bytes()
    assert rows[0] == {
        "image": "a.jpg",
        "bytes": len(photo),
        "sha256": hashlib.sha256(photo).hexdigest(),
        "checkpoint": "sha256:one",
        "precision": "fp32",
        "options": {"num_beams": "3"},
        "caption": f"größe {len(photo)} 猫 sha256:one 3",
        "captions": [{"caption": f"größe {len(photo)} 猫 sha256:one 3"}],
    }


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:7])
    asked = Asked()
    caption_folder(asked, folder, out, {})
    assert len(asked.photos) == 2
    assert out.read_bytes() == whole


# --- what changed is captioned again


def change_photo(folder: Path, _: dict) -> None:
    Image.new("RGB", (9, 9), "red").save(folder / "deeper/b.PNG")


@pytest.mark.parametrize(
    ("change", "asked", "again", "says"),
    [
        (change_photo, Asked(), ["deeper/b.PNG"], "1 changed"),
        (lambda _, options: options.update(num_beams=2), Asked(), NAMES, "3 with other options"),
        (lambda *_: None, Asked("sha256:two"), NAMES, "3 by another checkpoint or precision"),
        (lambda *_: None, Asked(precision="int8"), NAMES, "3 by another checkpoint or precision"),
    ],
    ids=["photo", "options", "checkpoint", "precision"],
)
def test_what_changed_is_captioned_again(folder, tmp_path, capsys, change, asked, again, says):
    """The old captions stayed, with exit status 0."""
    out, options = tmp_path / "captions.jsonl", {"num_beams": 1}
    caption_folder(Asked(), folder, out, options)
    before = {row["image"]: row for row in rows_of(out)}
    change(folder, options)
    capsys.readouterr()
    caption_folder(asked, folder, out, options)
    after = {row["image"]: row for row in rows_of(out)}
    assert list(after) == NAMES and len(rows_of(out)) == len(NAMES)
    assert [name for name in NAMES if after[name] != before[name]] == again
    printed = capsys.readouterr().out
    assert f"{len(again)} captioned, {len(NAMES) - len(again)} unchanged" in printed
    assert f"captioned again: {says}" in printed


def test_nothing_changed_is_one_question(folder, tmp_path, capsys):
    """Only an answer says which checkpoint is served."""
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    whole, number = out.read_bytes(), out.stat().st_ino
    capsys.readouterr()
    asked = Asked()
    caption_folder(asked, folder, out, {})
    assert len(asked.photos) == 1
    assert (out.read_bytes(), out.stat().st_ino) == (whole, number)
    assert capsys.readouterr().out == f"{out}: 0 captioned, 3 unchanged\n"


def test_rows_of_an_earlier_version_are_captioned_again(folder, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    out.write_text('{"image": "a.jpg", "caption": "old", "captions": []}\n')
    caption_folder(Asked(), folder, out, {})
    assert "old" not in {row["caption"] for row in rows_of(out)}
    assert "1 without a record" in capsys.readouterr().out


def test_the_file_keeps_its_other_rows_its_link_and_its_permissions(folder, tmp_path):
    kept, out = tmp_path / "kept.jsonl", tmp_path / "captions.jsonl"
    other, *more = (
        {"image": image, "caption": caption, "captions": []}
        for image, caption in (("elsewhere.jpg", "kept"), ("a.jpg", "1"), ("a.jpg", "2"))
    )
    lines = [other, *more]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept.chmod(0o600)
    out.symlink_to(kept)
    caption_folder(Asked(), folder, out, {})
    assert [row["image"] for row in rows_of(out)] == [*NAMES, "elsewhere.jpg"]
    assert rows_of(out)[-1] == other
    assert out.is_symlink() and kept.stat().st_mode & 0o777 == 0o600


# --- what goes wrong


def test_refused_photos_are_reported_and_the_rest_captioned(folder, tmp_path, capsys):
    def picky(photo: bytes, **options: object) -> dict:
        if photo.startswith(b"\x89PNG"):
            raise ServerError("InvalidImage", 400, "cut off")
        return Asked()(photo, **options)

    out = tmp_path / "captions.jsonl"
    [(name, error)] = caption_folder(picky, folder, out, {})
    assert (name, error.kind) == ("deeper/b.PNG", "InvalidImage")
    assert len(rows_of(out)) == 2
    assert "deeper/b.PNG: InvalidImage" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [True, False])
def test_a_refused_photo_keeps_no_caption_of_another_content(folder, tmp_path, changed):
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    if changed:
        change_photo(folder, {})

    def refuse(photo: bytes, **_: object) -> dict:
        raise ServerError("InternalError", 500, "no worker")

    refused = caption_folder(refuse, folder, out, {})
    assert [name for name, _ in refused] == (["deeper/b.PNG"] if changed else []) + [
        name for name in NAMES if not (changed and name == "deeper/b.PNG")
    ]
    # A caption of the same photo by what was served before is still one of that photo.
    assert [row["image"] for row in rows_of(out)] == [
        name for name in NAMES if not (changed and name == "deeper/b.PNG")
    ]


def test_a_photo_that_cannot_be_read_is_reported_and_the_rest_captioned(
    folder, tmp_path, capsys, monkeypatch
):
    """A photo without permission ended the whole folder; so did a name that is no UTF-8."""
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    read = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "a.jpg":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    strange = folder / os.fsdecode(b"\xff.jpg")
    strange.write_bytes(b"\xff\xd8\xff")
    refused = dict(caption_folder(Asked(), folder, out, {}))
    assert refused.keys() == {"a.jpg", strange.name}
    assert [row["image"] for row in rows_of(out)] == NAMES  # a.jpg may be what it was
    said = capsys.readouterr().err
    assert "a.jpg: not readable (Permission denied)" in said and "not UTF-8" in said


def test_a_wrong_option_ends_the_folder_at_once(folder, tmp_path):
    def refuse(photo: bytes, **_: object) -> dict:
        raise ServerError("InvalidParameter", 400, "num_beams")

    with pytest.raises(ServerError, match="num_beams"):
        caption_folder(refuse, folder, tmp_path / "captions.jsonl", {})


def test_a_server_without_the_model_or_a_worker_ends_the_folder(folder, tmp_path, monkeypatch):
    """All photos were waited for, and listed as photos to repair."""
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    before = out.read_bytes()
    change_photo(folder, {})
    monkeypatch.setattr("handler.client.folder.MOST_UNSERVED", 2)
    for error in (
        ServerError("ModelNotFoundException", 404, "Model not found: captioner"),
        ServerError("ServiceUnavailableException", 503, "no worker"),
    ):

        def refuse(photo: bytes, error=error, **_: object) -> dict:
            raise error

        with pytest.raises(ServerError, match=error.kind):
            caption_folder(refuse, folder, out, {"num_beams": 2})
        assert out.read_bytes() == before


ROW = b'{"image": "a.jpg", "caption": "x", "captions": []}'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (ROW + b"\nmy notes\nand half", 2),
        (b"a thesis whose last line has no end", 1),
        (b"GIF89a of a photo, which need not hold a line feed", 1),
        (ROW + b"\nmy notes", 2),
        (b'"image"\n', 1),
        (b"[" * 100_000 + b"\n", 1),
    ],
)
def test_another_file_is_not_overwritten(tmp_path, content, line):
    """A file without a line feed was taken for a row that a killed run left half, and was cut to
    nothing."""
    out = tmp_path / "notes.jsonl"
    out.write_bytes(content)
    with pytest.raises(UserError, match=rf"notes.jsonl: line {line} has no field"):
        CaptionFile(out)
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "row",
    [
        '{"image": "a.jpg", "captions": ["written by hand", "for training"]}',
        '{"image": "a.jpg", "caption": "written by hand"}',
        '{"image": "a.jpg"}',
    ],
)
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("name", ["a.jpg", "images/a.jpg"])
def test_captions_of_somebody_else_are_not_replaced(folder, tmp_path, row, end, name):
    """A file of captions by hand, which trains a captioner, became one of generated captions, and
    kept one caption of five where its names begin with a folder."""
    out = tmp_path / "captions.jsonl"
    row = row.replace("a.jpg", name)
    out.write_text(f"{row}\n{row}{end}")
    asked = Asked()
    said = f"captions.jsonl: the caption of '{name}' was not written"
    with pytest.raises(UserError, match=said):
        caption_folder(asked, folder, out, {})
    assert out.read_text() == f"{row}\n{row}{end}" and asked.photos == []


@pytest.mark.parametrize("size", [*range(len(ROW)), len(ROW)])
def test_half_a_row_is_cut_and_a_whole_one_is_kept(tmp_path, size):
    """Wherever the run was killed, and where an editor took the last line feed."""
    out = tmp_path / "captions.jsonl"
    out.write_bytes(ROW + b"\n" + ROW.replace(b"a.jpg", b"b.jpg")[:size])
    with CaptionFile(out) as file:
        assert list(file.rows) == ["a.jpg", "b.jpg"][: 2 if size == len(ROW) else 1]
        file.append({"image": "c.jpg", "captions": []})
    assert [row["image"] for row in rows_of(out)] == [*file.rows]


def test_a_device_or_a_pipe_is_no_file_of_captions(folder, tmp_path):
    """A traceback, or a wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=f"{out}: this is a pipe or a device"):
            caption_folder(Asked(), folder, out, {})


@contextmanager
def room(size: int):
    """A disk that is full once a file has this size: the system writes what fits, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_rows(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.unlink()
    with room(len(lines[0]) + 50), pytest.raises(UserError, match=r"captions.jsonl: .* make room"):
        caption_folder(Asked(), folder, out, {})
    assert out.read_bytes() == lines[0]
    caption_folder(Asked(), folder, out, {})
    assert out.read_bytes() == whole


def test_a_full_disk_leaves_the_file_when_it_is_compacted(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    lines = out.read_bytes().splitlines(keepends=True)
    twice = b"".join(lines + lines)
    out.write_bytes(twice)
    with room(len(twice) // 4), pytest.raises(OSError) as caught:
        caption_folder(Asked(), folder, out, {})
    assert caught.value.filename == str(out)
    assert out.read_bytes() == twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl", "photos"]


def test_answers_come_in_order_and_few_at_a_time():
    running, most, lock = 0, 0, threading.Lock()
    release = threading.Event()

    def call(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if item == 0:
            release.wait(5)
        elif item == folder_module.IN_FLIGHT:
            release.set()
        with lock:
            running -= 1
        return item

    assert list(in_order(call, list(range(40)))) == list(range(40))
    assert 1 < most <= folder_module.IN_FLIGHT


# --- alternative texts


def test_captions_become_alternative_texts(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.png", "c.gif", "d.webp"):
        Image.new("RGB", (9, 7), "red").save(photos / name)
    outside = tmp_path / "outside.jpg"
    Image.new("RGB", (9, 7)).save(outside)
    out = tmp_path / "captions.jsonl"
    names = ["a.jpg", "b.png", "c.gif", "d.webp", "gone.jpg", "../outside.jpg"]
    out.write_text("".join(json.dumps({"image": n, "caption": f"is {n}"}) + "\n" for n in names))
    before = outside.read_bytes()
    [(name, error)] = write_alt_texts(photos, out)
    assert name == "c.gif" and "JPEG, PNG and WebP" in str(error)
    for name in ("a.jpg", "b.png", "d.webp"):
        assert f"is {name}</rdf:li>".encode() in (photos / name).read_bytes()
    assert outside.read_bytes() == before
    assert "written into 3 of 4 photos" in capsys.readouterr().out
    write_alt_texts(photos, out)
    assert "written into 0 of 4 photos" in capsys.readouterr().out


def test_a_photo_with_its_alternative_text_has_not_changed(folder, tmp_path):
    """It would be captioned again by every later run."""
    out = tmp_path / "captions.jsonl"
    caption_folder(Asked(), folder, out, {})
    captions = [row["caption"] for row in rows_of(out)]
    assert write_alt_texts(folder, out) == []
    asked = Asked()
    caption_folder(asked, folder, out, {})
    assert len(asked.photos) == 1
    rows = rows_of(out)
    assert [row["caption"] for row in rows] == captions
    for row in rows:
        content = (folder / row["image"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()


def test_captions_that_no_packet_takes_are_said(tmp_path, capsys):
    """An empty caption became an empty text, control characters a packet that is no XML."""
    photos = tmp_path / "photos"
    photos.mkdir()
    captions = {"a.jpg": "", "b.png": "\x1b\x00 ", "c.webp": "a \x07dog\x1b", "d.jpg": None}
    for name in captions:
        Image.new("RGB", (9, 7), "red").save(photos / name)
    before = {name: (photos / name).read_bytes() for name in captions}
    out = tmp_path / "captions.jsonl"
    out.write_text(
        "".join(json.dumps({"image": n, "caption": c}) + "\n" for n, c in captions.items())
    )
    refused = dict(write_alt_texts(photos, out))
    assert refused.keys() == {"a.jpg", "b.png", "d.jpg"}
    for name in refused:
        assert (photos / name).read_bytes() == before[name]
    assert b">a dog</rdf:li>" in (photos / "c.webp").read_bytes()
    said = capsys.readouterr().err
    assert said.count("its caption is empty") == 3
    assert "c.webp: characters that XML forbids are left out" in said
