"""Finds the photos of a job, cuts them into shards, and reads the photos of a shard.

A source is anything that fsspec opens: a folder or glob of photos, webdataset tars, or Parquet
files. Each tar and each row group is one shard; the photos of a folder are cut into shards of
`PHOTOS` each.
"""

import itertools
import os
import re
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from handler.errors import UserError
from handler.files import as_utf8, expand_range, walk
from handler.image_preprocess import MAX_BYTES
from handler.request import MissingImage

# Photos per shard of a folder. A shard is repeated when its worker dies; it takes about a minute.
PHOTOS = 256
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
PACKED_SUFFIXES = (".tar", ".parquet")
PARQUET_ROWS = 64  # rows of a row group that are read at once
PARQUET_BUFFER = 2**20
WAITS_S = (1.0, 4.0)  # before each retry of a photo that could not be fetched
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
# fsspec reads these through another URL, which follows after "::".
CHAIN = re.compile(r"(^|::)((zip|tar|libarchive)://|(simple|file|block)cache::)")
WHOLE = -1  # the row group of a shard that is a whole Parquet file


@dataclass(frozen=True)
class Shard:
    """One unit of work. `address` is unique in its job; `url` is the tar, the Parquet file or the
    folder; `row_group` (or WHOLE) belongs to Parquet, `photos` (paths relative to `url`) to a
    folder."""

    address: str
    kind: str
    url: str
    row_group: int = 0
    photos: tuple[str, ...] = ()


@dataclass(frozen=True)
class Photo:
    """A photo's id and content: its bytes, the URL to fetch them from, or why it has none."""

    id: str
    content: bytes | str | Exception

    @property
    def is_remote(self) -> bool:
        return isinstance(self.content, str) and bool(URL.match(self.content))

    def fetch(self) -> bytes | Exception:
        """The bytes, of which at most MAX_BYTES + 1 are read, or why the photo has none."""
        return _content(self.content) if isinstance(self.content, str) else self.content


def absolute(url: str) -> str:
    """Makes a local path absolute, so that a job does not depend on its working directory."""
    return url if URL.match(url) else str(Path(url).absolute())


def parts(source: str) -> list[str]:
    """The parts of a `::` list."""
    return re.split(r"::(?=/|\.|[a-z][a-z0-9+.-]*://)", source)


def expand(source: str) -> list[str]:
    """The files, folders and URLs of a `::` list, with ranges such as `{000..112}` expanded."""
    return [absolute(url) for part in parts(source) for url in expand_range(part)]


def find(source: str, out: str = "", first: bool = True) -> tuple[list[Shard], str, list[str]]:
    """Returns the shards of a source of tars or Parquet files, or the root of a folder and the
    photos below it. What lies below `out` does not belong to the source. Raises UserError if there
    are both kinds, and at the `first` start of a job if the source or a part of a list has none."""
    if CHAIN.search(source):
        raise UserError(
            f"{source}: archives and caches cannot be read through another URL; unpack the photos, "
            "or pack them into .tar files"
        )
    found: list[str] = []
    for part in parts(source):
        here: list[str] = []
        for url in map(absolute, expand_range(part)):
            files = _wanted(url, out)
            if first and not files:
                raise UserError(
                    f"{url}: no photos, .tar or .parquet files there; set --source to a folder, a "
                    "glob or a list of them"
                )
            here += files
        # A shard that is missing from a range is told as a failed one; a name alone is mistyped.
        if first and not any(URL.match(file) or os.path.lexists(file) for file in here):
            raise UserError(f"{part}: does not exist; correct --source")
        found += here
    packed = [file for file in found if file.endswith(PACKED_SUFFIXES)]
    photos = [file for file in found if not file.endswith(PACKED_SUFFIXES)]
    if packed and photos:
        raise UserError(
            f"{source}: contains photos and {packed[0]}; select one kind, such as FOLDER/**/*.jpg"
        )
    if packed:
        return [shard for url in dict.fromkeys(packed) for shard in _packed(url)], "", []
    if len({bool(URL.match(photo)) for photo in photos}) > 1:
        raise UserError(f"{source}: contains local photos and URLs; caption them into two folders")
    root = _root(source, photos)
    return [], root, sorted({photo.removeprefix(root).lstrip("/") for photo in photos})


