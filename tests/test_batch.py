"""handler/batch: shards of every kind of source, exactly one row a photo however the job is killed,
and the pool that hands them out."""

import functools
import io
import json
import re
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_jobs import (
    BROKEN,
    add,
    caption_all,
    deadly,
    needs_namespace,
    rows_of,
    start_batch,
    write_folder,
    write_parquet,
    write_paths,
    write_tars,
)
from photos import encoded, smooth

from handler.batch import __main__ as command
from handler.batch import namespace, process, shard, source
from handler.batch.output import Output
from handler.batch.pool import Pool
from handler.batch.process import WorkerDied, caption_singly
from handler.batch.record import describe, open_run
from handler.batch.shard import Job, Worker, ahead, failed_name, part_name
from handler.batch.source import Photo, Shard, find, needs_network, read
from handler.captioner import Captioner
from handler.errors import UserError
from handler.files import locked


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


def test_a_photo_that_kills_its_worker_is_a_row(tmp_path, tiny_export, photos, expected):
    few = {name: photos[name] for name in ("006.jpg", "008.jpg")}
    where = write_folder(tmp_path / "in", few)
    with deadly(tmp_path / "in/sub/007.jpg") as dead:
        shards, _ = open_run(Output(str(tmp_path / "out")), describe(tiny_export, {}, where), False)
        summary = caption_singly(Job(str(tiny_export), {}, str(tmp_path / "out")), shards[0])
    assert len(dead) == 1
    assert summary["rows"] == 3 and summary["errors"] == {"WorkerDied": 1}
    rows = {Path(row["id"]).name: row for row in rows_of(tmp_path / "out")}
    assert rows["007.jpg"]["error"]["type"] == "WorkerDied"
    assert "status -9" in rows["007.jpg"]["error"]["message"]
    assert {name: rows[name]["caption"] for name in few} == {name: expected[name] for name in few}


def test_a_shard_whose_reading_ends_the_process_is_given_up():
    """The driver itself once read it, and died with every start."""

    class Child:
        def stream(self, method, shard, start):
            yield from [["a", {"id": "a"}], []][start > 0]
            raise WorkerDied("its worker ended with status -11")

    rows = process._rows_singly(Child(), Shard("x.tar", "tar", "x.tar"))
    assert next(rows) == {"id": "a"}
    with pytest.raises(UserError, match="after photo 1: its worker ended with status -11"):
        next(rows)


def test_photos_are_prepared_ahead_in_order_and_no_further():
    started, gate = [], threading.Event()

    def prepare(photo: Photo) -> str:
        started.append(photo.id)
        gate.wait(10)
        return photo.id.upper()

    photos = [Photo(letter, b"") for letter in "abcdefghij"]
    ready = ahead(prepare, photos, threads=3, depth=4)
    threading.Timer(0.1, gate.set).start()
    assert next(ready) == ("a", "A")
    time.sleep(0.1)
    assert sorted(started) == list("abcde")  # one is taken, four lie ready
    assert [name for name, _ in ready] == list("bcdefghij")


def test_what_reading_raises_comes_after_the_photos_before_it():
    def photos() -> Iterator[Photo]:
        yield Photo("a", b"")
        raise UserError("cut off")

    ready = ahead(lambda photo: photo.id, photos(), threads=1, depth=2)
    assert next(ready) == ("a", "a")
    with pytest.raises(UserError, match="cut off"):
        next(ready)
    left = ahead(lambda photo: photo.id, (Photo(str(n), b"") for n in range(99)), 1, 2)
    next(left)
    left.close()  # ends its threads, though photos are left


class Engine:
    """What the pool asks of Ray, one task after the other: `script(actor, method, shard)` says what
    comes of each: a value, an exception, or None for an actor that never finds a place."""

    class exceptions:
        class RayError(Exception): ...

        class RayTaskError(RayError): ...

    def __init__(self, script) -> None:
        self.script, self.actors, self.asked = script, 0, []

    def remote(self, **_: object):
        return lambda _: SimpleNamespace(remote=self._actor)

    def _actor(self, _: Job):
        self.actors += 1

        def method(name: str, number: int):
            return SimpleNamespace(
                remote=lambda *shard: (number, name, *shard)  # the task is its description
            )

        names = ("load", "caption", "caption_singly")
        return SimpleNamespace(**{name: method(name, self.actors) for name in names})

    def wait(self, tasks, timeout):
        ready = [task for task in tasks if self.script(*task) is not None][:1]
        return ready, [task for task in tasks if task not in ready]

    def get(self, task):
        self.asked.append(task)
        answer = self.script(*task)
        if isinstance(answer, Exception):
            raise answer
        return answer


DONE = {"rows": 1, "errors": {}}
SHARDS = [Shard(name, "tar", name) for name in ("a", "b", "c")]


