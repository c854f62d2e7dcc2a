"""A web server for shards that serves parts of files, breaks off, refuses and lies."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer(ThreadingHTTPServer):
    """Serves the files below `folder`. Each entry of `troubles` is what happens to one request: a
    status, "cut" (the body breaks off), "whole" (Range is ignored), "shifted" (another range)."""

    daemon_threads = True
    folder: Path
    troubles: list[int | str]
    asked: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"  # keeps connections open
    # Head and body in one packet: two would wait 40 ms for each other (Nagle, delayed ACK).
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked += 1
        trouble = self.server.troubles.pop(0) if self.server.troubles else None
        path = self.server.folder / self.path.lstrip("/")
        if isinstance(trouble, int) or not path.is_file():
            self.send_error(trouble if isinstance(trouble, int) else 404)
            return
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert found is not None
        start, end = int(found[1]), min(int(found[2]) + 1, size)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            part = b""
        elif trouble == "whole":
            self.send_response(200)
            part = path.read_bytes()
        else:
            start += trouble == "shifted"
            with path.open("rb") as file:
                file.seek(start)
                part = file.read(end - start)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if trouble == "cut":
            part, self.close_connection = part[: len(part) // 2], True
        self.wfile.write(part)


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(("127.0.0.1", 0), Answer) as server:
        server.folder, server.troubles, server.asked = folder, [], 0
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
