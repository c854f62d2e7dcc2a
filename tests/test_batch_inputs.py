"""handler/batch: sources and outputs as they are found: names that are not UTF-8, links, parts of a
list that are missing, captions inside the source, and what a power cut leaves."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_jobs import add, caption_all, rows_of, write_folder, write_tars
from photos import encoded, smooth

from handler.batch import __main__ as command
from handler.batch import source
from handler.batch.output import Output
from handler.batch.pool import connected
from handler.batch.record import describe, open_run
from handler.batch.shard import (
    Job,
    Worker,
    failed_name,
    finish,
    give_up,
    part_name,
    part_summary,
)
from handler.batch.source import WHOLE, Photo, Shard, find, needs_network, read
from handler.batch.summary import totals
from handler.errors import UserError, run_main

JPEG = encoded(smooth(40, 30, 0), "JPEG")


def test_names_that_are_not_utf8_are_rows(tmp_path, tiny_export):
    """One such name ended every start of the job."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_folder(folder, {os.fsdecode(b"\xe9t\xe9.jpg"): JPEG, "a.jpg": JPEG})
    caption_all(tiny_export, str(folder), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert {row["id"] for row in rows} == {"sub/a.jpg", "sub/\\udce9t\\udce9.jpg"}
    assert all(row["caption"] for row in rows)
    assert {row["shard"] for row in rows} == {f"{tmp_path}/caf\\udce9#0"}
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "été.jpg", JPEG)
    caption_all(tiny_export, str(folder / "x.tar"), tmp_path / "tar")
    [row] = rows_of(tmp_path / "tar")
    assert row["id"] == "\\udce9t\\udce9.jpg" and row["caption"]


def test_links_in_a_tar_are_rows_with_an_error(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", JPEG)
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            tar.addfile(link)
    first, *links = read(Shard(str(path), "tar", str(path)))
    assert first == Photo("a.jpg", JPEG)
    assert [link.id for link in links] == ["b.jpg", "c.jpg"]
    for link in links:
        assert "link to a.jpg" in str(link.content) and "--dereference" in str(link.content)


def test_a_linked_folder_is_read_once(tmp_path):
    write_folder(tmp_path / "a", {"1.jpg": JPEG})
    write_folder(tmp_path / "elsewhere", {"2.jpg": JPEG})
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/sub/up").symlink_to(tmp_path / "a")
    assert find(str(tmp_path / "a"))[2] == ["link/sub/2.jpg", "sub/1.jpg"]


def test_the_attributes_of_macos_are_no_photos(tmp_path):
    names = {"1.jpg": JPEG, "._1.jpg": b"\0\5\26\7 attributes"}
    write_folder(tmp_path / "a", names)
    assert find(str(tmp_path / "a"))[2] == ["sub/1.jpg"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "a", ".")
    assert [photo.id for photo in read(Shard(str(path), "tar", str(path)))] == ["./sub/1.jpg"]


def test_each_part_of_a_list_must_exist_at_the_first_start(tmp_path, tiny_export):
    write_folder(tmp_path / "a", {"1.jpg": JPEG})
    where = f"{tmp_path}/a::{tmp_path}/b"
    with pytest.raises(UserError, match=f"{tmp_path}/b: no photos"):
        find(where)
    write_folder(tmp_path / "b", {"2.jpg": JPEG})
    caption_all(tiny_export, where, tmp_path / "out")
    (tmp_path / "b/sub/2.jpg").unlink()
    assert (
        len(caption_all(tiny_export, where, tmp_path / "out")) == 1
    )  # goes on with what is recorded


def test_names_that_look_like_patterns_and_chains(tmp_path):
    folder = tmp_path / "trip [2020]"
    write_folder(folder, {"a::b.jpg": JPEG, "c.jfif": JPEG})
    shards, root, found = find(str(folder))
    assert (shards, root, found) == ([], str(folder), ["sub/a::b.jpg", "sub/c.jfif"])
    photos = list(read(source.cut(root, found)[0]))
    assert [photo.fetch() for photo in photos] == [JPEG, JPEG]
    for chain in ("zip://*.jpg::/data/z.zip", "simplecache::https://host/photos"):
        with pytest.raises(UserError, match="unpack the photos"):
            find(chain)


def test_local_photos_and_urls_are_not_mixed(tmp_path):
    write_folder(tmp_path / "a", {"1.jpg": JPEG})
    Output("memory://mixed").write("2.jpg", JPEG)
    with pytest.raises(UserError, match="two folders"):
        find(f"{tmp_path}/a::memory://mixed")


@pytest.mark.parametrize("inside", ["captions", "sub/deep/captions"])
def test_captions_inside_the_source_do_not_belong_to_it(inside, tmp_path, tiny_export):
    """The second start refused: photos and Parquet files."""
    write_folder(tmp_path / "in", {"1.jpg": JPEG})
    for _ in range(2):
        shards = caption_all(tiny_export, str(tmp_path / "in"), tmp_path / "in" / inside)
        assert [one.photos for one in shards] == [("sub/1.jpg",)]
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert find(str(tmp_path / "link"), str(tmp_path / "in" / inside))[2] == ["sub/1.jpg"]


def write_groups(path: Path, count: int) -> None:
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("image", pa.binary())])) as writer:
        for number in range(count):
            table = pa.table({"id": [f"{number}.jpg"], "image": [JPEG]}, writer.schema)
            writer.write_table(table)


