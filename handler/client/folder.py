"""Captions a folder of photos, as JSON lines and as alternative texts in the photos.

Each row belongs to one photo and records what its caption was made from: `{"image", "bytes",
"sha256", "checkpoint", "precision", "options", "caption", "captions"}`. A run appends rows; a later
row of a photo replaces an earlier one, and at the end the file is rewritten with one row per photo.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from handler.client.alt_text import NoAltText, alternative_text, write_alt_text
from handler.client.connection import ServerError, as_text, read_file
from handler.errors import UserError
from handler.files import walk, write_atomic
from handler.image_preprocess import PHOTO_SUFFIXES, sniff

# Concurrent requests, enough to fill the server's batches.
IN_FLIGHT = 8
# So many answers in a row that no worker is free, each after all retries: there is none.
MOST_UNSERVED = 2 * IN_FLIGHT
# Reasons to caption a photo again, as the final message counts them.
CHANGED_PHOTO, OTHER_OPTIONS = "changed", "with other options"
OTHER_MODEL = "by another checkpoint or precision"
UNRECORDED, UNREADABLE = "without a record of what it was made from", "unreadable before"

T = TypeVar("T")
R = TypeVar("R")
Row = dict[str, Any]
Refused = list[tuple[str, UserError]]


def find_photos(folder: Path) -> dict[str, Path]:
    """All photos below a folder by relative path, in order: files whose suffix or content is that
    of a photo."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set IMAGES= to a folder of photos")
    files = (p for p in sorted(map(Path, walk(folder))) if p.is_file() and p.name[0] != ".")
    photos = {
        path.relative_to(folder).as_posix(): path
        for path in files
        if path.suffix.lower() in PHOTO_SUFFIXES or _starts_like_a_photo(path)
    }
    if not photos:
        raise UserError(f"{folder}: no photo there; give a folder of JPEG, PNG or other photos")
    return photos


def _starts_like_a_photo(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return sniff(file.read(32)) is not None
    except OSError:
        return False


def check_writable(path: Path) -> None:
    """Raises UserError if no file can be written to `path`, before a request is sent."""
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; give the path of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: this is a pipe or a device; give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; give another path")


# --- the file of captions


# The beginning of every row, and so of an incomplete one.
ROW_START = b'{"image": '


class CaptionFile:
    """The file of captions; `rows` contains the latest row of each photo, and `foreign` the photos
    of rows that another program or a person wrote. An incomplete last line, left by a killed run,
    is removed. Raises UserError if the file contains anything else, and leaves it unchanged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.foreign: list[str] = []
        data = read_file(path) if path.is_file() else b""
        complete = data[: data.rfind(b"\n") + 1]
        if not _is_incomplete(data[len(complete) :]):
            complete = data
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                row = json.loads(line)
                image = str(row["image"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number} has no field 'image', so it is not a file of captions; "
                    "set another OUT="
                ) from error
            self.rows[image] = row
            if not is_ours(row):
                self.foreign.append(image)
        # Unbuffered, so that closing the file cannot fail on a full disk.
        self.file = path.open("ab", buffering=0)
        self.file.truncate(len(complete))
        self.gap = b"\n" if complete and not complete.endswith(b"\n") else b""

    def __enter__(self) -> "CaptionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, row: Row) -> None:
        """Appends a complete row, or nothing if the disk is full: raises UserError then."""
        line, end = self.gap + json_line(row), self.file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(end)
            raise UserError(
                f"{self.path}: {error.strerror}; it contains the captions so far: make room "
                "and run again"
            ) from error
        self.rows[row["image"]], self.gap = row, b""

    def compact(self, photos: Iterable[str]) -> None:
        """Rewrites the file atomically with one row per photo, those of `photos` first."""
        names = dict.fromkeys(name for name in (*photos, *self.rows) if name in self.rows)
        content = b"".join(json_line(self.rows[name]) for name in names)
        if content != self.path.read_bytes():
            write_atomic(Path(os.path.realpath(self.path)), content)  # not in place of a link


def _is_incomplete(line: bytes) -> bool:
    """Whether a line without an end is the beginning of a row."""
    if line[: len(ROW_START)] != ROW_START[: len(line)]:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def is_ours(row: Row) -> bool:
    """Whether this command wrote a row, in this version or an earlier one. In the files of other
    programs, and in those for training, captions are not objects."""
    captions = row.get("captions")
    return isinstance(captions, list) and all(isinstance(caption, dict) for caption in captions)


def json_line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


# --- captions


@dataclass(frozen=True)
class FolderRequest:
    """What a run requests for each photo: `ask(photo, **options)` returns a server's answer."""

    ask: Callable[..., dict[str, Any]]
    options: dict[str, Any]
    photos: dict[str, Path]

    def row(self, name: str) -> Row | UserError:
        """The row of a photo, or the reason why it has none. Raises the errors that concern every
        photo: no server answers, it refuses an option or the key, or it does not have the model."""
        try:
            name.encode()
            photo = self.photos[name].read_bytes()
        except UnicodeEncodeError:
            return UserError("its name is not UTF-8; rename it")
        except OSError as error:
            return UserError(f"not readable ({error.strerror})")
        try:
            answer = self.ask(photo, **self.options)
        except ServerError as error:
            if error.kind in ("InvalidParameter", "InvalidKeyException") or error.code == 404:
                raise
            return error
        record = {**content_of(photo), **model_of(answer["model"])}
        record["options"] = as_text(self.options)
        return {"image": name, **record, **{f: answer[f] for f in ("caption", "captions")}}

    def difference(self, name: str, row: Row) -> str | None:
        """What has changed since `row` was written, apart from the model; None if nothing has."""
        if "sha256" not in row:
            return UNRECORDED
        try:
            content = content_of(self.photos[name].read_bytes())
        except OSError:
            return UNREADABLE  # requesting it again reports the error
        if any(row.get(field) != value for field, value in content.items()):
            return CHANGED_PHOTO
        return None if row.get("options") == as_text(self.options) else OTHER_OPTIONS


def content_of(photo: bytes) -> Row:
    return {"bytes": len(photo), "sha256": hashlib.sha256(photo).hexdigest()}


def model_of(record: Mapping[str, Any]) -> Row:
    """The fields that identify the model, from a row or from the `model` of an answer."""
    return {field: record.get(field) for field in ("checkpoint", "precision")}


def caption_folder(
    ask: Callable[..., dict[str, Any]], folder: Path, out: Path, options: dict[str, Any]
) -> Refused:
    """Writes a row to `out` for each photo below `folder`; `ask(photo, **options)` returns a
    server's answer. A photo that already has a row is captioned again if the photo, the options or
    the server's model has changed since.

    Returns the photos that could not be read or were refused, and the reasons. They get no new row,
    and a row of a former content is removed. Raises UserError if no server answers or none of its
    workers does, if it refuses an option, or if the disk is full; the rows so far are kept.
    """
    photos = find_photos(folder)
    check_writable(out)
    request = FolderRequest(ask, options, photos)
    refused: Refused = []
    with CaptionFile(out) as file:
        if file.foreign:  # of which there may be several for a photo
            raise UserError(
                f"{out}: the caption of {file.foreign[0]!r} was not written by this command; give "
                "the new captions another file"
            )
        again = differences(request, file)
        unchanged = [name for name in photos if name in file.rows and name not in again]
        with tqdm(desc="captions", unit="photo", total=len(photos), disable=None) as bar:
            unserved = 0

            def caption_all(names: Sequence[str]) -> list[Row]:
                """Appends the rows of these photos and returns them."""
                nonlocal unserved
                rows: list[Row] = []
                for name, row in zip(names, in_order(request.row, names), strict=True):
                    bar.update()
                    unserved = unserved + 1 if getattr(row, "code", None) == 503 else 0
                    if isinstance(row, ServerError) and unserved == MOST_UNSERVED:
                        raise row
                    if isinstance(row, UserError):
                        bar.write(f"{printable(folder / name)}: {row}", file=sys.stderr)
                        refused.append((name, row))
                        continue
                    file.append(row)
                    rows.append(row)
                return rows

            written = caption_all([name for name in photos if name not in set(unchanged)])
            # Only an answer names the model that is served.
            probes = (request.row(name) for name in unchanged[:IN_FLIGHT])
            answered = (row for row in chain(written[-1:], probes) if isinstance(row, dict))
            model = next(map(model_of, answered), None)
            outdated = [name for name in unchanged if model_of(file.rows[name]) != model]
            again |= dict.fromkeys(outdated, OTHER_MODEL)
            bar.update(len(unchanged) - len(outdated))
            written += caption_all(outdated)
        for name, _ in refused:
            if again.get(name) == CHANGED_PHOTO:
                del file.rows[name]
        file.compact(photos)
    print(f"{out}: {len(written)} captioned, {len(unchanged) - len(outdated)} unchanged")
    if reasons := Counter(again[row["image"]] for row in written if row["image"] in again):
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"{out}: of these, captioned again: {counts}")
    return refused