def _wanted(url: str, out: str) -> list[str]:
    """The photos, tars and Parquet files that a URL names, without those below `out`."""
    is_remote = bool(URL.match(url))
    folder = (_canonical(out) if URL.match(out) else os.path.realpath(out)) if out else ""

    @cache
    def is_output(parent: str) -> bool:
        parent = parent if is_remote else os.path.realpath(parent)
        return f"{parent}/".startswith(f"{folder.rstrip('/')}/")

    return [
        file
        for file in _files(url)
        if (file.endswith(PACKED_SUFFIXES) or _is_photo(file))
        and not (folder and is_output(file.rpartition("/")[0]))
    ]


def _is_photo(name: str) -> bool:
    """By its name. macOS puts a file `._NAME` with attributes beside each photo."""
    is_attributes = name.rpartition("/")[2].startswith("._")
    return name.lower().endswith(PHOTO_SUFFIXES) and not is_attributes


def needs_network(source: str) -> bool:
    """Whether the source is a URL, or the first paths in one of its Parquet files are URLs."""
    if URL.search(source):
        return True
    files = (file for url in expand(source) for file in _files(url))
    return any(names_urls(file) for file in files if file.endswith(".parquet"))


def names_urls(file: str) -> bool:
    """Whether there are URLs among the first paths of a Parquet file."""
    try:
        with pq.ParquetFile(file) as table:
            image = table.schema_arrow.field("image").type
            column = "image.path" if pa.types.is_struct(image) else "image"
            if pa.types.is_binary(image) or pa.types.is_large_binary(image):
                return False
            few = next(table.iter_batches(PARQUET_ROWS, columns=[column]), None)
            rows = few.to_pylist() if few else []
    except (OSError, ValueError, KeyError):
        return False  # captioning the shard reports what is wrong with the file
    cells = (row["image"] for row in rows)
    paths = (cell.get("path") if isinstance(cell, dict) else cell for cell in cells)
    return any(isinstance(path, str) and URL.match(path) for path in paths)


def _root(source: str, photos: list[str]) -> str:
    """The folder that ids are relative to: the source itself, the fixed part of a glob, or the
    common part of a list. It does not depend on which photos exist, so that their ids are stable.
    """
    folders = []
    for url in map(_canonical, expand(source)):
        fixed = re.split(r"[*?\[]", url)[0] if _is_glob(url) else url
        is_whole = fixed == url and url not in photos
        folders.append((fixed.rstrip("/") if is_whole else fixed.rpartition("/")[0]).split("/"))
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in shared)


def _canonical(url: str) -> str:
    """A URL as its filesystem writes it (`memory://x` as `memory:///x`), which paths begin with."""
    if not URL.match(url):
        return url
    system, path = fsspec.url_to_fs(url)
    return system.unstrip_protocol(path)


def _is_glob(url: str) -> bool:
    """Whether a URL is a pattern: an existing folder or file may have brackets in its name."""
    return bool(re.search(r"[*?\[]", url)) and (bool(URL.match(url)) or not os.path.exists(url))


def _files(url: str) -> list[str]:
    """The files that a URL names, as URLs of the same kind."""
    try:
        system, path = fsspec.url_to_fs(url) if URL.match(url) else (fsspec.filesystem("file"), url)
        if _is_glob(url):
            paths = [path for path in system.glob(path) if system.isfile(path)]
        elif url.lower().endswith((".tar", ".parquet", *PHOTO_SUFFIXES)) and not system.isdir(path):
            paths = [path]
        elif URL.match(url):
            paths = system.find(path)
        else:
            paths = list(walk(path))
    except Exception as error:  # each filesystem has its own exception types
        raise UserError(f"{url}: {error}") from error
    return [system.unstrip_protocol(path) if URL.match(url) else path for path in sorted(paths)]


def _open(url: str) -> IO[bytes]:
    """Opens a URL or a local file, in whose name fsspec would read "::" as a chain of URLs."""
    if not URL.match(url):
        return open(url, "rb")
    opened: IO[bytes] = fsspec.open(url).open()
    return opened


def _packed(url: str) -> list[Shard]:
    if url.endswith(".tar"):
        return [Shard(url, "tar", url)]
    try:
        with _open(url) as file:
            groups = pq.ParquetFile(file).num_row_groups
    except Exception:  # each filesystem has its own exception types
        # Captioning the shard reports what is wrong, and takes all its row groups if nothing is.
        return [Shard(url, "parquet", url, WHOLE)]
    return [Shard(f"{url}#{group}", "parquet", url, group) for group in range(groups)]


def cut(root: str, photos: list[str], first: int = 0) -> list[Shard]:
    """Cuts the photos of a folder into shards of equal size, numbered from `first`."""
    return [
        Shard(f"{root}#{first + index}", "folder", root, photos=tuple(photos[start:][:PHOTOS]))
        for index, start in enumerate(range(0, len(photos), PHOTOS))
    ]


