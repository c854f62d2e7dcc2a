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

BROKEN = {
    "bad.jpg": (b"\xff\xd8\xff\xe0 no photo", "InvalidImage"),
    "text.png": (b"words", "UnsupportedMediaType"),
}


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


def write_folder(folder: Path, photos: dict[str, bytes]) -> str:
    for name, content in photos.items():
        path = folder / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_tars(folder: Path, photos: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    names = sorted(photos)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in names[number::2]:
                add(tar, name, photos[name])
                add(tar, f"{Path(name).stem}.json", b"{}")
    return f"{folder}/{{0..1}}.tar"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_parquet(folder: Path, photos: dict[str, bytes], structs: bool = False) -> str:
    folder.mkdir(parents=True)
    rows = [
        {"id": name, "image": {"bytes": content, "path": None} if structs else content}
        for name, content in photos.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=8)
    return str(folder)


def write_paths(folder: Path, photos: dict[str, bytes]) -> str:
    write_folder(folder, photos)
    rows = [{"image": f"sub/{name}"} for name in photos]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=8)
    return str(folder / "a.parquet")


LAYOUTS = {
    "folder": write_folder,
    "tars": write_tars,
    "bytes": write_parquet,
    "structs": lambda folder, photos: write_parquet(folder, photos, True),
    "paths": write_paths,
}


def rows_of(out: Path) -> list[dict]:
    parts = sorted(out.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


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


class FatalWorker(Worker):
    """Ends its process at one photo, as a decoder's crash would."""

    def _prepare(self, photo):
        if photo.id.endswith("007.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._prepare(photo)


@pytest.fixture
def fatal(monkeypatch, tmp_path):
    """Children are FatalWorkers: `sitecustomize` patches the class in every new interpreter."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "fatal.py").write_text(
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests')!r}]\n"
        "import handler.batch.child, test_batch\n"
        "handler.batch.child.Worker = test_batch.FatalWorker\n"
        "handler.batch.child.main()\n"
    )
    real = subprocess.Popen

    def start(command, **options):
        if "handler.batch.child" in command:
            command = [sys.executable, str(folder / "fatal.py"), command[-1]]
        return real(command, **options)

    monkeypatch.setattr("handler.batch.process.subprocess.Popen", start)


def test_a_photo_that_kills_its_worker_is_a_row(fatal, tmp_path, tiny_export, photos, expected):
    few = {name: photos[name] for name in ("006.jpg", "007.jpg", "008.jpg")}
    where = write_folder(tmp_path / "in", few)
    output = Output(str(tmp_path / "out"))
    shards, _ = open_run(output, describe(tiny_export, {}, where), False)
    [(_, summary)] = caption_shards(Job(str(tiny_export), {}, output.url), shards)
    assert summary["rows"] == 3 and summary["errors"] == {"WorkerDied": 1}
    rows = {Path(row["id"]).name: row for row in rows_of(tmp_path / "out")}
    assert rows["007.jpg"]["error"]["type"] == "WorkerDied"
    assert [rows[n]["caption"] for n in ("006.jpg", "008.jpg")] == [
        expected[n] for n in ("006.jpg", "008.jpg")
    ]


def run_batch(where: str, out: Path, export: Path, *more: str, cwd: Path):
    given = ("--source", where, "--out", str(out), "--export", str(export), *more)
    return run_program("handler.batch", *given, cwd=cwd)


needs_namespace = pytest.mark.skipif(
    not (namespace.is_alone() or namespace.is_possible()),
    reason="Ray would open its ports on every interface",
)


def start_batch(where: str, out: Path, export: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "handler.batch", "--source", where, "--out", str(out)]
    command += ["--export", str(export), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=out.parent, env=environment)


def actors(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes of its actors, by the title that Ray gives them."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "ray::Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


@needs_namespace
def test_the_command_captions_with_ray(tmp_path, tiny_export, photos, expected):
    where = write_folder(tmp_path / "in", photos)
    done = run_batch(
        where, tmp_path / "out", tiny_export, "--workers", "1", "--metrics", "figures.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "warning" not in done.stderr
    check_rows(rows_of(tmp_path / "out"), expected)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["photos"] == 22 and figures["captioned"] == 20
    assert figures["errors"] == {"InvalidImage": 1, "UnsupportedMediaType": 1}


@needs_namespace
def test_a_killed_driver_loses_and_doubles_nothing(tmp_path, tiny_export, photos, expected):
    where = write_parquet(tmp_path / "in", photos)
    out = tmp_path / "out"
    driver = start_batch(where, out, tiny_export)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("part-*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    before = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
    assert before
    done = run_batch(where, out, tiny_export, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert {part: part.stat().st_mtime_ns for part in before} == before
    check_rows(rows_of(out), expected)


@needs_namespace
def test_killed_actors_lose_and_double_nothing(tmp_path, tiny_export, photos, expected):
    where, out = write_parquet(tmp_path / "in", photos), tmp_path / "out"
    driver = start_batch(where, out, tiny_export)
    killed: set[int] = set()
    try:
        deadline = time.monotonic() + 200
        while driver.poll() is None and time.monotonic() < deadline:
            for actor in actors(driver):
                if len(killed) < 2 and actor.pid not in killed:
                    killed.add(actor.pid)
                    actor.kill()
            time.sleep(0.005)
        assert driver.returncode == 1
    finally:
        driver.kill()
        driver.wait()
    assert len(killed) == 2
    check_rows(rows_of(out), expected)
