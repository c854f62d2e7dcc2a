"""Bytes from the middle of a file: on this disk, or behind a URL with HTTP Range requests."""

import functools
import io
import os
import re
import time
from pathlib import Path

import requests

from handler.errors import UserError
from training.data.server import Session, answer, body

# A server that is away is waited for: 1 s, 2 s, 4 s ..., two minutes in all.
ATTEMPTS = 8
PAUSE_S = 1.0
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)


def read_range(place: Path | str, start: int, length: int) -> bytes:
    """The `length` bytes from `start` of a file or of what a URL (a text) names; fewer only where
    that ends before.

    A server in trouble and a broken connection are tried again. Raises UserError naming the place
    for a missing file, a refusal such as 404, and a server without Range.
    """
    if isinstance(place, str):
        return _fetch(place, start, length)[0]
    try:
        with open(place, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None


class RangedFile(io.RawIOBase):
    """What a URL names, as a file that is read front to back or at any place. `size` is known after
    the first read."""

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
    """Keeps the connection between two photos."""
    return Session()


# A forked worker must not talk through its parent's sockets.
os.register_at_fork(after_in_child=_session.cache_clear)


def _fetch(url: str, start: int, length: int) -> tuple[bytes, int]:
    """The bytes, and the size of the whole."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            return _ask(url, start, length)
        except requests.RequestException as error:
            if isinstance(error, ValueError):  # requests' errors about the URL itself
                raise UserError(f"{url}: {error}") from None
            reason = str(error) if type(error) is requests.HTTPError else type(error).__name__
    raise UserError(f"{url}: {reason}, {ATTEMPTS} times; resume when the server is back")


def _ask(url: str, start: int, length: int) -> tuple[bytes, int]:
    """One request. Raises requests.RequestException where another may succeed."""
    wanted = {"Range": f"bytes={start}-{start + length - 1}"}
    with answer(_session(), url, wanted) as response:
        if response.status_code == 416:  # nothing there: the file ends before
            return b"", start
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.HTTPError(f"status {response.status_code}")
        if response.status_code == 200:
            raise UserError(
                f"{url}: the server sends the whole file where a part was asked for (HTTP Range); "
                "serve it by another, or copy the shards to a disk"
            )
        if response.status_code != 206:
            reason = " ".join(response.reason.split())[:100]
            raise UserError(f"{url}: the server answers {response.status_code} {reason}")
        header = response.headers.get("Content-Range", "")
        span = CONTENT_RANGE.fullmatch(header)
        first, last, size = map(int, span.groups()) if span else (-1, -1, -1)
        if first != start or last + 1 != min(start + length, size):
            raise requests.HTTPError(f"an answer with the range {header[:80]!r}")
        part = b"".join(body(response, url, last + 1 - first))
        if len(part) != last + 1 - first:
            raise requests.HTTPError(f"an answer of {len(part)} bytes for {length}")
        return part, size
