"""Shards in the webdataset format: plain tars in which a photo and its captions follow each other
under one key, such as `000123.jpg` and `000123.json` (or `.txt`: only captions, one per line).

They are read in place, in a folder or on a server, and never unpacked. One pass finds the offset
of every photo in its tar. After that, each photo is read separately and in any order, so that
shuffling, distribution over processes and resuming work as for photos in a folder. (The package
`webdataset` reads a stream instead, whose position it cannot restore with several workers.)

Captions are in the same fields as in `training.data.folder`. The optional fields `id`, `split` and
`scene` are those that `training.shards` writes.
"""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from handler.errors import UserError
from handler.files import expand_range
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
DOTTED = "a dot in the name: a sample's key ends at the first one; rename it"
READ_AHEAD = 4 * 2**20  # bytes per request when a whole shard is read from a server


@dataclass(frozen=True)
class Member:
    """A file within a tar and its first `MAX_BYTES` + 1 bytes: a photo may not be larger."""

    entry: Entry
    content: bytes


class RepeatedKey(UserError):
    """A key occurs twice in a shard."""

    def __init__(self, key: str, entry: Entry) -> None:
        super().__init__(
            f"key {key!r} occurs a second time, with {entry.name!r} at byte "
            f"{entry.offset - BLOCK}; a shard must have every key once, its members side by side"
        )


@dataclass(frozen=True)
class ShardPhoto:
    """A photo as its shard describes it, and its bytes in the tar: (offset, length)."""

    shard: str
    photo: Photo
    span: tuple[int, int]
    scene: dict[str, Any] | None


def find_shards(source: str) -> tuple[Path | str, list[str]]:
    """The folder or URL that contains the shards, and their names. `source` is a folder, of which
    every tar is a shard, or URLs as in webdataset: `https://host/coco-{000000..000112}.tar`,
    several of them separated by `::`."""
    if not is_url(source):
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; SOURCE must be the folder of the shards")
        below = (path.relative_to(folder) for path in folder.rglob("*.tar"))
        hidden = re.compile(r"(^|/)\.")  # such as `._a.tar`, which is no tar
        names = sorted(name for name in map(Path.as_posix, below) if not hidden.search(name))
        if not names:
            raise UserError(f"{folder}: contains no .tar; SOURCE must be the folder of the shards")
        return folder, names
    urls = [url for part in re.split("::(?=https?://)", source) for url in expand_range(part)]
    for url in urls:
        if not url.endswith(".tar"):
            raise UserError(f"{url}: not a shard; give https://host/name-{{000000..000112}}.tar")
    root = os.path.commonprefix([url.rpartition("/")[0] + "/" for url in urls]).rpartition("/")[0]
    if not root.partition("://")[2]:
        raise UserError(f"{source}: all shards must be on one server")
    return root, [url.removeprefix(root + "/") for url in urls]


def read_shard(root: Path | str, shard: str) -> tuple[list[ShardPhoto], list[tuple[str, str]]]:
    """Reads a shard once from front to back and decodes every photo.

    Returns its photos and the faults (name, reason) of those that cannot be used. Raises UserError
    naming the shard if it is not a complete tar or contains a key twice.
    """
    location = f"{root}/{shard}" if isinstance(root, str) else root / shard
    photos: list[ShardPhoto] = []
    faults: list[tuple[str, str]] = []
    try:
        with _open(location) as file:
            for key, members in _samples(file, _size(file)):
                if not members:
                    faults.append((f"{shard}/{key}", DOTTED))
                    continue
                try:
                    photos.append(_read_sample(shard, key, members))
                except UserError as error:
                    faults.append((f"{shard}/{key}", str(error)))
    except DamagedTar as error:
        raise UserError(f"{location}: not a complete tar ({error}); copy the shard again") from None
    except RepeatedKey as error:
        raise UserError(f"{location}: {error}") from None
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from None
    return photos, faults


def _open(location: Path | str) -> BinaryIO:
    if isinstance(location, str):
        return io.BufferedReader(RangedFile(location), READ_AHEAD)
    if not location.is_file():  # opening a pipe would never return
        raise UserError(f"{location}: this is not a file")
    return open(location, "rb")


def _size(file: Any) -> int:
    """The size of the whole file in bytes."""
    if isinstance(file.raw, RangedFile):
        file.peek(1)
        return file.raw.size or 0
    return os.fstat(file.fileno()).st_size


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yields (key, members by suffix), at the end (name, {}) for each photo whose name has a dot
    before its suffix and which belongs to no sample. Consecutive members belong to one sample if
    their names are equal up to the first dot of the last part. Raises RepeatedKey for a second
    sample with the same key and for a second member with the same suffix, because its captions
    cannot be assigned."""
    current, members = "", dict[str, Member]()
    ended = set[str]()
    dotted: list[tuple[str, str]] = []
    for entry in read_entries(file, size):
        folder, slash, name = entry.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        kind = dot + suffix.lower()
        key = folder + slash + stem
        if not stem or kind not in (*PHOTO_SUFFIXES, *CAPTION_SUFFIXES):
            if stem and kind.endswith(PHOTO_SUFFIXES):
                dotted.append((key, entry.name))
            continue
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
        ended.add(current)
        yield current, members
    # Some datasets put further pictures beside a photo, such as key.mask.png.
    yield from ((name, {}) for key, name in dotted if key not in ended)


def _read_sample(shard: str, key: str, members: dict[str, Member]) -> ShardPhoto:
    """The photo and captions of a sample. Raises UserError with the reason if it is unusable."""
    suffix = next((s for s in PHOTO_SUFFIXES if s in members), None)
    if suffix is None:
        raise UserError("has no photo")
    if not any(s in members for s in CAPTION_SUFFIXES):
        raise UserError("photo has no captions (.json or .txt)")
    entry, content = members[suffix].entry, members[suffix].content
    if not is_header(entry.header, entry.name, entry.size):
        raise UserError("name is too long, or not in the ustar format of a plain tar")
    kind = CAPTION_SUFFIXES[0] if CAPTION_SUFFIXES[0] in members else CAPTION_SUFFIXES[1]
    record = _read_record(members)
    captions = tuple(captions_of(record, kind))
    for caption in captions:
        check_unicode(caption, f"{kind}: the caption")
    name, scene = record.get("id"), record.get("scene")
    check_unicode(str(name), f"{kind}: field 'id'")
    split = take(record, "split", str, kind) if record.get("split") else ""
    try:
        decode(content)
    except InvalidImage as error:
        raise UserError(str(error)) from None
    # A key is unique only within its shard.
    return ShardPhoto(
        shard,
        Photo(
            name if isinstance(name, str) and name.strip() else f"{shard}/{key.lstrip('/')}",
            image_name(f"{shard}/{entry.name.lstrip('/')}", shard),
            captions,
            split_name(split, kind),
        ),
        (entry.offset, entry.size),
        scene if isinstance(scene, dict) else None,
    )


def _read_record(members: dict[str, Member]) -> dict[str, Any]:
    """The fields of a sample's `.json`. If it has no captions, or there is no `.json`, the captions
    are the lines of the `.txt`."""
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
    """The split of each shard by its name (`cc3m-train-0000.tar`); None if a name contains no or
    several splits, or all contain the same one."""
    named = {
        shard: {SPLIT_NAMES[w] for w in re.split("[^a-z]+", shard.lower()) if w in SPLIT_NAMES}
        for shard in shards
    }
    if any(len(splits) != 1 for splits in named.values()):
        return None
    split_of = {shard: next(iter(splits)) for shard, splits in named.items()}
    return split_of if len(set(split_of.values())) > 1 else None