def caption_with(script, tmp_path) -> tuple[Engine, dict[str, dict]]:
    engine = Engine(script)
    workers = Pool(engine, Job("export", {}, str(tmp_path)), workers=2, gpus=0)
    return engine, {shard.address: summary for shard, summary in workers.caption(SHARDS)}


def test_an_actor_that_never_finds_a_place_does_not_hold_the_job(tmp_path, capsys):
    """After a node was lost its actor has nowhere to go; the others did all the work, and the job
    waited for ever."""

    def script(actor: int, method: str, *shard: Shard):
        return None if actor == 2 else DONE

    _, summaries = caption_with(script, tmp_path)
    assert list(summaries) == ["a", "b", "c"]


def test_a_shard_whose_actor_died_twice_is_captioned_singly(tmp_path):
    deaths = iter([Engine.exceptions.RayError("gone")] * 2)

    def script(actor: int, method: str, *shard: Shard):
        dies = method == "caption" and shard[0].address == "b"
        return Engine.exceptions.RayError("gone") if dies else DONE

    engine, summaries = caption_with(script, tmp_path)
    assert set(summaries) == {"a", "b", "c"}
    methods = [method for _, method, *shard in engine.asked if shard and shard[0].address == "b"]
    assert methods == ["caption", "caption", "caption_singly"]
    assert engine.actors == 4
    assert len(list(deaths)) == 2


def test_a_shard_that_ends_every_actor_is_given_up_and_the_job_goes_on(tmp_path):
    def script(actor: int, method: str, *shard: Shard):
        dies = shard and shard[0].address == "b"
        return Engine.exceptions.RayError("gone") if dies else DONE

    _, summaries = caption_with(script, tmp_path)
    assert "10 times" in summaries["b"]["failed"] and summaries["c"] == DONE
    assert (tmp_path / failed_name(SHARDS[1])).exists()


def test_workers_that_die_at_their_start_end_the_job(tmp_path):
    with pytest.raises(UserError, match="export: workers died while they loaded it"):
        caption_with(lambda *_: Engine.exceptions.RayError("no memory"), tmp_path)


def test_jobs_of_an_array_share_one_cut(tmp_path, tiny_export, photos, monkeypatch):
    """All at once, on a file system and on an object store, which has no locks."""
    monkeypatch.setattr(source, "PHOTOS", 2)
    where = write_folder(tmp_path / "in", photos)
    run = describe(tiny_export, {}, where)
    for out in (str(tmp_path / "out"), f"memory://{tmp_path}"):
        with ThreadPoolExecutor(4) as jobs:
            started = [jobs.submit(open_run, Output(out), run, False) for _ in range(4)]
            cuts = [job.result()[0] for job in started]
        assert cuts[0] == cuts[1] == cuts[2] == cuts[3]
        shares = [command.share(cuts[0], f"{n}/4") for n in range(4)]
        assert sorted(sum(shares, []), key=str) == sorted(cuts[0], key=str)
        assert command.share(cuts[0], "4/4") == shares[0]
        other = run | {"precision": "int8"}
        with pytest.raises(UserError, match="precision"):
            open_run(Output(out), other, False)


def run_command(monkeypatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["handler.batch", *given])
    command.main()


def test_a_second_driver_and_a_part_that_is_none_are_refused(
    tmp_path, tiny_export, photos, monkeypatch, capsys
):
    where, out = write_folder(tmp_path / "in", photos), tmp_path / "out"
    given = ["--source", where, "--out", str(out), "--export", str(tiny_export)]
    monkeypatch.setattr(namespace, "is_alone", lambda: True)
    for wrong in ("3/2", "0/0", "1", "-1/2"):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, *given, f"--shards={wrong}")
        assert "give I/N" in capsys.readouterr().err
    thesis = tmp_path / "thesis.json"
    thesis.write_text('{"title": "of the user"}')
    for path in (thesis, tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="does not contain the figures of a batch"):
            run_command(monkeypatch, *given, f"--metrics={path}")
    assert thesis.read_text() == '{"title": "of the user"}' and not out.exists()
    with locked(out / "job"), pytest.raises(UserError, match="another process is writing it"):
        run_command(monkeypatch, *given)
    assert list(out.iterdir()) == []


def test_options_that_the_model_cannot_do_start_nothing(tmp_path, tiny_export, photos):
    where = write_folder(tmp_path / "in", photos)
    with pytest.raises(UserError, match="max_new_tokens"):
        describe(tiny_export, {"max_new_tokens": 1000}, where)


