"""What a web server answers, read within bounds: whatever it sends, and however slowly."""

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
# Above the time between two reads, so that only a server that keeps sending reaches it.
HEAD_S = 90.0
SLOWEST = 2**15  # bytes a second of a body
REDIRECTS = 5
CHUNK = 2**18


class Session(requests.Session):
    """Leaves redirects to `answer`: requests would read their bodies, endless or not."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


@contextmanager
def answer(session: Session, url: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
    """The answer to a GET of `url`, its body unread, after up to `REDIRECTS` redirects.

    Raises UserError for redirects in a circle, a compressed body and headers that do not end;
    requests.RequestException where another try may succeed.
    """
    # identity: a compressed body would be another file's bytes.
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
                    "switch that off for these files"
                )
            yield response
            return
    raise UserError(f"{url}: the server redirects more than {REDIRECTS} times")


def _joined(url: str, target: str, location: str) -> str:
    try:
        return urljoin(target, location)
    except ValueError:
        raise UserError(f"{url}: the server redirects to {location[:80]!r}, no URL") from None


def _ask(session: Session, url: str, target: str, headers: Mapping[str, str]) -> requests.Response:
    """Waits for the headers in a thread: a read's timeout begins anew with every byte."""
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
            f"{url}: no whole header of an answer within {HEAD_S:.0f} s; check the server"
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(type(error).__name__) from error


def body(response: requests.Response, url: str, length: int) -> Iterator[bytes]:
    """The body as it comes; it may end early, never late.

    Raises UserError where it is longer than `length` bytes or slower than `SLOWEST`, and
    requests.RequestException where the connection breaks.
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
            raise UserError(f"{url}: the server sends {done} bytes in {HEAD_S:.0f} s; too slow")
        yield chunk


def length_of(response: requests.Response) -> int | None:
    """The header Content-Length; None where it is absent or no length."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None
