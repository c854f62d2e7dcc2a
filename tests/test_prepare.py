"""`python -m training.prepare` from raw files to a manifest, and each fault it may meet."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from handler.errors import run_command
from handler.files import locked
from training import prepare
from training.data import scenes
from training.data.flickr import KNOWN_DEFECT, read_flickr8k
from training.data.manifest import read_manifest

SHARED = Path(__file__).parents[2] / "shared" / "flickr8k"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the program."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    try:
        run_command(prepare.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos with two captions each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["image,caption,split"]
    for name, split in (("a", "train"), ("b", "train"), ("c", "val")):
        Image.new("RGB", (20, 10), "red").save(folder / f"{name}.png")
        lines += [f"{name}.png,A  red photo .,{split}", f"{name}.png,Red .,{split}"]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def test_own_photos_become_a_manifest(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--out", out) == 0
    manifest = read_manifest(out)
    assert [row.captions for row in manifest.split("val")] == [("A red photo .", "Red .")]
    assert manifest.path(manifest.rows[0]) == photos / "a.png"
    assert "2 train, 1 val" in capsys.readouterr().out


def _break_photo(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2])


def _empty_caption(folder: Path) -> None:
    path = folder / "captions.csv"
    path.write_text(path.read_text().replace("a.png,Red .", "a.png, ", 1))


def _caption_of_signs(folder: Path) -> None:
    path = folder / "captions.csv"
    path.write_text(path.read_text().replace("a.png,Red .", "a.png,... -", 1))


def _huge_file(folder: Path) -> None:
    with (folder / "a.png").open("ab") as file:
        file.truncate(1 << 40)  # sparse: reading all of it would end the machine


def _missing_photo(folder: Path) -> None:
    (folder / "a.png").unlink()


@pytest.mark.parametrize(
    "damage", [_break_photo, _empty_caption, _caption_of_signs, _huge_file, _missing_photo]
)
def test_a_fault_is_named_and_passes_only_below_the_limit(
    damage: Callable[[Path], None],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ("--data", "folder", "--source", photos, "--out", out)
    assert run(monkeypatch, *arguments) == 0
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    damage(photos)
    capsys.readouterr()
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "1 fault (a.png" in said and "a.png" in said
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before

    assert run(monkeypatch, *arguments, "--max-skipped", 1) == 0
    dataset = json.loads((out / "dataset.json").read_text())
    assert [entry["image"] for entry in dataset["skipped"]] == ["a.png"]


def test_photos_in_no_split_are_counted(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = photos / "captions.csv"
    path.write_text(path.read_text().replace(",val", ","))
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--out", out) == 0
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["unused"] == 1 and dataset["counts"] == {"train": 2}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--data", "nothing"),
        ("--data", "coco"),
        ("--data", "folder", "--source", "does/not/exist"),
        ("--data", "folder", "--source", ".", "--max-skipped", "-1"),
        ("--data", "folder", "--source", ".", "--max-skipped", "1.5"),
        ("--data", "folder", "--source", ".", "--max-skipped", "200%"),
        ("--data", "folder", "--source", ".", "--max-skipped", "nan"),
        ("--data", "folder", "--source", ".", "--max-skipped", "few"),
        ("--data", "folder", "--source", ".", "--name", "../photos"),
        ("--data", "scenes", "--source", "."),
        ("--data", "scenes", "--name", "mine"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "allowed"), [("0", 0), ("3", 3), ("0.01", 0.01), ("1%", 0.01), ("100%", 1.0)]
)
def test_limits(text: str, allowed: int | float) -> None:
    assert prepare.limit(text) == allowed and type(prepare.limit(text)) is type(allowed)


def test_several_faults_are_all_named(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open(photos / "captions.csv", "a", newline="") as file:
        csv.writer(file).writerows([[], *([f"gone{n}.jpg", "A cat .", "val"] for n in range(30))])
    arguments = ("--data", "folder", "--source", photos, "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments, "--max-skipped", "90%") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "30 faults" in said.err and "gone0.jpg" in said.err
    assert all(f"gone{n}.jpg: photo is missing" in said.out for n in range(30))
    assert not (tmp_path / "out").exists()

    assert run(monkeypatch, *arguments, "--max-skipped", "91%") == 0
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(dataset["skipped"]) == 30 and dataset["counts"] == {"train": 2, "val": 1}
    assert "30 skipped" in capsys.readouterr().out


def test_suffixes_in_capitals_links_and_photos_without_captions(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (photos / "a.png").rename(photos / "a.PNG")
    (photos / "b.png").rename(tmp_path / "elsewhere")
    (photos / "b.png").symlink_to(tmp_path / "elsewhere")
    shutil.copyfile(photos / "c.png", photos / "d.jpeg")
    (photos / "notes.txt").write_text("no photo")
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--out", out) == 0
    manifest = read_manifest(out)
    assert [(row.id, row.image) for row in manifest.rows][0] == ("a.png", "a.PNG")
    assert all(manifest.path(row).is_file() for row in manifest.rows)
    assert json.loads((out / "dataset.json").read_text())["uncaptioned"] == 1
    assert "1 without captions" in capsys.readouterr().out


def test_one_file_under_two_names_is_a_fault(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open(photos / "captions.csv", "a") as file:
        file.write("\na.PNG,Red again .,val\n")
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--out", out) == 2
    assert "a.PNG: the same file as a.png" in capsys.readouterr().err


def test_a_caption_given_twice_stays_and_is_counted(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(photos / "captions.csv", "a") as file:
        file.write("\na.png, Red  .,train\n")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--name", "holiday") == 0
    manifest = read_manifest(tmp_path / "build" / "data" / "holiday")
    assert manifest.name == "holiday"
    assert manifest.rows[0].captions == ("A red photo .", "Red .", "Red .")
    dataset = json.loads((tmp_path / "build/data/holiday/dataset.json").read_text())
    assert (dataset["captions"], dataset["repeated_captions"]) == (7, 1)


def test_wrong_folders_are_one_line_and_change_nothing(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(path.name for path in photos.iterdir())
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copyfile(photos / "captions.csv", tmp_path / "empty" / "captions.csv")
    for source, out, said in (
        (photos, photos, "the output is the input"),
        (photos, tmp_path / "file", "this is a file; a prepared dataset needs a folder"),
        (tmp_path / "empty", tmp_path / "out", "none of the 3 photos"),
    ):
        assert run(monkeypatch, "--data", "folder", "--source", source, "--out", out) == 2
        assert said in capsys.readouterr().err
    assert run(monkeypatch, "--data", "scenes", "--out", tmp_path / "file") == 2
    assert "this is a file; a drawn dataset needs a folder" in capsys.readouterr().err
    assert sorted(path.name for path in photos.iterdir()) == before


def test_an_interrupted_run_leaves_the_earlier_dataset(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(scenes.PRESETS, "scenes", scenes.Preset(train=3, val=2))
    drawn, own = tmp_path / "drawn", tmp_path / "own"
    runs = (
        ("--data", "scenes", "--out", drawn),
        ("--data", "folder", "--source", photos, "--out", own),
    )
    assert [run(monkeypatch, *arguments) for arguments in runs] == [0, 0]
    assert {row.split for row in read_manifest(drawn).rows} == {"train", "val"}
    before = contents(drawn), contents(own)
    monkeypatch.setattr(scenes, "write_manifest", interrupt)
    monkeypatch.setattr(prepare, "decode", interrupt)
    assert [run(monkeypatch, *arguments) for arguments in runs] == [130, 130]
    assert (contents(drawn), contents(own)) == before
    assert sorted(path.name for path in drawn.iterdir()) == [
        "captions.jsonl", "dataset.json", "images",
    ]  # fmt: skip


def test_only_a_prepared_dataset_is_replaced(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What lay in --out was overwritten, whoever had written it."""
    monkeypatch.setitem(scenes.PRESETS, "scenes", scenes.Preset(train=3, val=2))
    own = ("--data", "folder", "--source", photos, "--out")
    for out, said in (
        (photos / "below", "the output is below the input"),
        (tmp_path, "the output is above the input"),
    ):
        assert run(monkeypatch, *own, out) == 2
        assert said in capsys.readouterr().err
    out = tmp_path / "out"
    assert run(monkeypatch, *own, out) == 0
    assert json.loads((out / "dataset.json").read_text())["format"] == 1
    (out / "thesis.txt").write_text("x")
    for arguments in ((*own, out), ("--data", "scenes", "--out", out)):
        assert run(monkeypatch, *arguments) == 2
        assert str(out) in capsys.readouterr().err
        assert (out / "thesis.txt").read_text() == "x"
    (out / "thesis.txt").unlink()
    assert run(monkeypatch, "--data", "scenes", "--out", out) == 2
    assert "is not a drawn dataset" in capsys.readouterr().err
    with locked(out):
        assert run(monkeypatch, *own, out) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert run(monkeypatch, *own, out) == 0
    drawn = tmp_path / "drawn"
    for _ in range(2):
        assert run(monkeypatch, "--data", "scenes", "--out", drawn) == 0
    assert run(monkeypatch, *own, drawn) == 2