def read(shard: Shard) -> Iterator[Photo]:
    """Yields the photos of a shard in order; the second photo of an id `a` gets the id `a#2`.
    Raises UserError, OSError or ValueError if the shard as a whole cannot be read."""
    counts: dict[str, int] = {}
    read_kind = {"tar": _read_tar, "parquet": _read_parquet, "folder": _read_folder}[shard.kind]
    try:
        for photo in read_kind(shard):
            name = as_utf8(photo.id)
            count = counts[name] = counts.get(name, 0) + 1
            yield Photo(f"{name}#{count}" if count > 1 else name, photo.content)
    except (OSError, ValueError):
        raise
    except Exception as error:  # each filesystem has its own exception types
        raise UserError(f"{type(error).__name__}: {error}") from error


def _read_folder(shard: Shard) -> Iterator[Photo]:
    for name in shard.photos:
        yield Photo(name, f"{shard.url}/{name}")


def _content(url: str) -> bytes | Exception:
    is_remote = URL.match(url)
    for wait_s in (*WAITS_S, None):
        try:
            with _open(url) as file:
                return file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return MissingImage("the photo is no longer there")
        except Exception as error:  # each filesystem has its own exception types
            if wait_s is None or not is_remote:
                return MissingImage(f"the photo cannot be read ({error})")
            time.sleep(wait_s)
    raise AssertionError


LINK = (
    "the tar holds a link to {} instead of this photo; pack it with "
    "tar --dereference --hard-dereference"
)


class StrictTarInfo(tarfile.TarInfo):
    """tarfile treats any damaged header after the first as the end of the tar, so that all later
    members would be lost silently. Here only the block of zeros that ends every tar does so."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise UserError(f"the tar is damaged or incomplete ({error})") from error
        if info.size < 0:
            raise UserError(f"the tar is damaged (negative size of {info.name})")
        return info


def _read_tar(shard: Shard) -> Iterator[Photo]:
    """Reads the tar once, as a stream."""
    try:
        with (
            _open(shard.url) as file,
            tarfile.open(fileobj=file, mode="r|", tarinfo=StrictTarInfo) as tar,
        ):
            for member in tar:
                # It would hold half a gigabyte for a million photos.
                tar.members = []  # type: ignore[attr-defined]
                if not _is_photo(member.name):
                    continue
                if member.isfile():
                    yield Photo(member.name, _member(tar, member))
                elif member.islnk() or member.issym():
                    yield Photo(member.name, MissingImage(LINK.format(member.linkname)))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"the tar is damaged or incomplete ({error})") from error


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream: IO[bytes] | None = tar.extractfile(member)
    wanted = min(member.size, MAX_BYTES + 1)
    content = stream.read(wanted) if stream else b""
    if len(content) < wanted:
        raise UserError(f"the tar is cut off within {member.name}")
    return content


def _read_parquet(shard: Shard) -> Iterator[Photo]:
    with _open(shard.url) as file:
        # Page by page: a row group of thousands of photos may not fit into memory.
        table = pq.ParquetFile(file, buffer_size=PARQUET_BUFFER, pre_buffer=False)
        columns = table.schema_arrow.names
        if "image" not in columns:
            raise UserError(f"no column 'image'; the columns are {', '.join(columns)}")
        wanted = [name for name in ("id", "image") if name in columns]
        groups = None if shard.row_group == WHOLE else [shard.row_group]
        rows = table.iter_batches(PARQUET_ROWS, row_groups=groups, columns=wanted)
        index = 0
        for batch in rows:
            for row in batch.to_pylist():
                photo_id, content = _cell(row, shard)
                yield Photo(photo_id or f"{shard.address}/{index}", content)
                index += 1


def _cell(row: dict[str, Any], shard: Shard) -> tuple[str, bytes | str | Exception]:
    """The id of a row ("" if it has none) and the content of its `Photo`."""
    image = row["image"]
    path = image.get("path") if isinstance(image, dict) else image
    content = image.get("bytes") if isinstance(image, dict) else image
    name = row.get("id")
    if name is None:
        name = path if isinstance(path, str) else ""
    if isinstance(content, bytes):
        return str(name), content[: MAX_BYTES + 1]
    if not isinstance(path, str) or not path:
        return str(name), MissingImage("the column 'image' holds no photo in this row")
    is_full = URL.match(path) or path.startswith("/")
    return str(name), path if is_full else f"{shard.url.rpartition('/')[0]}/{path}"
