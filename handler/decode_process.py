"""Decodes photos that are not known to be cheap in a separate process, which the system ends if it
takes more processor time or memory than is allowed for the size of the photo.

The process is an interpreter without torch. It is started for the first such photo, decodes one
photo after the other, and ends when the process that started it does. The operating system enforces
the limits (a timer of processor time, a limit on the address space), so that they also apply within
a decoder's C code. Photos are decoded in a fork of the process; a photo above a limit ends only the
fork.

The processes communicate over a socket. The photo is sent as the descriptor of a file in memory.
The answer is its size, when its header has been checked, and then the pixels in another such file;
or an error.
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
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from handler.errors import ImageTooComplex, ImageTooLarge, InvalidImage
from handler.image_resize import Resizing
from handler.image_walk import Effort

# Processor seconds and bytes of memory that a photo may take. The documented limit is 2 s, and 1 s
# more for every 16 megapixels, including the start of the process. These values are lower, because
# other requests of the batch wait, and no ordinary photo needs as much.
SECONDS, PIXELS_A_SECOND = 0.6, 16e6
# The share of this time for photos of Effort.UNKNOWN. Those of Effort.BOUNDED (AVIF, HEIC, large
# photos) need more.
UNKNOWN_SHARE = 0.5
# Every photo may take this time, however slow others in the batch were. An ordinary photo of one
# megapixel needs it.
LEAST_SECONDS = 0.1
MEMORY, MEMORY_A_PIXEL = 512 * 2**20, 12
# Ordinary photos are decoded faster than this; others are slow for their size.
ORDINARY_PIXELS_A_SECOND = 9e6
# Limits on elapsed time, which include waiting for a processor.
WALL_FACTOR, WALL_SECONDS = 8, 5
REQUEST = struct.Struct("<d4s?ii??")  # share, kind, whether it is resized, Resizing
UNSIZED = Resizing(0, 0, False, False)
# One arena, which reuses the pages of one photo for the next: the system needs 1 us to provide a
# page. In other processes, glibc raises these thresholds itself when a larger array is freed.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# The errors that the process may return.
REFUSALS = {kind.__name__: kind for kind in (InvalidImage, ImageTooLarge, ImageTooComplex)}
TOO_COMPLEX = "decoding the image would take too much time or memory"
ROOT = str(Path(__file__).resolve().parents[1])
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from handler.decode_worker import serve; serve(int(sys.argv[2]))"
)


def seconds_for(size: tuple[int, int], share: float) -> float:
    """The processor seconds that decoding a photo of this size may take."""
    return max(LEAST_SECONDS, share * (SECONDS + size[0] * size[1] / PIXELS_A_SECOND))


@dataclass
class Patience:
    """The share of its time limit that the next photo of a batch may take. It falls after each slow
    photo, so that all slow photos of a batch together take little longer than the limit of one."""

    share: float = 1.0

    def spend(self, seconds: float) -> None:
        """Lowers the share after a photo that took `seconds` longer than an ordinary one."""
        least = min(self.share, 0.4) / 2
        self.share = max(self.share - max(0.0, seconds) / SECONDS, least)


def decode_elsewhere(
    data: bytes, kind: str, effort: Effort, resizing: Resizing | None, patience: Patience
) -> Image.Image:
    """The photo in RGB, as `handler.image_decode.decode_photo` returns it. With `resizing` the
    process resizes it, so that fewer pixels are transferred. Raises InvalidImage, and
    ImageTooComplex if the process needs too much time or memory."""
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
    """A new, unbuffered file in memory."""
    return os.fdopen(os.memfd_create("photo"), "wb", buffering=0)


class DecodeProcess:
    """The decoding process from the side of the process that uses it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(search_path()), str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                process_group=0,  # Ctrl-C must only reach the process that started it
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
            if "seconds" not in answer:  # this is the answer about the header
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
                raise RuntimeError("the process that decodes photos failed to start") from error
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
        """Reads the next line from the process, which may use `seconds` of processor time for it.
        It contains `size` and, after decoding, the `seconds` that the photo took; or `error` and
        `message`."""
        wall = WALL_SECONDS + WALL_FACTOR * seconds
        line = b""
        while not line.endswith(b"\n"):
            if not self._has_data(wall):
                raise EOFError
            byte = self.socket.recv(1)
            if not byte:
                raise EOFError
            line += byte
        return dict(json.loads(line))

    def is_ready(self) -> bool:
        """Whether the process runs and waits for a photo. If its fork has ended meanwhile, an error
        can be read from the socket."""
        return self.process.poll() is None and not self._has_data(0)

    def _has_data(self, seconds: float) -> bool:
        """Whether the socket can be read, at the latest after `seconds`."""
        poll = select.poll()  # select() refuses descriptors above 1023
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self) -> None:
        self.alive = False
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)
        if self.process.returncode is None:
            # The group includes its fork, which may not notice that the socket is closed.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def search_path() -> list[str]:
    """Where the new process finds this package, and all that this process finds. An empty entry
    means the current folder, which may have changed since the import."""
    return [ROOT, *(str(entry) for entry in sys.path if entry)]


class _Idle:
    """The idle decoding processes of this process. After a fork, the child starts with none."""

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
