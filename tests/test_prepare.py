"""`python -m training.prepare` from raw files to a manifest, and each fault it may meet."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from handler.errors import run_command
from training import prepare
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


def _missing_photo(folder: Path) -> None:
    (folder / "a.png").unlink()


@pytest.mark.parametrize("damage", [_break_photo, _empty_caption, _missing_photo])
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
    assert said.startswith("error: ") and "1 faults" in said and "a.png" in said
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
        ("--data", "scenes", "--source", "."),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


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
