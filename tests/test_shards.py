"""Shards: written, read by others and from others, streamed, damaged, trained from."""

import io
import itertools
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import TINY, run_program
from PIL import Image
from shard_server import ShardServer, serving
from tiny_training import config_of, train_killed

import training.data.photos
import training.shards
from handler.errors import UserError, run_command
from training import prepare
from training.data import ranged
from training.data.manifest import Manifest, Row, read_manifest, write_manifest
from training.data.photos import epoch_order, read_bytes, read_photo, shard_numbers, stamp
from training.data.shards import find_shards
from training.loop.distributed import Processes
from training.loop.train import train
from training.shards import write_shards

SHARD_BYTES = 10_000  # five photos of the tiny data


@pytest.fixture(scope="module")
def shards(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data in shards."""
    out = tmp_path_factory.mktemp("shards") / "tiny"
    write_shards(read_manifest(tiny_data), out, SHARD_BYTES)
    return out


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(ranged, "PAUSE_S", 0.0)
    with serving(shards) as running:
        yield running


def behind(server: ShardServer, shards: Path) -> Manifest:
    """The dataset, its shards on the server."""
    return Manifest("tiny", read_manifest(shards).rows, server.url, shards)


def prepared(monkeypatch: pytest.MonkeyPatch, source: object, out: Path, *more: str) -> int:
    """The exit status of `training.prepare --data shards`."""
    arguments = ["prepare", "--data", "shards", "--source", str(source), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        run_command(prepare.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tarred(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def photo(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(text: str, **fields: object) -> bytes:
    return json.dumps({"caption": text, **fields}).encode()


def test_shards_hold_the_dataset_byte_for_byte(tiny_data: Path, shards: Path, tmp_path: Path):
    plain, packed = read_manifest(tiny_data), read_manifest(shards)
    assert packed.image_root == shards
    for before, after in zip(plain.rows, packed.rows, strict=True):
        assert (before.id, before.captions, before.split) == (after.id, after.captions, after.split)
        assert read_bytes(plain, before) == read_bytes(packed, after)
    files = sorted(path.name for path in shards.glob("*.tar"))
    assert files == [f"tiny-train-00000{n}.tar" for n in range(4)] + ["tiny-val-000000.tar"]
    with tarfile.open(shards / "tiny-train-000001.tar") as tar:
        first = tar.getnames()[:2]
        assert first == ["000000005.png", "000000005.json"]
        record = json.loads(tar.extractfile(first[1]).read())
        assert record["captions"] == list(plain.rows[5].captions) and record["split"] == "train"
    write_shards(packed, tmp_path / "again", SHARD_BYTES)  # from shards to shards, too
    for name in [*files, "captions.jsonl", "dataset.json"]:
        assert (shards / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_program_writes_a_new_folder_or_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["shards", "--data", str(tiny_data), "--out", "deep/er", "--shard-mb"]

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [*arguments])
        training.shards.main()
        return capsys.readouterr().out

    assert said(*command, "1") == "deep/er: 16 train, 4 val in 2 shards\n"
    assert said(*command, "0.01") == "deep/er: 16 train, 4 val in 4 shards\n"  # its own, again
    for foreign in ("thesis.txt", "backup.tar"):
        Path("deep/er", foreign).write_text("x")
        with pytest.raises(UserError, match=f"'{foreign}' is not part of a folder of shards"):
            said(*command, "1")
        Path("deep/er", foreign).unlink()
    with pytest.raises(UserError, match="--shard-mb"):
        said(*command, "0")
    shutil.copytree(tiny_data, "broken")
    Path("broken/images/7.png").unlink()
    with pytest.raises(UserError, match=r"7\.png"):
        write_shards(read_manifest(Path("broken")), Path("out"), 10**6)
    Path("broken/images/7.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"7\.png: no photo"):
        write_shards(read_manifest(Path("broken")), Path("out"), 10**6)
    Path("file").touch()
    with pytest.raises(UserError, match="file/out: .*choose a folder that can be written"):
        write_shards(read_manifest(tiny_data), Path("file/out"), 10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "deep", "file"]


def test_the_package_webdataset_reads_what_we_write(tiny_data: Path, shards: Path):
    urls = [str(path) for path in sorted(shards.glob("tiny-train-*.tar"))]
    found = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "json")
    )
    manifest = read_manifest(tiny_data)
    for row, (image, record) in zip(manifest.split("train"), found, strict=True):
        assert image.tobytes() == read_photo(manifest, row).tobytes()
        assert record == {"id": row.id, "captions": list(row.captions), "split": "train"}


def test_we_read_what_the_package_webdataset_writes(tmp_path: Path, monkeypatch):
    (tmp_path / "raw").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "raw/x-%04d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write(
                {"__key__": f"{number:05}", "jpg": photo(), "json": {"caption": f"no {number}"}}
            )
    assert prepared(monkeypatch, tmp_path / "raw", tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out")
    assert [row.captions for row in manifest.rows] == [(f"no {n}",) for n in range(7)]
    assert all(read_bytes(manifest, row) == photo() for row in manifest.rows)


def test_shards_become_the_manifest_that_was_written_with_them(
    shards: Path, server: ShardServer, tmp_path: Path, monkeypatch, capsys
):
    pattern = f"{server.url}/tiny-train-{{000000..000003}}.tar::{server.url}/tiny-val-000000.tar"
    written = (shards / "captions.jsonl").read_bytes()
    for source, root in ((shards, shards), (pattern, server.url)):
        server.troubles = [503, "cut", "shifted"]
        out = tmp_path / str(len(str(source)))
        assert prepared(monkeypatch, source, out) == 0
        assert (out / "captions.jsonl").read_bytes() == written
        assert read_manifest(out).image_root == root
        assert "16 train, 4 val; 40 captions (splits by the captions' records)" in (
            capsys.readouterr().out
        )
    assert 0 < server.asked < 40  # blocks, not members


def test_shards_of_others(tmp_path: Path, monkeypatch, capsys):
    source, out = tmp_path / "raw", tmp_path / "out"
    members = {
        "./a.jpg": photo(), "./a.json": caption("A  dog ."),
        "deep/b.txt": b"A cat .", "deep/b.jpg": photo("blue"), "deep/b.cls": b"7",
        "c.JPG": photo(), "c.json": json.dumps({"captions": ["One .", "Two ."]}).encode(),
    }  # fmt: skip
    tarred(source / "cc-train-0.tar", members, tarfile.GNU_FORMAT)
    tarred(source / "more/cc-validation-0.tar", {"a.jpg": photo(), "a.txt": b"Third ."})
    assert prepared(monkeypatch, source, out) == 0
    manifest = read_manifest(out)
    assert {row.id: (row.captions, row.split) for row in manifest.rows} == {
        "cc-train-0.tar/./a": (("A dog .",), "train"),
        "cc-train-0.tar/deep/b": (("A cat .",), "train"),
        "cc-train-0.tar/c": (("One .", "Two ."), "train"),
        "more/cc-validation-0.tar/a": (("Third .",), "val"),
    }
    assert [read_bytes(manifest, row) for row in manifest.rows] == [
        photo(), photo("blue"), photo(), photo(),
    ]  # fmt: skip
    assert "by the shards' names" in capsys.readouterr().out
    (source / "more/cc-validation-0.tar").rename(source / "cc-1.tar")
    assert prepared(monkeypatch, source, out) == 0
    assert {row.split for row in read_manifest(out).rows} >= {"train", "val"}
    assert "by a hash of the id" in capsys.readouterr().out


BAD: list[tuple[dict[str, bytes], str]] = [
    ({"b.jpg": photo()[:200], "b.json": caption("Cut .")}, "x.tar/b: "),
    ({"b.jpg": b"text", "b.json": caption("None .")}, "x.tar/b: "),
    ({"b.json": caption("No photo .")}, "x.tar/b: has no photo"),
    ({"b.jpg": photo()}, "x.tar/b: photo has no captions"),
    ({"b.jpg": photo(), "b.json": b"{"}, "x.tar/b: .json: not JSON at column 2"),
    ({"b.jpg": photo(), "b.json": b"\xff"}, "x.tar/b: .json is not UTF-8"),
    ({"b.jpg": photo(), "b.json": b'{"url": "x"}'}, "x.tar/b: .json: no field named"),
    ({"b.jpg": photo(), "b.json": caption(" ")}, "x.tar/b.jpg: caption 1 is empty"),
    ({"b.jpg": photo(), "b.json": caption("x", split="odd")}, "x.tar/b: .json: field 'split'"),
    ({"../b.jpg": photo(), "../b.txt": b"Out ."}, "x.tar/../b: "),
    ({"img.v1.7.jpg": photo(), "img.v1.7.json": caption("Dots .")}, "img.v1.7.jpg: a dot in"),
    ({"b.jpg": photo(), "b.json": caption("x", id="\ud800")}, "x.tar/b: .json: field 'id'"),
    ({f"{'b' * 120}.jpg": photo(), f"{'b' * 120}.txt": b"Long ."}, "name is too long"),
]


def test_names_that_other_tools_write(tmp_path, monkeypatch):
    """Absolute paths, pictures beside a photo, and a fault whose name is not UTF-8."""
    members = {
        "/data/k0.jpg": photo("blue"), "/data/k0.txt": b"Absolute .",
        "a.jpg": photo(), "a.txt": b"Mask .", "a.mask.png": b"x",
        "caf\udce9.jpg": photo(), "caf\udce9.txt": b"Latin .",
    }  # fmt: skip
    tarred(tmp_path / "raw/x.tar", members, tarfile.GNU_FORMAT)
    out = tmp_path / "out"
    assert prepared(monkeypatch, tmp_path / "raw", out, "--max-skipped", "1") == 0
    manifest = read_manifest(out)
    assert {row.id: row.captions for row in manifest.rows} == {
        "x.tar/data/k0": ("Absolute .",),
        "x.tar/a": ("Mask .",),
    }
    first = next(row for row in manifest.rows if row.id.endswith("k0"))
    assert read_bytes(manifest, first) == photo("blue")
    [skipped] = json.loads((out / "dataset.json").read_text())["skipped"]
    assert skipped["image"] == "x.tar/caf\\udce9"


@pytest.mark.parametrize(("members", "said"), BAD)
def test_a_sample_that_cannot_be_used_is_a_fault(members, said, tmp_path, monkeypatch, capsys):
    good = {"a.jpg": photo(), "a.json": caption("Good .")}
    tarred(tmp_path / "raw/x.tar", {**good, **members}, tarfile.GNU_FORMAT)
    assert prepared(monkeypatch, tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and "--max-skipped 1" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert prepared(monkeypatch, tmp_path / "raw", tmp_path / "out", "--max-skipped", "1") == 0
    assert [row.captions for row in read_manifest(tmp_path / "out").rows] == [("Good .",)]


def test_sources_that_are_no_shards_are_one_line(tmp_path: Path, server, monkeypatch, capsys):
    (tmp_path / "none").mkdir()
    tarred(tmp_path / "empty/x.tar", {})
    tarred(tmp_path / "cut/x.tar", {"a.jpg": photo(), "a.json": caption("Good .")})
    path = tmp_path / "cut/x.tar"
    path.write_bytes(path.read_bytes()[:700])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/x.tar").write_bytes(b"x" * 2000)
    for source, said in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path / "none", "none: contains no .tar"),
        (tmp_path / "empty", "hold no photo"),
        (tmp_path / "cut", "x.tar: not a complete tar (cut off within a.jpg"),
        (tmp_path / "damaged", "x.tar: not a complete tar"),
        (f"{server.url}/x.zip", "x.zip: not a shard"),
        (f"{server.url}/absent.tar", "absent.tar: the server answers 404"),
        ("http://a/x.tar::http://b/x.tar", "must be on one server"),
        ("http://a/x-{000112..000000}.tar", "the range {000112..000000} is empty"),
    ):
        assert prepared(monkeypatch, source, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_urls_are_counted_out():
    assert find_shards("https://h/a/{08..10}-x.tar") == (
        "https://h/a",
        ["08-x.tar", "09-x.tar", "10-x.tar"],
    )
    assert find_shards("http://[::1]:80/a/b-{0..1}.tar::http://[::1]:80/a/bc/d.tar") == (
        "http://[::1]:80/a",
        ["b-0.tar", "b-1.tar", "bc/d.tar"],
    )


def test_a_server_in_trouble_is_asked_again(server: ShardServer, shards: Path):
    manifest = behind(server, shards)
    row = manifest.rows[3]
    expected = read_bytes(read_manifest(shards), row)
    server.troubles = [503, 429, "cut", "shifted", 500]
    assert read_bytes(manifest, row) == expected and server.asked == 6
    server.troubles = [503] * 20
    with pytest.raises(UserError, match=rf"{row.shard}: status 503, 8 times.*for {row.member}"):
        read_bytes(manifest, row)
    server.troubles = ["whole"]
    with pytest.raises(UserError, match="ignores HTTP Range"):
        read_bytes(manifest, row)
    server.troubles = [403]
    with pytest.raises(UserError, match="answers 403"):
        read_bytes(manifest, row)


def test_no_server_is_one_error(shards: Path, monkeypatch):
    monkeypatch.setattr(ranged, "PAUSE_S", 0.0)
    manifest = Manifest("tiny", read_manifest(shards).rows, "http://127.0.0.1:1/x", shards)
    with pytest.raises(UserError, match=r"x/tiny-train-000000\.tar: ConnectionError, 8 times"):
        read_bytes(manifest, manifest.rows[0])


def test_a_shard_that_changed_is_never_read_as_if_it_had_not(shards: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    manifest = read_manifest(folder)
    row = manifest.rows[0]
    path, whole = folder / row.shard, (folder / row.shard).read_bytes()
    offset, length = row.span
    fingerprint = stamp(manifest, row)
    assert stamp(manifest, manifest.rows[1]) != fingerprint
    for damaged, said in (
        (whole[: offset + length // 2], f"{row.shard}: cut off within {row.member}"),
        (whole[:100], f"{row.shard}: {row.member} is no longer at its offset"),
        (whole[512:], f"{row.shard}: {row.member} is no longer at its offset"),
        (whole[: offset - 500] + b"x" + whole[offset - 499 :], "is no longer at its offset"),
        (whole.replace(b"000000000.png", b"000000007.png"), "is no longer at its offset"),
        (whole[:offset] + b"x" * length + whole[offset + length :], f"{row.member}: "),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"\.tar: ") as caught:
            read_photo(manifest, row)
        assert said in str(caught.value)
        assert stamp(manifest, row) != fingerprint
    path.unlink()
    with pytest.raises(UserError, match=rf"{row.shard}: No such file.*for {row.member}"):
        read_photo(manifest, row)
    with pytest.raises(UserError, match=rf"{row.shard}: No such file"):
        stamp(manifest, row)


def test_an_epoch_goes_through_windows_of_shards(monkeypatch):
    monkeypatch.setattr(training.data.photos, "SHARDS_AT_ONCE", 2)
    rows = [Row(str(n), f"{n % 6}.tar/{n}.jpg", ("x",), "train", span=(512, 1)) for n in range(60)]
    shard_of = shard_numbers(rows)
    orders = [epoch_order(shard_of, 8, seed=1, epoch=epoch) for epoch in (0, 1)]
    assert orders[0] == epoch_order(shard_of, 8, seed=1, epoch=0) != orders[1]
    for order in orders:
        flat = sum(order, [])
        assert sorted(flat) == list(range(60))
        windows = [{n % 6 for n in flat[i : i + 20]} for i in (0, 20, 40)]
        assert [len(window) for window in windows] == [2, 2, 2] and len(set.union(*windows)) == 6
        assert len({n % 6 for n in flat[:10]}) == 2  # mixed within
        shares = [Processes(rank, 3).share(order) for rank in range(3)]
        assert sorted(sum(sum(shares, []), [])) == list(range(60))
    windows = [frozenset(n % 6 for n in sum(order, [])[:20]) for order in orders]
    assert windows[0] != windows[1]
    plain = [Row(str(n), f"{n}.jpg", ("x",), "train") for n in range(60)]
    monkeypatch.undo()  # six shards are one window: the order is that of photos in a folder
    assert epoch_order(shard_of, 8, 1, 0) == epoch_order(shard_numbers(plain), 8, 1, 0)


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{name}/train_state.pt", weights_only=True)["model"]


def test_shards_train_to_the_weights_of_the_folder(
    tiny_data: Path, shards: Path, server: ShardServer, tmp_path: Path, monkeypatch
):
    """From a disk, and from a server in trouble, through a worker's process."""
    stages = [{**stage, "epochs": 1} for stage in TINY["stages"]]
    config = config_of(tmp_path / "tiny.yaml", stages=stages, workers=1)
    monkeypatch.chdir(tmp_path)
    train(config, read_manifest(tiny_data), Path("plain"), None, resume=False)
    train(config, read_manifest(shards), Path("packed"), None, resume=False)
    server.troubles = [503, "cut"]
    train(config, behind(server, shards), Path("streamed"), None, resume=False)
    assert server.asked > 16 * 3 + 4 * 2
    expected = weights("plain")
    for name in ("packed", "streamed"):
        assert all(torch.equal(expected[key], tensor) for key, tensor in weights(name).items())


def test_a_killed_run_on_streamed_shards_resumes_exactly(
    shards: Path, server: ShardServer, tmp_path: Path, monkeypatch
):
    """Killed after every third saved state, in the middle of epochs too, in windows of shards."""
    monkeypatch.setattr(training.data.photos, "SHARDS_AT_ONCE", 2)
    monkeypatch.chdir(tmp_path)
    config, manifest = (
        config_of(tmp_path / "tiny.yaml", stages=TINY["stages"][:1]),
        behind(server, shards),
    )
    train(config, manifest, Path("left-alone"), None, resume=False)
    assert train_killed(config, manifest, Path("killed"), 3, monkeypatch) == 4
    expected = weights("left-alone")
    assert all(torch.equal(expected[key], tensor) for key, tensor in weights("killed").items())


@pytest.mark.slow
def test_two_processes_share_what_a_server_sends(server: ShardServer, shards: Path, tmp_path: Path):
    """torchrun: every photo of an epoch is asked for once, by one of them, and the losses are those
    of one process."""
    stages = [{**TINY["stages"][0], "epochs": 1}]
    still = {**TINY["decoder"], "dropout": 0.0}
    config_of(tmp_path / "tiny.yaml", stages=stages, decoder=still, precision="fp32", workers=1)
    manifest = behind(server, shards)
    write_manifest(tmp_path / "data", "tiny", manifest.rows, manifest.image_root, [])
    command = ["training.train", "--config", "tiny.yaml", "--data", "data", "--run"]
    launcher = ["--standalone", "--nproc-per-node", "2", "-m", "--", *command]
    losses = []
    for number, words in enumerate((command, ["torch.distributed.run", *launcher])):
        server.asked = 0
        done = run_program(*words, str(number), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.asked == 16 + 4
        log = (tmp_path / f"build/checkpoints/{number}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss", 0.0) for line in log])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_a_missing_shard_ends_training_in_one_line(shards: Path, tmp_path: Path, monkeypatch):
    """Raised in a worker, whose traceback the loader would put into the message."""
    shutil.copytree(shards, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    Path("copy/tiny-train-000002.tar").unlink()
    manifest = read_manifest(Path("copy"))
    for stage, workers in itertools.product(TINY["stages"], (0, 2)):
        config = config_of(tmp_path / "tiny.yaml", stages=[stage], workers=workers)
        with pytest.raises(UserError) as caught:
            train(config, manifest, Path("run"), None, resume=False)
        assert str(caught.value).startswith("copy/tiny-train-000002.tar: No such file")
        assert "Traceback" not in str(caught.value)


def test_scenes_keep_their_truth(tmp_path: Path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [Row("a", "a.png", ("A dog .",), "train", {"objects": []})]
    write_manifest(tmp_path / "data", "my scenes", rows, tmp_path, [])
    write_shards(read_manifest(tmp_path / "data"), tmp_path / "out", 10**6)
    assert (tmp_path / "out/my-scenes-train-000000.tar").exists()
    assert prepared(monkeypatch, tmp_path / "out", tmp_path / "again") == 0
    for name in ("out", "again"):
        assert read_manifest(tmp_path / name).rows[0].scene == {"objects": []}
