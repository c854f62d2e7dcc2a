"""handler/batch: shards of every kind of source, exactly one row a photo however the job is killed,
and the pool that hands them out."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, run_program
from photos import encoded, smooth

from handler.batch import namespace, shard, source
from handler.batch.output import Output
from handler.batch.process import caption_shards
from handler.batch.record import describe, open_run
from handler.batch.shard import Job, Worker, failed_name, part_name
from handler.batch.source import find, read
from handler.captioner import Captioner
from handler.errors import UserError

@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    found = {f"{n:03}.jpg": encoded(smooth(40, 30, n), "JPEG") for n in range(20)}
    return found | {name: content for name, (content, _) in BROKEN.items()}


@pytest.fixture(scope="module")
def expected(tiny_export, photos) -> dict[str, str]:
    captioner = Captioner.load(tiny_export)
    good = [name for name in photos if name not in BROKEN]
    captions = captioner.caption([photos[name] for name in good])
    return {name: found[0].text for name, found in zip(good, captions, strict=True)}


LAYOUTS = {
    "folder": write_folder,
    "tars": write_tars,
    "bytes": write_parquet,
    "structs": lambda folder, photos: write_parquet(folder, photos, True),
    "paths": write_paths,
}


def check_rows(rows: list[dict], expected: dict[str, str]) -> None:
    """One row a photo, captions as in process, each error by its type."""
    by_name = {Path(row["id"]).name: row for row in rows}
    assert len(rows) == len({row["id"] for row in rows}) == len(expected) + len(BROKEN)
    assert {name: by_name[name]["caption"] for name in expected} == expected
    for name, (_, kind) in BROKEN.items():
        assert by_name[name]["error"]["type"] == kind
        assert by_name[name]["caption"] is by_name[name]["captions"] is None
    for name in expected:
        best = by_name[name]["captions"][0]
        assert set(best) == {"caption", "score", "log_prob"}
        assert by_name[name]["error"] is None and best["caption"] == expected[name]


def caption_all(export: Path, where: str, out: Path, extend: bool = False) -> list[shard.Shard]:
    """What a driver does, in this process."""
    output = Output(str(out))
    shards, _ = open_run(output, describe(export, {}, where), extend)
    worker = Worker(Job(str(export), {}, str(out)))
    for one in shards:
        if part_name(one) not in output.names():
            worker.caption(one)
    return shards


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_one_row_a_photo(
    layout, tmp_path, tiny_export, photos, expected, monkeypatch
):
    monkeypatch.setattr(source, "PHOTOS", 8)
    where = LAYOUTS[layout](tmp_path / "in", photos)
    shards = caption_all(tiny_export, where, tmp_path / "out")
    assert len(shards) == (2 if layout == "tars" else 3)
    check_rows(rows_of(tmp_path / "out"), expected)


def test_a_glob_and_a_list_name_photos(tmp_path, photos):
    write_folder(tmp_path / "a", dict(list(photos.items())[:3]))
    write_folder(tmp_path / "b", dict(list(photos.items())[3:5]))
    assert find(f"{tmp_path}/a/**/*.jpg")[2] == ["sub/000.jpg", "sub/001.jpg", "sub/002.jpg"]
    _, root, both = find(f"{tmp_path}/a::{tmp_path}/b")
    assert (root, len(both), both[0]) == (str(tmp_path), 5, "a/sub/000.jpg")
    with pytest.raises(UserError, match="no photos"):
        find(str(tmp_path / "nowhere"))


def test_any_filesystem_is_a_source_and_an_output(tiny_export, photos, expected):
    """fsspec's own filesystem in memory stands for an object store: no rename, no lock."""
    memory = Output("memory://photos")
    for name, content in photos.items():
        memory.write(name, content)
    output = Output("memory://captions")
    shards, _ = open_run(output, describe(tiny_export, {}, "memory://photos"), False)
    Worker(Job(str(tiny_export), {}, "memory://captions")).caption(shards[0])
    with output.open(part_name(shards[0])) as file:
        check_rows(pq.read_table(file).to_pylist(), expected)