def test_open_ports_are_told(tmp_path, photos, monkeypatch, capsys):
    """A namespace is only for photos and captions that need no network."""
    where = write_folder(tmp_path / "in", photos)
    pq.write_table(pa.table({"image": ["https://host/1.jpg", "x.jpg"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(namespace, "is_alone", lambda: False)
    monkeypatch.setattr(namespace, "restart", lambda: print("restarted", file=sys.stderr))
    for is_possible, source_, out, told in (
        (True, where, "out", "restarted"),
        (False, where, "out", "this system allows no network namespace"),
        (True, "s3://bucket/photos", "out", "the photos need the network"),
        (True, where, "s3://bucket/captions", "the photos need the network"),
        (True, str(tmp_path / "a.parquet"), "out", "the photos need the network"),
    ):
        monkeypatch.setattr(namespace, "is_possible", lambda is_possible=is_possible: is_possible)
        given = ["--source", source_, "--out", out, "--export", "x"]
        monkeypatch.setattr(sys, "argv", ["handler.batch", *given])
        command.secure(command.parse(), source_)
        assert told in capsys.readouterr().err
    assert not needs_network(where)


def test_the_root_of_a_list_does_not_move_with_what_lies_there(tmp_path, photos):
    """Ids are relative to it: with another root, --extend would caption every photo again."""
    content = photos["000.jpg"]
    write_folder(tmp_path / "a/x", {"1.jpg": content})
    write_folder(tmp_path / "a/y", {"2.jpg": content})
    where = f"{tmp_path}/a/x::{tmp_path}/a/y"
    assert find(where)[1:] == (f"{tmp_path}/a", ["x/sub/1.jpg", "y/sub/2.jpg"])
    (tmp_path / "a/x/sub/1.jpg").unlink()
    assert find(where, first=False)[1:] == (f"{tmp_path}/a", ["y/sub/2.jpg"])


class RangeServer(SimpleHTTPRequestHandler):
    """A web server as photos lie on: folders as links, parts of files; `troubles` are the statuses
    of the next answers to GET."""

    troubles: list[int] = []

    def log_message(self, *_: object) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        if self.path.endswith(".jpg") and self.troubles:
            self.send_error(self.troubles.pop())
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(content[start:end])


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    handler = functools.partial(RangeServer, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("layout", ["folder", "tars", "bytes", "paths"])
def test_photos_come_from_a_web_server(
    layout, web, tmp_path, tiny_export, photos, expected, monkeypatch
):
    monkeypatch.setattr(source, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(RangeServer, "troubles", [503, 503])  # it comes with the third try
    where = LAYOUTS[layout](tmp_path / "in", photos).replace(str(tmp_path), web)
    if layout == "bytes":
        where += "/a.parquet"
    caption_all(tiny_export, where, tmp_path / "out")
    check_rows(rows_of(tmp_path / "out"), expected)


def test_a_photo_that_the_network_does_not_bring_is_a_row(
    web, tmp_path, tiny_export, photos, monkeypatch
):
    monkeypatch.setattr(source, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(RangeServer, "troubles", [503] * 9)
    write_folder(tmp_path / "in", {"000.jpg": photos["000.jpg"]})
    shards = [shard.Shard("x#0", "folder", f"{web}/in/sub", photos=("000.jpg",))]
    Worker(Job(str(tiny_export), {}, str(tmp_path / "out"))).caption(shards[0])
    [row] = rows_of(tmp_path / "out")
    assert (row["id"], row["error"]["type"]) == ("000.jpg", "MissingImage")


def test_a_source_that_the_network_does_not_bring_is_one_line(web, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(RangeServer, "troubles", [503] * 9)
    write_folder(tmp_path / "in", {"000.jpg": photos["000.jpg"]})
    with pytest.raises(UserError, match=r"/in/sub/000.jpg: .*503"):
        find(f"{web}/in/sub/000.jpg")


@needs_namespace
def test_an_actor_and_a_driver_killed_lose_and_double_nothing(
    tmp_path, tiny_export, photos, expected
):
    """The long forms, and a node killed, are in test_batch_slow.py."""
    where, out = write_parquet(tmp_path / "in", photos), tmp_path / "out"
    driver = start_batch(where, out, tiny_export, "--workers", "1")
    deadline = time.monotonic() + 200
    while not driver.actors() and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.actors()[0].kill()
    while not list(out.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    driver.check_all_ended()
    before = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
    assert before
    figures = tmp_path / "figures.json"
    driver = start_batch(where, out, tiny_export, "--workers", "1", "--metrics", str(figures))
    status, output = driver.wait()
    assert status == 1 and "warning" not in output
    driver.check_all_ended()
    assert {part: part.stat().st_mtime_ns for part in before} == before
    check_rows(rows_of(out), expected)
    told = json.loads(figures.read_text())
    assert told["photos"] == 22 and told["captioned"] == 20
    assert told["errors"] == {"InvalidImage": 1, "UnsupportedMediaType": 1}
