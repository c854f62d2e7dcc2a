"""The process that `handler.decode_process` starts. It decodes one photo after the other, with
limits of the operating system on processor time and address space."""

import contextlib
import json
import math
import mmap
import os
import resource
import signal
import socket
from typing import Any

import pi_heif
from PIL import AvifImagePlugin

from handler.decode_process import (
    MEMORY,
    MEMORY_A_PIXEL,
    REQUEST,
    TOO_COMPLEX,
    memory_file,
    seconds_for,
)
from handler.errors import ImageTooComplex, InvalidImage
from handler.image_decode import decode_photo, open_photo
from handler.image_resize import Resizing

# Threads that decode one AVIF or HEIC photo. Address space that is mapped but not used, and not
# counted as the photo's: stacks of 8 MiB and arenas of the allocator.
THREADS = min(4, os.cpu_count() or 1)
UNTOUCHED = 64 * 2**20
CRASHED = "the image is damaged: its decoder failed"
# Before a photo is resized, it is reduced by an integer factor, to at least GAP times that size.
GAP = 3


def serve(descriptor: int) -> None:
    """Decodes photos from a socket in a fork until the socket is closed. If a photo ends the fork,
    this process returns the error and creates a new fork, which takes 2 ms instead of the 200 ms of
    a new interpreter."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = THREADS
    pi_heif.options.DECODE_THREADS = THREADS
    pi_heif.register_heif_opener(thumbnails=False)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=descriptor) as connection:
        while True:
            fork = os.fork()
            if fork == 0:
                _decode_all(connection)
                os._exit(0)
            end = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
            if end == 0:
                return
            damaged = end in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
            error = InvalidImage(CRASHED) if damaged else ImageTooComplex(TOO_COMPLEX)
            with contextlib.suppress(OSError):  # the socket is closed, and the next fork will end
                _refuse(connection, error, math.inf)


def _decode_all(connection: socket.socket) -> None:
    with open("/proc/self/statm", "rb") as file:
        base = int(file.read().split()[0]) * mmap.PAGESIZE + UNTOUCHED
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, REQUEST.size, 1)
        if not request:
            return
        share, kind, resized, *how = REQUEST.unpack(request)
        resizing = Resizing(*how) if resized else None
        with os.fdopen(descriptors[0], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        timer = Timer(share)
        try:
            _decode(connection, data, kind.rstrip(b"\0").decode(), resizing, timer, base)
        except InvalidImage as error:
            _refuse(connection, error, timer.stop())
        except MemoryError:
            _refuse(connection, ImageTooComplex(TOO_COMPLEX), timer.stop())
        finally:
            timer.stop()
            _limit_memory(None)


class Timer:
    """Ends this process when a photo has taken its share of the time limit."""

    def __init__(self, share: float) -> None:
        self.share, self.seconds = share, seconds_for((0, 0), share)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)

    def spent(self) -> float:
        return self.seconds - signal.getitimer(signal.ITIMER_PROF)[0]

    def extend(self, size: tuple[int, int]) -> None:
        """Raises the limit to that of a photo of this size."""
        spent = self.spent()
        self.seconds = seconds_for(size, self.share)
        signal.setitimer(signal.ITIMER_PROF, max(0.001, self.seconds - spent))

    def stop(self) -> float:
        """Stops the timer; returns the seconds of processor time that were used."""
        spent = self.spent()
        signal.setitimer(signal.ITIMER_PROF, 0)
        return spent


def _decode(
    connection: socket.socket,
    data: bytes,
    kind: str,
    resizing: Resizing | None,
    timer: Timer,
    base: int,
) -> None:
    """Decodes one photo. `base` bytes of address space are excluded from its limit."""
    _limit_memory(base + MEMORY)
    image = open_photo(data, kind)
    timer.extend(image.size)
    _limit_memory(base + max(MEMORY, MEMORY_A_PIXEL * image.width * image.height))
    _send(connection, {"size": image.size})
    rgb = decode_photo(image, data, None if resizing is None else resizing.side)
    del image
    if resizing is not None:
        # Like the draft mode of JPEG: a bicubic filter over all pixels would be slow.
        rgb = resizing.apply(rgb.reduce(max(1, min(rgb.size) // (GAP * resizing.side))))
    with memory_file() as file:
        rgb.save(file, "PPM")  # a header line, then the pixels, written without a copy
        _send(connection, {"size": rgb.size, "seconds": timer.stop()})
        socket.send_fds(connection, [b"\0"], [file.fileno()])


def _limit_memory(limit: int | None) -> None:
    """Limits the address space to `limit` bytes; None removes the limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit is None or 0 <= hard < limit:
        limit = hard
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _refuse(connection: socket.socket, error: InvalidImage, seconds: float) -> None:
    _send(connection, {"error": type(error).__name__, "message": str(error), "seconds": seconds})


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")