def test_another_model_options_or_source_is_refused(tmp_path, tiny_export, photos):
    where = write_folder(tmp_path / "in", photos)
    run = describe(tiny_export, {}, where)
    output = Output(str(tmp_path / "out"))
    open_run(output, run, False)
    for field, value in {
        "checkpoint": "sha256:other",
        "precision": "int8",
        "options": run["options"] | {"num_beams": 7},
        "source": "/elsewhere",
    }.items():
        with pytest.raises(UserError, match=field):
            open_run(output, run | {field: value}, False)
    open_run(output, run, False)


def test_a_folder_of_something_else_is_refused(tmp_path, tiny_export, photos):
    where = write_folder(tmp_path / "in", photos)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        open_run(Output(str(tmp_path / "out")), describe(tiny_export, {}, where), False)


def test_new_photos_are_told_and_captioned_on_demand_and_missing_ones_are_rows(
    tmp_path, tiny_export, photos
):
    """A cut made anew at every start would caption photos twice under another shard's hash."""
    where = write_folder(tmp_path / "in", dict(list(photos.items())[:4]))
    output, run = Output(str(tmp_path / "out")), describe(tiny_export, {}, where)
    before, told = open_run(output, run, False)
    assert not told
    write_folder(tmp_path / "in", {"0.jpg": photos["000.jpg"]})
    (tmp_path / "in/sub/001.jpg").unlink()
    same, told = open_run(output, run, False)
    assert same == before and "1 photos are new" in told[0] and "--extend" in told[0]
    caption_all(tiny_export, where, tmp_path / "out", extend=True)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(rows) == ["sub/0.jpg", *(f"sub/00{n}.jpg" for n in range(4))]
    assert rows["sub/001.jpg"]["error"]["type"] == "MissingImage"
    assert rows["sub/0.jpg"]["caption"]


def hostile_tars(photo: bytes) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "a.jpg", photo)
        second = tar.offset
        add(tar, "b.jpg", photo)
        end = tar.offset
    whole = buffer.getvalue()

    def header(content: bytes) -> bytes:
        head = bytearray(whole[second : second + 512])
        head[124:136] = content
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return whole[:second] + bytes(head) + whole[second + 512 :]

    return {
        "cut within a photo": whole[: second + 600],
        "cut within a header": whole[: second + 100],
        "cut between photos": whole[:second],
        "damaged header": whole[:second] + b"x" * 512 + whole[second + 512 :],
        "negative size": header(b"\xff" * 11 + b"\0"),
        "no end": whole[:end],
        "empty": b"",
        "no tar": b"words" * 1000,
    }


@pytest.mark.parametrize("name", hostile_tars(encoded(smooth(), "JPEG")))
def test_a_tar_that_is_not_whole_is_a_failed_shard(name, tmp_path, tiny_export, photos):
    """tarfile ends quietly at a damaged or missing header: the photos behind it were lost."""
    path = tmp_path / "x.tar"
    path.write_bytes(hostile_tars(photos["000.jpg"])[name])
    [one] = caption_all(tiny_export, str(path), tmp_path / "out")
    failed = json.loads((tmp_path / "out" / failed_name(one)).read_text())
    assert failed["shard"] == str(path) and str(path) in failed["error"]["message"]
    assert not rows_of(tmp_path / "out")
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", photos["000.jpg"])
    caption_all(tiny_export, str(path), tmp_path / "out")  # the next start tries it again
    assert len(rows_of(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / failed_name(one)).exists()


def test_a_name_twice_in_a_tar_is_two_rows(tmp_path, photos):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(3):
            add(tar, "a.jpg", photos["000.jpg"])
    ids = [photo.id for photo in read(find(str(path))[0][0])]
    assert ids == ["a.jpg", "a.jpg#2", "a.jpg#3"]


