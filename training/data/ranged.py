"""Reads bytes from the middle of a file, on disk or at a URL with HTTP Range requests."""

import functools
import io
import os
import re
import time
from pathlib import Path

import requests

from handler.errors import UserError
from training.data.server import Session, answer, body

# Pauses of 1 s, 2 s, 4 s ... between attempts: about two minutes in total.
ATTEMPTS = 8
PAUSE_S = 1.0
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)


def read_range(location: Path | str, start: int, length: int) -> bytes:
    """Reads `length` bytes from `start` of a file or, if `location` is a str, of a URL; fewer only
    if the file ends before.

    Server errors and broken connections are retried. Raises UserError naming the location for a
    missing file, a refusal such as 404, and a server that does not support Range.
    """
    if isinstance(location, str):
        return _fetch(location, start, length)[0]
    try:
        with open(location, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise UserError(f"{location}: {error.strerror}") from None


class RangedFile(io.RawIOBase):
    """The content of a URL as a seekable file. `size` is known after the first read."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.size: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.size is not None and self.position >= self.size:
            return 0
        data, self.size = _fetch(self.url, self.position, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@functools.cache
def _session() -> Session:
    """One session per process, so that its connection stays open between two photos."""
    return Session()


# A forked worker must not use its parent's sockets.
os.register_at_fork(after_in_child=_session.cache_clear)


def _fetch(url: str, start: int, length: int) -> tuple[bytes, int]:
    """The bytes, and the size of the whole file."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            return _ask(url, start, length)
        except requests.RequestException as error:
            if isinstance(error, ValueError):  # requests' errors about the URL itself
                raise UserError(f"{url}: {error}") from None
            reason = str(error) if type(error) is requests.HTTPError else type(error).__name__
    raise UserError(f"{url}: {reason}, {ATTEMPTS} times; resume when the server is available")


def _ask(url: str, start: int, length: int) -> tuple[bytes, int]:
    """Sends one request. Raises requests.RequestException if another attempt may succeed."""
    wanted = {"Range": f"bytes={start}-{start + length - 1}"}
    with answer(_session(), url, wanted) as response:
        if response.status_code == 416:  # the file ends before `start`
            return b"", start
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.HTTPError(f"status {response.status_code}")
        if response.status_code == 200:
            raise UserError(
                f"{url}: the server ignores HTTP Range and sends the whole file; use another "
                "server, or copy the shards to a disk"
            )
        if response.status_code != 206:
            reason = " ".join(response.reason.split())[:100]
            raise UserError(f"{url}: the server answers {response.status_code} {reason}")
        header = response.headers.get("Content-Range", "")
        span = CONTENT_RANGE.fullmatch(header)
        first, last, size = map(int, span.groups()) if span else (-1, -1, -1)
        if first != start or last + 1 != min(start + length, size):
            raise requests.HTTPError(f"the answer has the range {header[:80]!r}")
        part = b"".join(body(response, url, last + 1 - first))
        if len(part) != last + 1 - first:
            raise requests.HTTPError(f"the answer has {len(part)} bytes instead of {length}")
        return part, size
