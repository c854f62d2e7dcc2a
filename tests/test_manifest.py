"""The manifest's round trip, and that any damage is one clear error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.errors import UserError
from training.data.manifest import Row, data_folder, read_manifest, write_manifest

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
IMAGE = NAME.filter(lambda n: n.strip() and not n.startswith("/") and set(n.split("/")) - {"", "."})
ROW = st.builds(
    Row,
    id=TEXT,
    image=IMAGE.filter(lambda n: ".." not in n.split("/")),
    captions=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    split=st.sampled_from(["train", "val", "test"]),
    scene=st.none() | st.dictionaries(TEXT, st.integers() | TEXT, max_size=2),
) | st.builds(
    Row,
    id=TEXT,
    image=NAME.filter(lambda n: n.strip() and n not in (".", "..")).map(
        lambda n: f"a.tar/{n.replace('/', '-')}"
    ),
    captions=st.just(("A dog .",)),
    split=st.just("train"),
    span=st.tuples(st.integers(0, 2**40), st.integers(0, 2**24)),
)
ROWS = st.lists(ROW, min_size=1, max_size=5, unique_by=lambda row: row.id)
SHARED_FOLDER = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GOOD = {"id": "a", "image": "a.png", "captions": ["A dog ."], "split": "train"}


def write(folder: Path, *lines: object, root: str = ".") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(texts), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps({"name": "made", "image_root": root}))
    return folder


@SHARED_FOLDER
@given(ROWS)
def test_rows_come_back_as_they_were_written(tmp_path: Path, rows: list[Row]) -> None:
    write_manifest(tmp_path, "made", rows, tmp_path, [])
    manifest = read_manifest(tmp_path)
    assert list(manifest.rows) == rows
    assert read_manifest(tmp_path / "captions.jsonl") == manifest


@SHARED_FOLDER
@given(st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*GOOD, "scene", "x"]), inner, max_size=5),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_whatever_the_line_holds_it_is_a_row_or_a_user_error(tmp_path: Path, line: bytes) -> None:
    write(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(line)
    try:
        assert read_manifest(tmp_path).rows
    except UserError as error:
        assert "captions.jsonl" in str(error)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ({**GOOD, "id": "b", "split": "dev"}, "field 'split'"),
        ({**GOOD, "id": "b", "image": "../a.png"}, "field 'image'"),
        ({**GOOD, "id": "b", "image": "/etc/passwd"}, "field 'image'"),
        ({**GOOD, "id": "b", "captions": []}, "field 'captions'"),
        ({**GOOD, "id": "b", "captions": ["x", " "]}, "captions[1]"),
        ({**GOOD, "id": "b", "scene": 3}, "field 'scene'"),
        ({**GOOD, "id": "b", "span": [512, 9]}, "field 'image' must be SHARD.tar/NAME"),
        ({**GOOD, "id": "b", "image": "a.tar/b.jpg", "span": [512]}, "field 'span'"),
        ({**GOOD, "id": "b", "image": "a.tar/b.jpg", "span": [512, -1]}, "field 'span'"),
        ({**GOOD, "id": "b", "image": "a.tar/b.jpg", "span": [True, 9]}, "field 'span'"),
        ({**GOOD, "id": "b", "image": "a.tar/b.jpg", "span": 3}, "field 'span'"),
        ({**GOOD, "id": "b", "colour": "red"}, "'colour' is unknown"),
        ({"id": "b"}, "is missing"),
        (GOOD, "occurs already in line 1"),
        ("[]", "must be a JSON object"),
    ],
)
def test_damage_names_file_line_and_field(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest(write(tmp_path, GOOD, line))
    assert said in str(caught.value) and "captions.jsonl, line 2" in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset.json"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="image_root"):
        read_manifest(write(tmp_path, GOOD, root="gone"))
    with pytest.raises(UserError, match="no photos"):
        read_manifest(write(tmp_path, ""))


def test_photos_behind_a_url_lie_in_shards(tmp_path: Path) -> None:
    there = {**GOOD, "image": "sub/x-0.tar/d/a.jpg", "span": [512, 9]}
    manifest = read_manifest(write(tmp_path, there, root="https://host/data/"))
    row = manifest.rows[0]
    assert (row.shard, row.member) == ("sub/x-0.tar", "d/a.jpg")
    assert manifest.path(row) == "https://host/data/sub/x-0.tar"
    write_manifest(tmp_path / "copy", "made", manifest.rows, manifest.image_root, [])
    assert read_manifest(tmp_path / "copy") == replace(manifest, folder=tmp_path / "copy")
    with pytest.raises(UserError, match="line 1: field 'span' is missing"):
        read_manifest(write(tmp_path, GOOD, root="https://host/data"))


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, GOOD))
    assert [row.id for row in manifest.split("train")] == ["a"]
    with pytest.raises(UserError, match=r"no split 'val'; it has train \(1\)"):
        manifest.split("val")


def test_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DATA=./tiny read the dataset of that name under build/data."""
    (tmp_path / "build/data/tiny").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_folder("tiny") == Path("build/data/tiny")
    for folder in ("./tiny", "tiny/", ".", str(tmp_path / "tiny")):
        assert data_folder(folder).resolve() == (tmp_path / folder).resolve()


def test_the_folder_of_photos_below_the_dataset_is_kept_relative(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    row = Row("a", "a.png", ("A dog .",), "train")
    write_manifest(tmp_path, "made", [row], tmp_path / "images", [{"id": "b", "reason": "broken"}])
    dataset = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert dataset["image_root"] == "images" and dataset["counts"] == {"train": 1}
    assert dataset["skipped"] == [{"id": "b", "reason": "broken"}]
    manifest = read_manifest(tmp_path)
    assert manifest.path(row) == tmp_path / "images" / "a.png"


def test_a_refused_manifest_leaves_the_earlier_one(tmp_path: Path) -> None:
    row = Row("a", "a.png", ("A dog .",), "train")
    write_manifest(tmp_path, "made", [row], tmp_path, [])
    before = (tmp_path / "captions.jsonl").read_bytes()
    for rows in ([], [row, row]):
        with pytest.raises(UserError):
            write_manifest(tmp_path, "made", rows, tmp_path, [])
    assert (tmp_path / "captions.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl", "dataset.json"]