def test_home_and_a_missing_split_and_a_source_that_is_not_given(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = photos / "captions.csv"
    path.write_text(path.read_text().replace(",val", ",test"))
    arguments = ("--data", "folder", "--source", "~/photos", "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "no photo in the split 'val'" in line and "leave the splits out" in line
    assert run(monkeypatch, "--data", "coco") == 2
    assert "coco cannot be downloaded automatically; set SOURCE=DIR" in capsys.readouterr().err


def test_heic_and_avif_count_as_photos(photos: Path, tmp_path: Path, monkeypatch) -> None:
    """They were passed over in silence."""
    for name in ("x.HEIC", "y.avif", "z.heif"):
        (photos / name).touch()
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", "folder", "--source", photos, "--out", out) == 0
    assert json.loads((out / "dataset.json").read_text())["uncaptioned"] == 3


def _flickr8k(folder: Path) -> dict[str, str]:
    (folder / "Flickr8k_text").mkdir()
    lines = [f"{name}.jpg#{n}\tA photo ." for name in "abc" for n in range(5)]
    lines += [f"{KNOWN_DEFECT}#0\tA hole ."]
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("\n".join(lines))
    (folder / "Flickr8k_text" / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (folder / "Flickr8k_text" / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    return {name: f"Flicker8k_Dataset/{name}.jpg" for name in "abc"}


def _flickr30k(folder: Path) -> dict[str, str]:
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": "A photo ."}]}
        for name, split in (("a", "train"), ("b", "val"))
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return {name: f"flickr30k_images/flickr30k_images/{name}.jpg" for name in "ab"}


def _coco(folder: Path) -> dict[str, str]:
    (folder / "annotations").mkdir()
    for number, split in enumerate(("train", "val")):
        record = {
            "images": [{"id": number, "file_name": f"{split}.jpg"}],
            "annotations": [{"image_id": number, "caption": "A photo ."}],
        }
        path = folder / "annotations" / f"captions_{split}2017.json"
        path.write_text(json.dumps(record))
    return {"a": "train2017/train.jpg", "b": "val2017/val.jpg"}


@pytest.mark.parametrize(
    ("kind", "lay_out"), [("flickr8k", _flickr8k), ("flickr30k", _flickr30k), ("coco", _coco)]
)
def test_published_layouts_from_end_to_end(
    kind: str,
    lay_out: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    source.mkdir()
    files = lay_out(source)
    for file in files.values():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), "blue").save(source / file)
    assert run(monkeypatch, "--data", kind, "--source", source, "--out", out) == 0
    manifest = read_manifest(out)
    assert [manifest.path(row) for row in manifest.rows] == [source / files[key] for key in "ab"]
    assert [row.split for row in manifest.rows] == ["train", "val"]
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["unused"] == (1 if kind == "flickr8k" else 0) and dataset["uncaptioned"] == 0
    defects = [KNOWN_DEFECT] if kind == "flickr8k" else []
    assert [entry["image"] for entry in dataset["skipped"]] == defects


def test_flickr8k_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/flickr8k is not there")
    names = (SHARED / "Flickr_8k.devImages.txt").read_text().split()[:5]
    source, out = tmp_path / "flickr8k", tmp_path / "out"
    (source / "images").mkdir(parents=True)
    for name in names:
        shutil.copyfile(SHARED / "images" / name, source / "images" / name)
    tokens = (SHARED / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in tokens if line.partition("#")[0] in names]
    (source / "Flickr8k.token.txt").write_text("\n".join(lines), encoding="utf-8")
    (source / "Flickr_8k.devImages.txt").write_text("\n".join(names))
    assert run(monkeypatch, "--data", "flickr8k", "--source", source, "--out", out) == 0
    rows = read_manifest(out).split("val")
    assert [row.id for row in rows] == names and all(len(row.captions) == 5 for row in rows)


def test_flickr8k_in_full() -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/flickr8k is not there")
    source = read_flickr8k(SHARED)
    assert [sum(photo.split == name for photo in source.photos) for name in ("train", "val")] == [
        6000,
        1000,
    ]
    assert all(len(photo.captions) == 5 for photo in source.photos) and not source.faults
    assert len(prepare.find_photos(source)[0]) == 7000