def differences(request: FolderRequest, file: CaptionFile) -> dict[str, str]:
    """The photos whose content or options have changed since their rows were written, and how."""
    names = [name for name in request.photos if name in file.rows]
    reasons = in_order(lambda name: request.difference(name, file.rows[name]), names)
    bar = tqdm(reasons, "compare", len(names), unit="photo", disable=None, delay=1)
    return {name: reason for name, reason in zip(names, bar, strict=True) if reason is not None}


def write_alt_texts(folder: Path, out: Path) -> Refused:
    """Writes the captions in `out` into the photos below `folder` that have no alternative text,
    and updates the size and hash in their rows. Returns the photos that could not store it, and the
    reasons."""
    photos = find_photos(folder)
    written = 0
    refused: Refused = []
    with CaptionFile(out) as file:
        for name in tqdm([n for n in photos if n in file.rows], desc="alt texts", disable=None):
            row = file.rows[name]
            caption = str(row.get("caption") or "")
            try:
                if write_alt_text(photos[name], caption):
                    written += 1
                    file.append(row | content_of(photos[name].read_bytes()))
                    if alternative_text(caption) != caption.strip():
                        notice = "characters that XML forbids are left out of its alternative text"
                        print(f"{printable(folder / name)}: {notice}", file=sys.stderr)
            except NoAltText as error:
                refused.append((name, error))
            except OSError as error:
                refused.append((name, UserError(error.strerror or "cannot be written")))
        file.compact(photos)
    for name, reason in refused:
        print(f"{printable(folder / name)}: {reason}", file=sys.stderr)
    print(f"{folder}: alternative text written into {written} of {len(photos)} photos")
    return refused


def in_order(call: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`map(call, items)` with IN_FLIGHT calls at a time and a bounded number of results held."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > 2 * IN_FLIGHT:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def printable(path: Path) -> str:
    """A path in which bytes that are not UTF-8 are replaced, so that any terminal can show it."""
    return str(path).encode("utf-8", "replace").decode()
