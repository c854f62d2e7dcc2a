"""Shard servers and mirrors that lie: refused after what was asked for, in time and memory."""

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handler.errors import UserError
from training.data import download, ranged, server

PART = b"x" * 100
RANGE = b"Content-Range: bytes 0-99/1000\r\n"


def head(status: bytes = b"206 Partial Content", *fields: bytes) -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + b"".join(fields) + b"Connection: close\r\n\r\n"


def endlessly(start: bytes, more: bytes, pause_s: float = 0.0) -> Callable[[], Iterator[bytes]]:
    def answer() -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(pause_s)
            yield more

    return answer


def once(content: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: iter([content])


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """Starts a server whose every answer is these bytes; returns its URL."""
    monkeypatch.setattr(ranged, "PAUSE_S", 0.0)
    monkeypatch.setattr(server, "HEAD_S", 1.5)
    listeners = []

    def start(answer: Callable[[], Iterator[bytes]]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def reply(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(65536)
                    for part in answer():
                        connection.sendall(part)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


LONG = b"Content-Length: 1000000000000\r\n"
CHUNKED = head(b"206 Partial Content", RANGE, b"Transfer-Encoding: chunked\r\n")
LIES = {
    "without end": (endlessly(head(b"206 OK", RANGE), b"x" * 65536), "more than the 100 bytes"),
    "chunks without end": (
        endlessly(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"), "more than the 100 bytes",
    ),
    "a length beyond": (endlessly(head(b"206 OK", RANGE, LONG), b"x"), "more than the 100 bytes"),
    "gzip": (
        once(head(b"206 OK", RANGE, b"Content-Encoding: gzip\r\n") + PART), "Content-Encoding gzip",
    ),
    "another range": (
        once(head(b"206 OK", b"Content-Range: bytes 5-104/1000\r\n") + PART), "has the range",
    ),
    "a range of no numbers": (
        once(head(b"206 OK", b"Content-Range: bytes 0-99/\xb2\r\n") + PART), "has the range",
    ),
    "a size of 5,000 digits": (
        once(head(b"206 OK", b"Content-Range: bytes 0-99/" + b"9" * 5000 + b"\r\n") + PART),
        "has the range",
    ),
    "too short": (once(head(b"206 OK", RANGE) + PART[:7]), "has 7 bytes instead of 100"),
    "a circle": (once(head(b"302 Found", b"Location: /again\r\n")), "redirects more than 5 times"),
    "a redirect without end": (
        endlessly(head(b"302 Found", b"Location: /again\r\n"), b"x" * 65536), "redirects more than",
    ),
    "a redirect to no URL": (once(head(b"302 Found", b"Location: http://[\r\n")), "not a URL"),
    "headers without end": (
        endlessly(b"HTTP/1.1 206 OK\r\n", b"X-A: b\r\n", 0.001), "ConnectionError",
    ),
    "100 Continue without end": (
        endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no complete header",
    ),
    "dripping headers": (endlessly(b"HTTP/1.1 206 OK\r\nX: ", b"x", 0.2), "no complete header"),
    "a dripping body": (endlessly(head(b"206 OK", RANGE), b"x", 0.2), "too slow"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
@pytest.mark.timeout(60)
def test_an_answer_that_lies_is_refused(name, serve):
    """An endless 206, gzip or redirect filled the memory; a drip took for ever."""
    answer, said = LIES[name]
    url = serve(answer) + "/x.tar"
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(UserError, match="http://127") as caught:
        ranged.read_range(url, 0, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said in str(caught.value)
    assert peak < 2**24 and time.monotonic() - begin < 20


def test_what_was_asked_for_is_read(serve):
    url = serve(once(head(b"206 OK", RANGE, b"Content-Length: 100\r\n") + PART))
    assert ranged.read_range(f"{url}/x.tar", 0, 100) == PART


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (endlessly(head(b"200 OK"), b"x" * 65536), "no Content-Length"),
        (endlessly(head(b"200 OK", LONG), b"x" * 65536), "no Content-Length up to"),
        (once(head(b"200 OK", b"Content-Encoding: gzip\r\n")), "Content-Encoding gzip"),
        (once(head(b"302 Found", b"Location: /again\r\n")), "redirects more than 5 times"),
        (
            endlessly(head(b"200 OK", b"Content-Length: 999\r\n"), b"x", 0.2), "too slow",
        ),
    ],
)  # fmt: skip
def test_a_mirror_that_lies_is_refused(answer, said, serve, tmp_path: Path):
    """Without a length the disk was filled."""
    with pytest.raises(UserError, match=said):
        download.fetch(serve(answer) + "/x.zip", tmp_path / "x.zip", pause_s=0)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**20
