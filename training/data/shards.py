"""Shards in the webdataset format: plain tars in which a photo and its captions stand side by side
under one key, `000123.jpg` and `000123.json` (`.txt`: captions alone, one a line).

They are read where they lie, in a folder or on a server, never unpacked. One pass finds where in
its tar every photo begins and ends; from then on each is read by itself, in any order, so that
order, sharing among processes and resuming are those of photos in a folder. (The package
`webdataset` reads a stream instead, whose place it cannot restore with several workers.)

Captions are in the fields that `training.data.folder` knows; `id`, `split` and `scene` are taken
where they are given, as `training.shards` writes them.
"""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from handler.errors import UserError
from handler.image_preprocess import MAX_BYTES, PHOTO_SUFFIXES, InvalidImage, decode
from training.data.folder import CAPTION_FIELDS, captions_of, has_caption
from training.data.manifest import is_url
from training.data.member import is_header
from training.data.ranged import RangedFile
from training.data.source import (
    SPLIT_NAMES,
    Photo,
    check_unicode,
    image_name,
    parse_json,
    split_name,
    take,
)
from training.data.tar import BLOCK, DamagedTar, Entry, read_entries

CAPTION_SUFFIXES = (".json", ".txt")
READ_AHEAD = 4 * 2**20  # bytes a request, when a whole shard is read from a server


@dataclass(frozen=True)
class Member:
    """A file within a tar and its bytes, of a larger one than a photo may be only the first."""

    entry: Entry
    content: bytes


class RepeatedKey(UserError):
    """A key that a shard holds twice."""

    def __init__(self, key: str, entry: Entry) -> None:
        super().__init__(
            f"key {key!r} occurs a second time, with {entry.name!r} at byte "
            f"{entry.offset - BLOCK}; a shard must hold every key once, its members side by side"
        )


@dataclass(frozen=True)
class ShardPhoto:
    """A photo as its shard tells of it, and where in the tar its bytes are: (offset, length)."""

    shard: str
    photo: Photo
    span: tuple[int, int]
    scene: dict[str, Any] | None


def find_shards(source: str) -> tuple[Path | str, list[str]]:
    """The folder or URL below which shards lie, and their names: every tar of a folder, or those of
    URLs such as `https://host/coco-{000000..000112}.tar`, several of them divided by `::`, as
    webdataset writes them."""
    if not is_url(source):
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; SOURCE must name the one with the shards")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
        if not names:
            raise UserError(f"{folder}: no .tar in it; SOURCE must name the folder with the shards")
        return folder, names
    urls = [url for part in re.split("::(?=https?://)", source) for url in _expand(part)]
    for url in urls:
        if not url.endswith(".tar"):
            raise UserError(f"{url}: must name shards, https://host/name-{{000000..000112}}.tar")
    root = os.path.commonprefix([url.rpartition("/")[0] + "/" for url in urls]).rpartition("/")[0]
    if not root.partition("://")[2]:
        raise UserError(f"{source}: the shards must lie on one server")
    return root, [url.removeprefix(root + "/") for url in urls]


