"""Every layout of every source, on small made files."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.errors import UserError
from training.data.coco import read_coco
from training.data.flickr import KNOWN_DEFECT, read_flickr8k, read_flickr30k
from training.data.folder import captions_of, read_folder
from training.data.source import HASHED, Photo, Source, locate, split_by_hash


def made(folder: Path, **files: str) -> Path:
    """`files` in `folder` (`__` stands for a dot), beside an empty `images/`."""
    (folder / "images").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_bytes(text.encode())
    return folder


def splits(source: Source) -> dict[str, str | None]:
    return {photo.id: photo.split for photo in source.photos}


TOKENS = "a.jpg#0\tA dog .\na.jpg#1\tA brown dog .\nb.jpg#0\tA cat .\nc.jpg#0\tA cow .\n"


def test_flickr8k_original(tmp_path: Path) -> None:
    made(
        tmp_path,
        Flickr8k__token__txt="\ufeff"
        + TOKENS.replace("\n", "\r\n")
        + f"{KNOWN_DEFECT}#0\tA hole .",
        Flickr_8k__trainImages__txt="a.jpg\r\n",
        Flickr_8k__devImages__txt="b.jpg\nd.jpg\n",
    )
    source = read_flickr8k(tmp_path)
    assert source.photos == [
        Photo("a.jpg", "a.jpg", ("A dog .", "A brown dog ."), "train"),
        Photo("b.jpg", "b.jpg", ("A cat .",), "val"),
        Photo("c.jpg", "c.jpg", ("A cow .",), None),
    ]
    assert [name for name, _ in source.faults] == ["d.jpg"]
    assert [name for name, _ in source.known] == [KNOWN_DEFECT]
    assert source.image_root == tmp_path / "images"


def test_flickr8k_from_kaggle(tmp_path: Path) -> None:
    made(tmp_path, captions__txt='image,caption\na.jpg,"A dog, and a ""cat"" ."\nb.jpg,A cow .\n')
    source = read_flickr8k(tmp_path)
    assert source.photos[0].captions == ('A dog, and a "cat" .',)
    assert source.splits == HASHED and set(splits(source).values()) == {"train", "val"}
    made(tmp_path, Flickr_8k__testImages__txt="b.jpg\n")
    assert splits(read_flickr8k(tmp_path)) == {"b.jpg": "test", "a.jpg": None}


def karpathy(**fields: object) -> str:
    image = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog ."}], **fields}
    return json.dumps({"images": [image], "dataset": "made"})


def test_karpathy(tmp_path: Path) -> None:
    made(
        tmp_path, dataset_flickr8k__json=karpathy(), dataset_flickr30k__json=karpathy(split="test")
    )
    assert read_flickr8k(tmp_path).photos == [Photo("a.jpg", "a.jpg", ("A dog .",), "train")]
    assert splits(read_flickr30k(tmp_path)) == {"a.jpg": "test"}
    made(tmp_path, dataset_coco__json=karpathy(split="restval", filepath="val2014", cocoid=7))
    photo = Photo("7", "val2014/a.jpg", ("A dog .",), "train")
    assert read_coco(tmp_path).photos == [photo]


def test_flickr30k(tmp_path: Path) -> None:
    made(
        tmp_path,
        results__csv="image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 4   A cat .\n",
    )
    assert read_flickr30k(tmp_path).photos[0].captions == ("A dog .", "A cat .")
    made(tmp_path, results_20130124__token=TOKENS)
    assert list(splits(read_flickr30k(tmp_path))) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("below", ["", "annotations"])
@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco(tmp_path: Path, below: str, year: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    for number, split in enumerate(("train", "val")):
        record = {
            "images": [{"id": number, "file_name": f"{number}.jpg"}],
            "annotations": [
                {"image_id": number, "caption": "A dog ."},
                {"image_id": 99, "caption": "Nothing ."},
            ],
        }
        path = tmp_path / below / f"captions_{split}{year}.json"
        path.write_text(json.dumps(record))
    source = read_coco(tmp_path)
    assert source.photos[1] == Photo("1", f"val{year}/1.jpg", ("A dog .",), "val")
    assert [name for name, _ in source.faults] == ["99", "99"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "captions__csv",
            "image,text,split\na.jpg,A dog .,train\na.jpg,A cat .,train\nb.jpg,x,dev\nc.jpg,y,",
        ),
        (
            "metadata__jsonl",
            '{"file_name": "a.jpg", "captions": ["A dog .", "A cat ."], "split": "train"}\n'
            '{"file_name": "./b.jpg", "text": "x", "split": "validation"}\n'
            '{"file_name": "c.jpg", "text": "y", "split": null}\n',
        ),
    ],
)  # fmt: skip
def test_own_photos(tmp_path: Path, name: str, text: str) -> None:
    source = read_folder(made(tmp_path, **{name: text}))
    assert splits(source) == {"a.jpg": "train", "b.jpg": "val", "c.jpg": None}
    assert source.photos[0].captions == ("A dog .", "A cat .") and source.image_root == tmp_path


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"caption": "a", "captions": ["b", "a", "c"]}, ["a", "b", "c"]),
        ({"caption": "a", "text": None, "captions": []}, ["a"]),
        ({"caption": None, "captions": ["b", "b"]}, ["b", "b"]),
        ({"text": " "}, [" "]),
        ({"captions": None}, [""]),
    ],
)
def test_captions_in_several_fields(record, captions):
    """Those of the second field were lost."""
    assert captions_of(record, "x") == captions


def test_own_photos_in_the_layouts_of_imagefolder(tmp_path: Path) -> None:
    for folder, name in (("train", "a.jpg"), ("Validation", "b.jpg")):
        (tmp_path / folder).mkdir()
        line = json.dumps({"file_name": name, "text": "A dog ."})
        (tmp_path / folder / "metadata.jsonl").write_text(line + "\n")
    source = read_folder(tmp_path)
    assert splits(source) == {"Validation/b.jpg": "val", "train/a.jpg": "train"}
    made(tmp_path, metadata__csv="file_name,text\ntrain/a.jpg,A dog .\ntest/b.jpg,A cat .\n")
    source = read_folder(tmp_path)
    assert splits(source) == {"train/a.jpg": "train", "test/b.jpg": "test"}
    assert source.splits == "by the folders' names"
    made(
        tmp_path,
        metadata__csv="file_name,text\nimages/train/a.jpg,A dog .\nimages/test/b.jpg,A cat .\n",
    )
    source = read_folder(tmp_path)
    assert splits(source) == {"images/train/a.jpg": "train", "images/test/b.jpg": "test"}
    made(tmp_path, metadata__csv="file_name,text\nimages/a.jpg,A dog .\nimages/b.jpg,A cat .\n")
    assert read_folder(tmp_path).splits == HASHED


def test_own_photos_from_a_spreadsheet_beside_a_folder_of_images(tmp_path: Path) -> None:
    made(
        tmp_path, photos__csv='\ufeffimage;caption\r\na.jpg;"A dog, ""big""; red ."\r\nb.jpg;x\r\n'
    )
    (tmp_path / "._photos.csv").write_bytes(b"what a Macintosh leaves beside a file")
    assert read_folder(tmp_path).image_root == tmp_path
    (tmp_path / "images" / "b.jpg").touch()
    source = read_folder(tmp_path)
    assert source.photos[0].captions == ('A dog, "big"; red .',)
    assert source.image_root == tmp_path / "images" and source.splits == HASHED


def test_the_folder_that_holds_photos_is_found(tmp_path: Path) -> None:
    made(tmp_path, captions__txt="image,caption\na.jpg,A dog .\n")
    nested = tmp_path / "Flickr8k_Dataset" / "Flicker8k_Dataset"
    nested.mkdir(parents=True)
    (nested / "a.jpg").touch()
    assert read_flickr8k(tmp_path).image_root == nested
    (tmp_path / "a.JPG").touch()
    (nested / "a.jpg").unlink()
    assert read_flickr8k(tmp_path).image_root == tmp_path


def test_hashed_splits_stay_when_photos_are_added() -> None:
    few, many = (split_by_hash(str(n) for n in range(count)) for count in (1000, 2000))
    assert sum(few[key] != many[key] for key in few) <= 2
    assert 70 < list(few.values()).count("val") < 130
    assert set(split_by_hash(["a", "b"]).values()) == {"val", "train"}
    assert split_by_hash(["a"]) == {"a": "train"}


@pytest.mark.parametrize(
    ("read", "files", "said"),
    [
        (read_flickr8k, {}, "no captions found"),
        (read_flickr8k, {"Flickr8k__token__txt": "a.jpg A dog ."}, "token.txt, line 1"),
        (read_flickr8k, {"Flickr8k__token__txt": "../a.jpg#0\tA dog ."}, "inside the image folder"),
        (read_flickr8k, {"captions__txt": 'image,caption\na.jpg,"A dog'}, "captions.txt, line 2"),
        (read_flickr8k, {"captions__txt": "image,caption\na.jpg,A dog, a cat"}, "line 2: 3 fields"),
        (read_flickr8k, {"captions__txt": "photo,words\na.jpg,A dog"}, "the header"),
        (read_flickr8k, {"dataset_flickr8k__json": '{"images": [\n}'}, "line 2: not JSON"),
        (read_flickr8k, {"dataset_flickr8k__json": karpathy(split="foo")}, "field 'split'"),
        (read_flickr8k, {"dataset_flickr8k__json": karpathy(sentences=3)}, "field 'sentences'"),
        (read_flickr8k, {"dataset_flickr8k__json": karpathy(filename="/a")}, "inside"),
        (read_flickr30k, {"results__csv": "a.jpg, 0, A dog"}, "results.csv, line 1"),
        (read_coco, {}, "captions_train2017.json"),
        (read_coco, {"captions_val2017__json": '{"images": [{"id": "x"}]}'}, "field 'id'"),
        (read_folder, {}, "found: none"),
        (read_folder, {"a__csv": "", "b__csv": ""}, "a.csv, b.csv"),
        (read_folder, {"captions__csv": "image,words\na.jpg,A dog"}, "caption or text"),
        (read_folder, {"captions__jsonl": '{"image": "a", "text": 3}'}, "field 'text'"),
        (read_folder, {"captions__csv": "image,text,split\na,x,train\na,y,val"}, "field 'split'"),
        (read_folder, {"captions__csv": "image,text\n../../a.jpg,x"}, "inside"),
        (read_folder, {"captions__csv": "image,text,text\na.jpg,x,y"}, "more than once"),
        (read_folder, {"captions__csv": "image,text\n,x"}, "line 2: the photo's name is empty"),
        (read_folder, {"captions__jsonl": '{"image": "a", "text": "\\ud800"}'}, "surrogate"),
        (read_flickr8k, {"dataset_flickr8k__json": karpathy(filename="\ud800")}, "surrogate"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, read: Callable[[Path], Source], files: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(made(tmp_path, **files))
    assert said in str(caught.value)


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("below", ["", "caf\u00e9/", "images/"])
def test_accents_are_found_however_they_are_encoded(tmp_path: Path, disk, written, below) -> None:
    """macOS writes an accent as a character of its own; such photos were missing."""
    name = f"{below}Z\u00fcrich.JPG"
    file = tmp_path / unicodedata.normalize(disk, name)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    line = unicodedata.normalize(written, name.removeprefix("images/").replace("JPG", "jpg"))
    made(tmp_path, captions__csv=f"image,caption\n{line},A town .\n")
    source = read_folder(tmp_path)
    found, _ = locate(source.image_root, [source.photos[0].image])
    assert source.image_root / found[source.photos[0].image] == file


def test_backslashes_and_absolute_paths_within_the_source(tmp_path: Path) -> None:
    """Both were photos that are missing; outside they still are refused."""
    inside = tmp_path / "images" / "b.jpg"
    made(tmp_path, captions__csv=f"image,caption\nimages\\a.jpg,A dog .\n{inside},A cat .\n")
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.jpg").touch()
    source = read_folder(tmp_path)
    assert [photo.image for photo in source.photos] == ["images/a.jpg", "images/b.jpg"]
    made(tmp_path, captions__csv="image,caption\n..\\a.jpg,A dog .\n")
    with pytest.raises(UserError, match="inside"):
        read_folder(tmp_path)
    made(tmp_path, captions__csv="image,caption\n/etc/a.jpg,A dog .\n")
    with pytest.raises(UserError, match="inside"):
        read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("divider", [",", ";", "\t"])
def test_a_table_as_spreadsheets_write_it(tmp_path: Path, encoding: str, divider: str) -> None:
    rows = (("File_Name", "Caption"), ("a.jpg", '"Ein Hund, gro\u00df; rot"'))
    text = "\r\n".join(divider.join(row) for row in rows)
    (tmp_path / "captions.csv").write_bytes(text.encode(encoding))
    assert read_folder(tmp_path).photos[0].captions == ("Ein Hund, gro\u00df; rot",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", b"a.jpg,A dog .\nb.jpg,A cat .\n", "header must name the columns image"),
        ("captions.csv", b"image,caption\na.jpg,Caf\xe9 .\n", "line 2: not UTF-8"),
        ("captions.csv", b"image,caption\na.jpg,A\0dog .\n", "line 2: a NUL character"),
        ("captions.csv", "image,caption\na.jpg,x\n".encode("utf-16-le"), "a NUL character"),
        ("captions.csv", b'image,caption\na.jpg,x\nb.jpg,"A dog .\nc.jpg,y\n', "line 3: not CSV"),
        ("captions.csv", b'image,caption\na.jpg,"' + b"x" * 200_000, "is a quote missing"),
        ("captions.jsonl", b'{"picture": "a.jpg", "x": "x"}\n', "fields are 'picture', 'x'"),
        ("captions.jsonl", b"[" * 200_000, "not JSON"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_says_where_and_why(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    message = str(caught.value)
    assert said in message and name in message and len(message) < 500 + len(str(tmp_path))


PIECE = st.sampled_from(
    ["a.jpg", "#0", "\t", ",", '"', "\n", "{", "}", "[", "]", "image", "caption", ":", "\0", "é",
     '{"images":', '"sentences"', '"file_name"', "|", " ", "1"]
)  # fmt: skip
FILES = ("Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "results.csv",
         "captions_val2017.json", "metadata.jsonl")  # fmt: skip


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(FILES),
    st.lists(PIECE, max_size=15).map("".join).map(str.encode) | st.binary(max_size=30),
)
def test_any_content_is_read_or_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    try:
        for read in (read_flickr8k, read_flickr30k, read_coco, read_folder):
            try:
                read(tmp_path)
            except UserError as error:
                assert str(tmp_path) in str(error)
    finally:
        (tmp_path / name).unlink()
