"""What a source returns (`Source`), and helpers with which all of them read their files."""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from handler.errors import UserError
from handler.image_preprocess import PHOTO_SUFFIXES
from training.data.manifest import SPLITS, check_inside

# Common names of the three splits; Karpathy's `restval` are COCO photos that belong to train.
SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    "training": "train",
    "restval": "train",
    "dev": "val",
    "valid": "val",
    "validation": "val",
}
HELD_OUT = {"val": 0.1, "test": 0.1}
HASHED = "by a hash of the id: 80 % train, 10 % val, 10 % test"

Json = TypeVar("Json", str, int, list[Any], dict[str, Any])


@dataclass(frozen=True)
class Photo:
    """One photo as its source describes it, not opened yet. `image` is relative to the image root,
    `captions` are raw (a caption may be empty), `split` is None if the photo is in no split.

    Duplicate captions of a photo are kept: two people may have written the same one, and scores
    are comparable only with the references as published."""

    id: str
    image: str
    captions: tuple[str, ...]
    split: str | None


@dataclass(frozen=True)
class Source:
    """The photos of a source. `faults` are (name, reason) and count against `--max-skipped`;
    `known` are defects of the published data, which are listed but not counted."""

    image_root: Path
    photos: list[Photo]
    faults: list[tuple[str, str]] = field(default_factory=list)
    known: list[tuple[str, str]] = field(default_factory=list)
    splits: str = "by the source's lists"


def read_text(path: Path) -> str:
    """Reads UTF-8, with or without byte-order mark, or UTF-16 with one, as spreadsheets write it.
    Line ends are not changed."""
    try:
        data = path.read_bytes()
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{path}: missing; SOURCE must contain it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: a NUL character; save the file as UTF-8")
    return text


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (where, line) for every line that is not blank."""
    # str.splitlines also splits at U+2028 and form feeds, which a caption may contain.
    for number, line in enumerate(re.split("\r\n|\n|\r", read_text(path)), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON object. Raises UserError naming line and column of the error."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        location = f"{where}, line {error.lineno}" if "\n" in text else where
        raise UserError(f"{location}: not JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object")
    return record


def take(record: Any, name: str, kind: type[Json], where: str) -> Json:
    """`record[name]`, which must be of type `kind`."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = {str: "a string", int: "an integer", list: "a list", dict: "an object"}
        raise UserError(f"{where}: field '{name}' must be {kinds[kind]}")
    if isinstance(value, str):
        check_unicode(value, f"{where}: field '{name}'")
    return value


def check_unicode(text: str, what: str) -> None:
    """Refuses half a surrogate pair, which JSON can encode and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} contains half a surrogate pair") from None


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (where, record) for every row below the header. Names are in lower case; names and
    values are stripped. The delimiter is the most frequent one in the header: comma, semicolon (as
    in European spreadsheets) or tab."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.lstrip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in reader:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not header:
                header = [cell.lower() for cell in cells]
                if len(set(header)) < len(header):
                    raise UserError(f"{where}: a column name occurs more than once")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} fields, but the header has {len(header)}; "
                    "a caption with a comma needs quotes"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {start}: not CSV: {error}; is a quote missing on this line?"
        ) from None


def image_name(name: str, where: str) -> str:
    """The name of a photo as in the manifest. Raises UserError if it leads out of its folder."""
    if not name.strip():
        raise UserError(f"{where}: the photo's name is empty")
    check_inside(name, f"{where}: the photo")
    check_unicode(name, f"{where}: the photo's name")
    return PurePosixPath(name).as_posix()


def locate(root: Path, images: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Finds the file below `root` for every image; also returns all files in the same folders.

    A name may differ from its file in the case of the suffix (cameras write `.JPG`) and in the
    encoding of accents (macOS writes NFD).
    """
    images = list(images)
    folders = {
        folder: _real_folder(root, folder)
        for folder in {PurePosixPath(image).parent for image in images}
    }
    files = {
        (real / name).as_posix()
        for real in folders.values()
        if real is not None
        for name in os.listdir(root / real)
    }
    by_plain_name = {_plain(name): name for name in sorted(files, reverse=True)}
    file_of = {}
    for image in images:
        real = folders[PurePosixPath(image).parent]
        name = (real / PurePosixPath(image).name).as_posix() if real is not None else image
        file = name if name in files else by_plain_name.get(_plain(name))
        if file is not None:
            file_of[image] = file
    return file_of, files


def _plain(name: str) -> str:
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    return path.with_suffix(path.suffix.lower()).as_posix()


def _real_folder(root: Path, folder: PurePosixPath) -> PurePosixPath | None:
    """The folder as it is spelled on disk; None if it does not exist."""
    real = PurePosixPath()
    for part in folder.parts:
        if not os.path.isdir(root / real / part):
            wanted = unicodedata.normalize("NFC", part)
            names = os.listdir(root / real)
            same = [name for name in names if unicodedata.normalize("NFC", name) == wanted]
            same = [name for name in same if os.path.isdir(root / real / name)]
            if not same:
                return None
            part = same[0]
        real /= part
    return real if os.path.isdir(root / real) else None


def split_name(name: str, where: str) -> str | None:
    """One of `SPLITS`; None for an empty name."""
    if not name.strip():
        return None
    try:
        return SPLIT_NAMES[name.strip().lower()]
    except KeyError:
        raise UserError(
            f"{where}: field 'split' must be one of {', '.join(SPLIT_NAMES)}, not {name!r}"
        ) from None


def split_by_hash(ids: Iterable[str]) -> dict[str, str]:
    """Assigns a split to every id (10 % val, 10 % test) that does not change when photos are added.
    If val or train would be empty, the photo with the nearest hash is moved there."""
    position = {
        key: int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8]) / 2**64
        for key in ids
    }
    ordered = sorted(position, key=lambda key: (position[key], key))
    val, test = HELD_OUT["val"], HELD_OUT["val"] + HELD_OUT["test"]
    splits = {
        key: "val" if position[key] < val else "test" if position[key] < test else "train"
        for key in ordered
    }
    if len(ordered) > 1:
        splits[ordered[0]] = "val"
    if ordered:
        splits[ordered[-1]] = "train"
    return splits


def find_file(source: Path, name: str) -> Path:
    """`name` in `source` or in a folder in it (archives often contain one); `source / name` if the
    file does not exist."""
    below = [folder / name for folder in _folders(source)]
    return next((path for path in (source / name, *below) if path.is_file()), source / name)


def find_folder(source: Path, names: Iterable[str]) -> Path:
    """The folder of the photos: one of `names`, in `source` or in a folder in it, or `source`.

    A folder that contains photos is preferred: archives often nest a second one of the same name.
    """
    names = list(names)
    folders = [
        outer / name
        for outer in (source, *_folders(source))
        for name in names
        if (outer / name).is_dir()
    ]
    for folder in (*folders, source):
        if has_photos(folder):
            return folder
    if not folders:
        raise UserError(f"{source}: no photos found; they must be in {' or '.join(names)}")
    return folders[0]


def has_photos(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(PHOTO_SUFFIXES) for entry in entries)


def _folders(source: Path) -> list[Path]:
    """The folders in `source`, except hidden ones and `__MACOSX`, which macOS adds to zips."""
    return sorted(
        path for path in source.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )
