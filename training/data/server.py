"""Reads answers of a web server within limits on size and time, whatever it sends."""

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from urllib.parse import urljoin

import requests
import urllib3

from handler.errors import UserError

TIMEOUT = (10, 60)  # seconds to connect, and between two reads
# Longer than the read timeout: only a server that keeps sending bytes can exceed it.
HEAD_S = 90.0
SLOWEST = 2**15  # bytes per second of a body
REDIRECTS = 5
CHUNK = 2**18


class Session(requests.Session):
    """Leaves redirects to `answer`: requests would read their bodies, which may be endless."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


@contextmanager
def answer(session: Session, url: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
    """The answer to a GET of `url`, its body unread, after at most `REDIRECTS` redirects.

    Raises UserError for too many redirects, a compressed body and endless headers;
    requests.RequestException if another attempt may succeed.
    """
    # identity: byte ranges of a compressed body are not those of the file.
    headers = {**headers, "Accept-Encoding": "identity"}
    target = url
    for _ in range(REDIRECTS + 1):
        with _ask(session, url, target, headers) as response:
            if response.is_redirect:
                target = _joined(url, target, response.headers["Location"])
                continue
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise UserError(
                    f"{url}: the server compresses its answers (Content-Encoding {coding[:40]}); "
                    "turn that off for these files"
                )
            yield response
            return
    raise UserError(f"{url}: the server redirects more than {REDIRECTS} times")


def _joined(url: str, target: str, location: str) -> str:
    try:
        return urljoin(target, location)
    except ValueError:
        raise UserError(
            f"{url}: the server redirects to {location[:80]!r}, which is not a URL"
        ) from None


def _ask(session: Session, url: str, target: str, headers: Mapping[str, str]) -> requests.Response:
    """Receives the headers in a thread: the timeout of a read restarts with every byte."""
    outcome: Future[requests.Response] = Future()

    def ask() -> None:
        try:
            outcome.set_result(session.get(target, headers=headers, stream=True, timeout=TIMEOUT))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return outcome.result(HEAD_S)
    except TimeoutError:
        raise UserError(
            f"{url}: the server sent no complete header within {HEAD_S:.0f} s; check the server"
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(type(error).__name__) from error


def body(response: requests.Response, url: str, length: int) -> Iterator[bytes]:
    """Yields the chunks of the body, of at most `length` bytes; the body may end before.

    Raises UserError if it is longer than `length` bytes or slower than `SLOWEST`, and
    requests.RequestException if the connection breaks.
    """
    if int(length_of(response) or 0) > length:
        raise UserError(f"{url}: the server sends more than the {length} bytes asked for")
    done, start = 0, time.monotonic()
    while True:
        try:
            chunk = response.raw.read1(min(CHUNK, length - done + 1), decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(type(error).__name__) from error
        if not chunk:
            return
        done += len(chunk)
        if done > length:
            raise UserError(f"{url}: the server sends more than the {length} bytes asked for")
        if time.monotonic() - start > HEAD_S + done / SLOWEST:
            raise UserError(f"{url}: the server is too slow: {done} bytes in {HEAD_S:.0f} s")
        yield chunk


def length_of(response: requests.Response) -> int | None:
    """The value of the header Content-Length; None if it is missing or invalid."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None