def _expand(pattern: str) -> Iterator[str]:
    """`{08..10}` counted out: 08, 09, 10."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found[1], found[2]
    for number in range(int(first), int(last) + 1):
        for rest in _expand(pattern[found.end() :]):
            yield pattern[: found.start()] + str(number).zfill(len(first)) + rest


def read_shard(root: Path | str, shard: str) -> tuple[list[ShardPhoto], list[tuple[str, str]]]:
    """Reads a shard once from front to back, and decodes every photo.

    Returns its photos and the faults (name, reason) of those that cannot be used. Raises UserError
    naming the shard where it is no whole tar or holds a key twice.
    """
    place = f"{root}/{shard}" if isinstance(root, str) else root / shard
    photos: list[ShardPhoto] = []
    faults: list[tuple[str, str]] = []
    try:
        with _open(place) as file:
            for key, members in _samples(file, _size(file)):
                try:
                    photos.append(_read_sample(shard, key, members))
                except UserError as error:
                    faults.append((f"{shard}/{key}", str(error)))
    except DamagedTar as error:
        raise UserError(f"{place}: no whole tar ({error}); copy the shard again") from None
    except RepeatedKey as error:
        raise UserError(f"{place}: {error}") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}") from None
    return photos, faults


def _open(place: Path | str) -> BinaryIO:
    if isinstance(place, str):
        return io.BufferedReader(RangedFile(place), READ_AHEAD)
    if not place.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{place}: this is not a file")
    return open(place, "rb")


def _size(file: Any) -> int:
    """Of the whole, in bytes."""
    if isinstance(file.raw, RangedFile):
        file.peek(1)
        return file.raw.size or 0
    return os.fstat(file.fileno()).st_size


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, members by suffix): members in a row whose names are the same up to the first dot of
    the last part belong together. Raises RepeatedKey for a second sample of the same key, or a
    second member of the same suffix: whose caption it is cannot be known."""
    current, members = "", dict[str, Member]()
    ended = set[str]()
    for entry in read_entries(file, size):
        folder, slash, name = entry.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        kind = dot + suffix.lower()
        if not stem or kind not in (*PHOTO_SUFFIXES, *CAPTION_SUFFIXES):
            continue
        key = folder + slash + stem
        if key != current:
            if members:
                ended.add(current)
                yield current, members
            current, members = key, {}
        if key in ended or kind in members:
            raise RepeatedKey(key, entry)
        file.seek(entry.offset)
        content = file.read(min(entry.size, MAX_BYTES + 1))
        if len(content) < min(entry.size, MAX_BYTES + 1):
            raise DamagedTar(entry.offset, f"cut off within {entry.name}")
        members[kind] = Member(entry, content)
    if members:
        yield current, members


def _read_sample(shard: str, key: str, members: dict[str, Member]) -> ShardPhoto:
    """A sample's photo and captions; UserError says what is wrong with it."""
    suffix = next((s for s in PHOTO_SUFFIXES if s in members), None)
    if suffix is None:
        raise UserError("has no photo")
    if not any(s in members for s in CAPTION_SUFFIXES):
        raise UserError("photo has no captions (.json or .txt)")
    entry, content = members[suffix].entry, members[suffix].content
    if not is_header(entry.header, entry.name, entry.size):
        raise UserError("name is too long or not in the form of a plain tar (ustar)")
    kind = CAPTION_SUFFIXES[0] if CAPTION_SUFFIXES[0] in members else CAPTION_SUFFIXES[1]
    record = _read_record(members)
    captions = tuple(captions_of(record, kind))
    for caption in captions:
        check_unicode(caption, f"{kind}: the caption")
    name, scene = record.get("id"), record.get("scene")
    split = take(record, "split", str, kind) if record.get("split") else ""
    try:
        decode(content)
    except InvalidImage as error:
        raise UserError(str(error)) from None
    # A key is unique within its shard alone.
    return ShardPhoto(
        shard,
        Photo(
            name if isinstance(name, str) and name.strip() else f"{shard}/{key}",
            image_name(f"{shard}/{entry.name}", shard),
            captions,
            split_name(split, kind),
        ),
        (entry.offset, entry.size),
        scene if isinstance(scene, dict) else None,
    )


def _read_record(members: dict[str, Member]) -> dict[str, Any]:
    """The fields of a sample's `.json`; the captions are those of its `.txt`, one a line, where
    there is no `.json` or it has none."""
    record: dict[str, Any] = {}
    if ".json" in members:
        record = parse_json(_text(members, ".json"), ".json")
    if ".txt" in members and not has_caption(record):
        fields = {name: value for name, value in record.items() if name not in CAPTION_FIELDS}
        lines = [line for line in re.split("[\r\n]", _text(members, ".txt")) if line.strip()]
        record = {**fields, "captions": lines or [""]}
    return record


def _text(members: dict[str, Member], kind: str) -> str:
    try:
        return members[kind].content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{kind} is not UTF-8") from None


def split_of_shards(shards: list[str]) -> dict[str, str] | None:
    """The split of each shard where every name says one (`cc3m-train-0000.tar`) and they say more
    than one."""
    said = {
        shard: {SPLIT_NAMES[w] for w in re.split("[^a-z]+", shard.lower()) if w in SPLIT_NAMES}
        for shard in shards
    }
    if any(len(splits) != 1 for splits in said.values()):
        return None
    found = {shard: next(iter(splits)) for shard, splits in said.items()}
    return found if len(set(found.values())) > 1 else None
