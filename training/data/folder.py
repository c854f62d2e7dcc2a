"""The user's own photographs: a folder with one CSV or JSONL file of captions.

Columns or fields: the photo (`file_name`, as in Hugging Face's imagefolder, or `image`,
`filename`), the caption (`caption` or `text`; in JSONL a list `captions` too) and, if wanted,
`split`. A photo may stand in several rows, one caption each. Without a split column, a hash of the
photo's name makes the splits; with one, a photo whose split is empty is not used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from handler.errors import UserError
from training.data.source import (
    HASHED,
    Photo,
    Source,
    image_name,
    parse_json,
    read_csv,
    read_lines,
    split_by_hash,
    split_name,
)

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
IMAGE_FIELDS = ("file_name", "image", "filename")
CAPTION_FIELDS = ("caption", "text", "captions")


def read_folder(source: Path) -> Source:
    """Reads the captions; photos are named relative to the folder. Raises UserError naming file,
    line and field."""
    captions: dict[str, list[str]] = {}
    split_of: dict[str, str | None] = {}
    has_splits = False
    for where, record in _records(_caption_file(source)):
        image = image_name(_text(record, _field(record, IMAGE_FIELDS, where), where), where)
        field = _field(record, CAPTION_FIELDS, where)
        if isinstance(record[field], list):
            texts = [_text({field: text}, field, where) for text in record[field]]
        else:
            texts = [_text(record, field, where)]
        has_splits = has_splits or "split" in record
        split = split_name(_text(record, "split", where), where) if record.get("split") else None
        if split_of.setdefault(image, split) != split:
            raise UserError(
                f"{where}: field 'split' puts {image} into {split}, "
                f"an earlier line into {split_of[image]}"
            )
        captions.setdefault(image, []).extend(texts)
    splits = split_of if has_splits else split_by_hash(captions)
    photos = [Photo(image, image, tuple(captions[image]), splits[image]) for image in captions]
    return Source(source, photos, splits="by the column 'split'" if has_splits else HASHED)


def _caption_file(source: Path) -> Path:
    named = [source / name for name in CAPTION_FILES if (source / name).is_file()]
    files = named or sorted([*source.glob("*.jsonl"), *source.glob("*.csv")])
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"{source}: must hold one file of captions, such as metadata.jsonl or captions.csv; "
            f"found: {found}"
        )
    return files[0]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        yield from read_csv(path)
    else:
        for where, line in read_lines(path):
            yield where, parse_json(line, where)


def _field(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in record:
            return name
    raise UserError(f"{where}: no field named {' or '.join(names)}")


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' must be a text")
    return value
