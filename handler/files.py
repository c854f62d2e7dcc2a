"""Writes files and folders atomically, and reads JSON with errors that name the file."""

import fcntl
import glob
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from handler.errors import UserError

# The value of `"format"` in every marker file. It is increased when a change to the files of a
# folder would mislead older versions.
FORMAT = 1


@dataclass(frozen=True)
class FolderKind:
    """Describes the folders that one command writes, so that it never replaces any other folder.

    `name` is used in messages ("an export"). `marker` is a JSON file that identifies the kind by
    its `fields`, which no other kind has. `files` are patterns (fnmatch) for the names of all files
    at the top of the folder, including the marker. A file of `sure` identifies the kind by its name
    alone.
    """

    name: str
    marker: str
    fields: tuple[str, ...]
    files: tuple[str, ...]
    sure: tuple[str, ...] = ()


def expand_range(pattern: str) -> Iterator[str]:
    """Expands `{08..10}` in a name or URL to 08, 09, 10, as webdataset does. Raises UserError if
    the first number is the higher one."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match[1], match[2]
    if int(first) > int(last):
        raise UserError(f"{pattern}: the range {match[0]} is empty; write the lower number first")
    for number in range(int(first), int(last) + 1):
        for rest in expand_range(pattern[match.end() :]):
            yield pattern[: match.start()] + str(number).zfill(len(first)) + rest


def check_apart(out: Path, inputs: Iterable[Path | str]) -> None:
    """Raises UserError if `out` is one of the `inputs`, or above or below one."""
    real = Path(os.path.realpath(out))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if real == source or real in source.parents or source in real.parents:
            where = "is" if real == source else "is above" if real in source.parents else "is below"
            raise UserError(f"{out}: the output {where} the input {path}; choose another folder")


def check_replaceable(out: Path, kind: FolderKind, inputs: Iterable[Path | str] = ()) -> None:
    """Raises UserError unless `out` is missing, empty, or a folder of this `kind` without any other
    files, and if it is one of the `inputs`, or above or below one."""
    check_apart(out, inputs)
    real = Path(os.path.realpath(out))
    if not real.exists():
        return
    if not real.is_dir():
        raise UserError(f"{out}: this is a file; {kind.name} needs a folder")
    names = sorted(entry.name for entry in real.iterdir())
    if not names:
        return
    if not any(name in kind.sure for name in names) and not _is_marked(real / kind.marker, kind):
        raise UserError(
            f"{out}: the folder is not empty and is not {kind.name}; choose another folder"
        )
    foreign = [name for name in names if not any(fnmatch(name, p) for p in kind.files)]
    if foreign:
        raise UserError(
            f"{out}: {foreign[0]!r} is not part of {kind.name}; move it elsewhere, or choose "
            "another folder"
        )


def _is_marked(marker: Path, kind: FolderKind) -> bool:
    try:
        content = read_json(marker)
    except UserError:
        return False
    return isinstance(content, dict) and all(field in content for field in kind.fields)


@contextmanager
def replace_folder(
    out: Path, kind: FolderKind, inputs: Iterable[Path | str] = ()
) -> Iterator[Path]:
    """Yields a new folder, which replaces `out` when the block ends without an exception. After an
    exception it is removed, and `out` is unchanged.

    Raises UserError if `out` must not be replaced (see `check_replaceable`) or if another process
    is writing it.
    """
    inputs = list(inputs)
    real = Path(os.path.realpath(out))
    check_replaceable(out, kind, inputs)
    with locked(out):
        new, old = (real.with_name(f".{real.name}.{state}") for state in ("new", "old"))
        # Left by a killed process: because of the lock, no other process is using them.
        if old.exists() and not real.exists():
            old.rename(real)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            try:
                yield new
            except OSError as error:
                error.filename = error.filename or str(out)  # a full disk has no name
                raise
            check_replaceable(out, kind, inputs)
            if real.exists():
                real.rename(old)
            try:
                new.rename(real)
            except BaseException:
                if old.exists():
                    old.rename(real)
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if real.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks `path` (a file or folder, which need not exist) for this process, with a lock file in
    the same folder. The lock ends with the process. Raises UserError if another process holds it.
    """
    real = Path(os.path.realpath(path))
    lock = real.with_name(f".{real.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{path}: another process is writing it; wait until it has ended"
            ) from None
        # The previous holder may have removed the file between our open and our lock.
        if lock.exists() and os.path.samestat(os.stat(lock), os.fstat(handle)):
            break
        os.close(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a temporary file and renames it, so that a reader never sees an incomplete file."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields the path of an empty file, which replaces `path` and gets its permissions when the
    block ends without an exception. After an exception it is removed, and `path` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates private files. The umask can only be read by setting it.
        umask = os.umask(0)
        os.umask(umask)
        usual = 0o666 & ~umask
        temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else usual)
        # Otherwise a power cut soon after the rename can leave an empty file.
        _write_out(temporary)
        temporary.replace(path)
        with suppress(OSError):  # not every file system can do it for a folder
            _write_out(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Removes what `atomic_path` had begun to write for the files `names` of a folder when its
    process was killed. No other process may be writing them."""
    for name in names:
        for path in folder.glob(f".{glob.escape(name[:50])}.????????"):
            path.unlink(missing_ok=True)


def _write_out(path: Path) -> None:
    """Makes the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_utf8(text: str) -> str:
    """A text of file names. What is not UTF-8 in them becomes escapes: no JSON or Parquet file can
    hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def walk(folder: Path | str) -> Iterator[str]:
    """The files below a folder. Links to folders are followed, each folder once. Raises UserError
    naming a folder that cannot be read: its files would be missing without a word."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.join(parent, file) for file in files)


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # gone in the meantime
        name = as_utf8(str(error.filename))
        raise UserError(f"{name}: {error.strerror}; let it be read, or move it elsewhere")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError naming the file if it is missing, not readable, not
    UTF-8, not JSON, or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not readable as JSON ({reason})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError as `read_json` does, and for any other JSON value."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content
