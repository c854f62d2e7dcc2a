"""The user's own photos: a folder with a CSV or JSONL file of captions.

Columns or fields: the photo (`file_name`, as in Hugging Face's imagefolder, or `image` or
`filename`), the caption (`caption` or `text`; in JSONL also a list `captions`) and optionally
`split`. A photo may have several rows with one caption each. Names of photos are relative to the
file of captions, or to `images/` beside it. Backslashes are accepted, and so are absolute paths
within the folder.

The column `split` defines the splits; a photo with an empty split is not used. Without the column,
folders named `train`, `validation`, `test` and the like define them, as in imagefolder (with one
file of captions above them, or one in each). Otherwise a hash of the photo's name does.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from handler.errors import UserError
from training.data.source import (
    HASHED,
    SPLIT_NAMES,
    Photo,
    Source,
    check_unicode,
    image_name,
    locate,
    parse_json,
    read_csv,
    read_lines,
    split_by_hash,
    split_name,
)

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_FILES = (*METADATA_FILES, "captions.jsonl", "captions.csv")
IMAGE_FIELDS = ("file_name", "image", "filename")
CAPTION_FIELDS = ("caption", "text", "captions")


def read_folder(source: Path) -> Source:
    """Reads the captions. Raises UserError naming file, line and field."""
    captions: dict[str, list[str]] = {}
    split_of: dict[str, str | None] = {}
    has_splits = False
    for path in _caption_files(source):
        below = path.parent.relative_to(source)
        for where, record in _records(path):
            name = _text(record, _field(record, IMAGE_FIELDS, where), where)
            image = image_name(_relative(name, source, below), where)
            has_splits = has_splits or "split" in record
            split = split_name(_text(record, "split", where) if record.get("split") else "", where)
            if split_of.setdefault(image, split) != split:
                raise UserError(
                    f"{where}: field 'split' puts {image} into {split}, "
                    f"an earlier line into {split_of[image]}"
                )
            captions.setdefault(image, []).extend(captions_of(record, where))

    how = "by the column 'split'"
    if not has_splits:
        outermost = {image: _outermost(PurePosixPath(image).parts) for image in captions}
        in_folders = set(outermost.values()) <= SPLIT_NAMES.keys()
        how = "by the folders' names" if in_folders else HASHED
        split_of.update(
            {image: SPLIT_NAMES[folder] for image, folder in outermost.items()}
            if in_folders
            else split_by_hash(captions)
        )
    photos = [Photo(image, image, tuple(captions[image]), split_of[image]) for image in captions]
    roots = (source, source / "images")
    there = (root for root in roots if root.is_dir() and locate(root, captions)[0])
    return Source(next(there, source), photos, splits=how)


def _outermost(parts: tuple[str, ...]) -> str:
    """The folder whose name may be a split's, within `images/` where the name begins with it."""
    return parts[1 if parts[0] == "images" and len(parts) > 2 else 0].lower()


def _relative(name: str, source: Path, below: Path) -> str:
    """Makes the name of a photo relative to the source: `name` is relative to `below`, the folder
    of the file of captions, or absolute within the source; backslashes become slashes."""
    if "\\" in name and not os.path.lexists(source / below / name):
        name = name.replace("\\", "/")
    if os.path.isabs(name):
        for root in (os.path.abspath(source), os.path.realpath(source)):
            if PurePosixPath(name).is_relative_to(root):
                return os.path.relpath(name, root)
    # An empty name stays empty: the caller refuses it.
    return (below / name).as_posix() if name.strip() and not os.path.isabs(name) else name


def _caption_files(source: Path) -> list[Path]:
    named = [source / name for name in CAPTION_FILES if (source / name).is_file()]
    # What other systems leave beside a file, such as `._captions.csv`, is hidden.
    files = named or sorted([*source.glob("[!.]*.jsonl"), *source.glob("[!.]*.csv")])
    if not files:
        files = [
            folder / name
            for folder in sorted(source.iterdir())
            for name in METADATA_FILES
            if folder.name.lower() in SPLIT_NAMES and (folder / name).is_file()
        ]
    if len({path.parent for path in files}) < max(1, len(files)):
        names = ", ".join(path.relative_to(source).as_posix() for path in files) or "none"
        raise UserError(
            f"{source}: must hold one file of captions, such as metadata.jsonl or captions.csv; "
            f"found: {names}"
        )
    return files


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        for where, record in read_csv(path):
            if not record.keys() & {*IMAGE_FIELDS, *CAPTION_FIELDS}:
                raise UserError(
                    f"{path}, line 1: the header must name the columns image and caption, but is "
                    f"{', '.join(record)[:80]!r}; insert the line image,caption above it"
                )
            yield where, record
    else:
        for where, line in read_lines(path):
            yield where, parse_json(line, where)


def captions_of(record: dict[str, Any], where: str) -> list[str]:
    """The captions of one row, from all its fields for them. null counts as an empty caption: tools
    write it for a missing one."""
    _field(record, CAPTION_FIELDS, where)
    captions: list[str] = []
    for field in CAPTION_FIELDS:
        value = record.get(field, [])
        values = value if isinstance(value, list) else [value]
        texts = ["" if one is None else _text({field: one}, field, where) for one in values]
        if any(text.strip() for text in captions):
            captions += [text for text in texts if text.strip() and text not in captions]
        else:
            captions = texts or captions
    return captions


def has_caption(record: dict[str, Any]) -> bool:
    """Whether a caption field holds more than null, blanks or an empty list."""
    values = [record[name] for name in CAPTION_FIELDS if name in record]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _field(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in record:
            return name
    fields = ", ".join(map(repr, record))[:80] or "none"
    raise UserError(f"{where}: no field named {' or '.join(names)}; the fields are {fields}")


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' must be a string")
    check_unicode(value, f"{where}: field '{field}'")
    return value