def test_a_parquet_file_that_could_not_be_cut_is_captioned_whole(
    tmp_path, tiny_export, monkeypatch
):
    """Only its first row group was captioned, and the job ended with status 0."""
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    write_groups(path, 3)
    with monkeypatch.context() as patch:

        def busy(_: object) -> None:
            raise OSError("503 busy")

        patch.setattr(source.pq, "ParquetFile", busy)
        [whole] = caption_all(tiny_export, str(path), out)
    assert whole.row_group == WHOLE and (out / failed_name(whole)).exists()
    assert caption_all(tiny_export, str(path), out) == [whole]
    assert [row["id"] for row in rows_of(out)] == ["0.jpg", "1.jpg", "2.jpg"]
    output = Output(str(out))
    shards, told = open_run(output, describe(tiny_export, {}, str(path)), False)
    assert shards == [whole] and not told
    assert not (out / failed_name(whole)).exists()


def test_a_file_cut_into_groups_stays_so_while_it_cannot_be_read(tmp_path, tiny_export):
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    write_groups(path, 2)
    shards = caption_all(tiny_export, str(path), out)
    path.write_bytes(b"damaged")
    again, told = open_run(Output(str(out)), describe(tiny_export, {}, str(path)), True)
    assert again == shards and len(shards) == 2 and not told


def test_an_empty_first_file_does_not_hide_urls(tmp_path):
    """The job then ran without a network, and every photo became a row with an error."""
    kinds = {
        "string": (pa.string(), "https://host/1.jpg"),
        "struct": (
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            {"bytes": None, "path": "https://host/1.jpg"},
        ),
    }
    for kind, (column, value) in kinds.items():
        folder = tmp_path / kind
        folder.mkdir()
        schema = pa.schema([("image", column)])
        pq.write_table(pa.table({"image": []}, schema), folder / "0.parquet")
        write_groups(folder / "1.parquet", 1)
        assert not needs_network(str(folder))
        pq.write_table(pa.table({"image": [value]}, schema), folder / "2.parquet")
        assert needs_network(str(folder))


def test_a_url_in_a_job_without_a_network_fails_its_shard(tmp_path, tiny_export):
    pq.write_table(pa.table({"image": ["https://host/1.jpg"]}), tmp_path / "a.parquet")
    job = Job(str(tiny_export), {}, str(tmp_path / "out"), offline=True)
    summary = Worker(job).caption(find(str(tmp_path / "a.parquet"))[0][0])
    assert "this job has no network" in summary["failed"] and "--shards" in summary["failed"]


def test_a_failed_shard_with_a_part_is_not_failed(tmp_path):
    """A job may be killed between the two files."""
    output, shard = Output(str(tmp_path)), Shard("x.tar", "tar", "x.tar")
    finish(output, shard, [{"id": "a", "caption": "b", "captions": None, "error": None}])
    give_up(output, shard, "broken")
    assert totals(output, [shard], {})["shards_failed"] == 0
    (tmp_path / part_name(shard)).write_bytes(b"")  # what a power cut leaves is no part
    assert part_name(shard) not in output.names()
    assert totals(output, [shard], {}) == {
        "photos": 0,
        "captioned": 0,
        "errors": {},
        "shards": 1,
        "shards_done": 0,
        "shards_failed": 1,
    }


@pytest.mark.parametrize("content", ["cut", "saved again"])
def test_a_part_that_was_changed_is_named(tmp_path, content):
    """Every later start ended in a traceback, though all shards were done."""
    output, shard = Output(str(tmp_path)), Shard("x.tar", "tar", "x.tar")
    finish(output, shard, [{"id": "a", "caption": "b", "captions": None, "error": None}])
    part = tmp_path / part_name(shard)
    if content == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        pq.write_table(pq.read_table(part).replace_schema_metadata(None), part)
    with pytest.raises(UserError, match=f"{part}: damaged, or written by another program"):
        totals(output, [shard], {})


def test_an_object_store_that_fails_is_named():
    output = Output("memory://store")

    class Failing:
        def __getattr__(self, name):
            if name == "invalidate_cache":
                return lambda: None
            return self.fail

        def fail(self, *_, **__):
            raise RuntimeError("the store is away")

    output.system = Failing()
    calls = {
        "written": (lambda: output.write("a", b""), lambda: output.create("a", b"")),
        "read": (lambda: output.read("a"), lambda: output.open("a"), output.names),
        "removed": (lambda: output.remove("a"),),
    }
    for what, attempts in calls.items():
        for attempt in attempts:
            said = rf"memory://store/a?: cannot be {what} \(the store is away\)"
            with pytest.raises(UserError, match=said):
                attempt()
    with pytest.raises(UserError, match="the store is away"):  # and not that the part is damaged
        part_summary(output, Shard("x.tar", "tar", "x.tar"))


def test_a_device_that_failed_ends_its_process(tmp_path, tiny_export):
    """Every later photo would become a row with an error, in a part that counts as done."""
    write_tars(tmp_path / "in", {"1.jpg": JPEG, "2.jpg": JPEG})
    code = (
        "import sys, torch\n"
        "from handler.batch.shard import Job, Worker\n"
        "from handler.batch.source import find\n"
        "worker = Worker(Job(*sys.argv[1:2], {}, sys.argv[2]))\n"
        "def fail(*_): raise torch.AcceleratorError('an illegal memory access')\n"
        "worker.captioner.caption_tensors = fail\n"
        "worker.caption(find(sys.argv[3])[0][0])\n"
    )
    given = [str(tiny_export), str(tmp_path / "out"), str(tmp_path / "in")]
    ended = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert ended.returncode == 70 and "the device failed: an illegal memory access" in ended.stderr
    assert not rows_of(tmp_path / "out")


def status_and_line(monkeypatch, capsys, *given: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["handler.batch", *given])
    with pytest.raises(SystemExit) as ended:
        run_main(command.main)
    return int(ended.value.code or 0), capsys.readouterr().err


def test_what_cannot_start_is_one_line(tmp_path, tiny_export, monkeypatch, capsys):
    where = write_folder(tmp_path / "in", {"1.jpg": JPEG})
    (tmp_path / "file").write_text("words")
    usual = {"--source": where, "--out": str(tmp_path / "out"), "--export": str(tiny_export)}
    monkeypatch.setattr(command, "secure", lambda *_: None)
    for changed, told in (
        ({"--out": "foo://x"}, "foo://x: cannot be written (Protocol not known"),
        ({"--out": str(tmp_path / "file")}, "file: "),
        ({"--out": ""}, "--out is empty"),
        ({"--source": ""}, "--source is empty"),
        ({"--source": "x-{003..001}.tar"}, "the range {003..001} is empty"),
        ({"--source": "typo.tar"}, "typo.tar: does not exist; correct --source"),
        ({"--source": f"{where}/sub/1.jpg::./typo.jpg"}, "typo.jpg: does not exist; correct"),
        ({"--gpus": "4", "--workers": "3"}, "--workers 3 cannot use --gpus 4"),
    ):
        given = [word for pair in (usual | changed).items() for word in pair]
        status, line = status_and_line(monkeypatch, capsys, *given)
        assert status == 2 and told in line and line.count("\n") == 1, line
        assert not (tmp_path / "out/shards.json").exists()  # the right source may still be given
    told = "--address nowhere: no Ray cluster answers"
    with pytest.raises(UserError, match=told), connected("nowhere", 1, 0):
        pass
