"""Decodes photos that are not known to be cheap in a separate process, which the system ends if it
takes more processor time or memory than is allowed for the size of the photo.

The process is an interpreter without torch. It is started when the first such photo comes, takes
one photo after the other, and ends when the process that started it does. Its limits are the
system's (a timer of processor time, a limit on its address space), so that they hold within a
decoder's C code as well; it decodes in a fork, which is all that a photo ends.

Over a socket: the photo goes in, as a file in memory whose descriptor is sent; its size comes back
once its header is read and checked, then its pixels in another such file; or what is wrong.
"""

import atexit
import contextlib
import json
import math
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from handler.errors import ImageTooComplex, ImageTooLarge, InvalidImage
from handler.image_decode import Resizing
from handler.image_walk import Effort

# Processor seconds and bytes of memory that a photo may take. The limit is 2 s in all, and one more
# for every 16 megapixels, with the start of the process; but neighbours in a batch wait for it, and
# no ordinary photo needs as much.
SECONDS, PIXELS_A_SECOND = 0.6, 16e6
# The share of it for a photo that nothing is known about: a photo that is bounded, AVIF, HEIC or
# large, needs more.
UNKNOWN_SHARE = 0.5
# Any photo may take this, however slow others of its batch were: ordinary ones of a megapixel do.
LEAST_SECONDS = 0.1
MEMORY, MEMORY_A_PIXEL = 512 * 2**20, 12
# An ordinary photo is decoded faster than this; what takes longer is slow for its size.
ORDINARY_PIXELS_A_SECOND = 9e6
# Limits on elapsed time, with room for a process that has to wait for a processor.
WALL_FACTOR, WALL_SECONDS = 8, 5
REQUEST = struct.Struct("<d4s?ii??")  # patience, kind, whether it is resized, and how
UNSIZED = Resizing(0, 0, False, False)
# One arena, which keeps the pages of one photo for the next (the system takes 1 us to give a page),
# as that of any process does that has once freed a larger array.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# What the process may answer instead of a photo.
REFUSALS = {kind.__name__: kind for kind in (InvalidImage, ImageTooLarge, ImageTooComplex)}
TOO_COMPLEX = "decoding the image would take too much time or memory"
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from handler.decode_worker import serve; serve(int(sys.argv[2]))"
)


def seconds_for(size: tuple[int, int], share: float) -> float:
    """The processor seconds that decoding a photo of this size may take."""
    return max(LEAST_SECONDS, share * (SECONDS + size[0] * size[1] / PIXELS_A_SECOND))


@dataclass
class Patience:
    """The share of its time that a photo may take while others wait for it. However many photos
    of a batch are slow, together they take little longer than the slowest one may."""

    share: float = 1.0

    def spend(self, seconds: float) -> None:
        """After a photo that was `seconds` slower than ordinary ones of its size."""
        least = min(self.share, 0.4) / 2
        self.share = max(self.share - max(0.0, seconds) / SECONDS, least)


def decode_elsewhere(
    data: bytes, kind: str, effort: Effort, resizing: Resizing | None, patience: Patience
) -> Image.Image:
    """The photo in RGB, as `handler.image_decode.decode_photo` returns it, or resized, which is
    less to transfer. Raises InvalidImage, and ImageTooComplex if the process needs too much time or
    memory."""
    process = _idle.take()
    try:
        image = process.decode(data, kind, effort, resizing, patience)
    except InvalidImage:
        _idle.give_back(process)
        raise
    except BaseException:
        process.end()
        raise
    _idle.give_back(process)
    return image


def memory_file() -> BinaryIO:
    """A new file in memory, not buffered."""
    return os.fdopen(os.memfd_create("photo"), "wb", buffering=0)


class DecodeProcess:
    """A decoding process, as seen by the process that uses it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(sys.path), str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                process_group=0,  # Ctrl-C is for the one who started it
            )
        self.alive = True

    def decode(
        self, data: bytes, kind: str, effort: Effort, resizing: Resizing | None, patience: Patience
    ) -> Image.Image:
        pixels = 0
        share = patience.share * (UNKNOWN_SHARE if effort == Effort.UNKNOWN else 1)
        try:
            self.socket.settimeout(WALL_SECONDS + WALL_FACTOR * SECONDS)
            with memory_file() as file:
                file.write(data)
                request = REQUEST.pack(
                    share, kind.encode(), resizing is not None, *(resizing or UNSIZED)
                )
                socket.send_fds(self.socket, [request], [file.fileno()])
            answer = self._answer(seconds_for((0, 0), share))
            if "seconds" not in answer:  # of the header alone
                width, height = answer["size"]
                pixels = width * height
                answer = self._answer(seconds_for((width, height), share))
            patience.spend(answer["seconds"] - pixels / ORDINARY_PIXELS_A_SECOND)
            if "error" in answer:
                raise REFUSALS[answer["error"]](answer["message"])
            [descriptor] = socket.recv_fds(self.socket, 1, 1)[1]
        except InvalidImage:
            raise
        except (OSError, EOFError, ValueError) as error:
            self.end()
            if self.process.returncode > 0:
                raise RuntimeError("the process that decodes photos does not start") from error
            patience.spend(math.inf)
            raise ImageTooComplex(TOO_COMPLEX) from error
        width, height = answer["size"]
        with (
            os.fdopen(descriptor, "rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as picture,
        ):
            return Image.frombytes(
                "RGB", (width, height), memoryview(picture)[-3 * width * height :]
            )

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line from the process, for which it may use `seconds` of processor time: `size`
        and, at the end, the `seconds` that the photo took; or `error` and `message`."""
        wall = WALL_SECONDS + WALL_FACTOR * seconds
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.socket], [], [], wall)[0]:
                raise EOFError
            byte = self.socket.recv(1)
            if not byte:
                raise EOFError
            line += byte
        return dict(json.loads(line))

    def is_ready(self) -> bool:
        """Whether it waits for a photo: it lives, and has not told of an end between two photos."""
        return self.process.poll() is None and not select.select([self.socket], [], [], 0)[0]

    def end(self) -> None:
        self.alive = False
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)
        if self.process.returncode is None:
            # With its fork, which need not notice.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Idle:
    """The idle decoding processes of this process. A fork does not inherit those of its parent."""

    def __init__(self) -> None:
        self.clear()
        os.register_at_fork(after_in_child=self.clear)
        atexit.register(self.end)

    def clear(self) -> None:
        self.lock = threading.Lock()
        self.processes: list[DecodeProcess] = []

    def take(self) -> DecodeProcess:
        with self.lock:
            while self.processes:
                process = self.processes.pop()
                if process.is_ready():
                    return process
                process.end()
        return DecodeProcess()

    def give_back(self, process: DecodeProcess) -> None:
        with self.lock:
            if process.alive and len(self.processes) < (os.cpu_count() or 1):
                self.processes.append(process)
                return
        process.end()

    def end(self) -> None:
        for process in self.processes:
            process.end()


_idle = _Idle()
