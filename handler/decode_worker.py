"""The process that `handler.decode_process` starts: decodes one photo after the other within the
system's limits on processor time and address space."""

import contextlib
import json
import mmap
import os
import resource
import signal
import socket
from typing import Any

import pi_heif
from PIL import AvifImagePlugin

from handler.decode_process import (
    HEADER,
    MEMORY,
    MEMORY_A_PIXEL,
    SECONDS,
    TOO_COMPLEX,
    seconds_for,
)
from handler.errors import ImageTooComplex, InvalidImage
from handler.image_decode import bands, decode_photo, open_photo

# Address space that is mapped and never touched: stacks of threads, arenas of the allocator.
UNTOUCHED = 128 * 2**20


# A photo is reduced to no less than so many times the side that it will be resized to.
GAP = 3


def serve(descriptor: int) -> None:
    """Decodes photos from a socket until it is closed, in a fork. A photo that ends the fork is
    answered here, and the next one goes to a new fork: that takes 2 ms, an interpreter 200."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = os.cpu_count() or 1
    pi_heif.options.DECODE_THREADS = os.cpu_count() or 1
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
            with contextlib.suppress(OSError):  # nobody listens any more: the next fork ends
                _refuse(
                    connection,
                    InvalidImage("the image is damaged: its decoder failed")
                    if damaged
                    else ImageTooComplex(TOO_COMPLEX),
                )


def _decode_all(connection: socket.socket) -> None:
    while len(header := _receive(connection, HEADER.size)) == HEADER.size:
        length, side, patience, kind = HEADER.unpack(header)
        data = _receive(connection, length)
        try:
            _decode(connection, data, kind.rstrip(b"\0").decode(), side, patience)
        except InvalidImage as error:
            _refuse(connection, error)
        except MemoryError:
            _refuse(connection, ImageTooComplex(TOO_COMPLEX))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _limit_memory(None)


def _decode(connection: socket.socket, data: bytes, kind: str, side: int, patience: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, SECONDS * patience)
    _limit_memory(MEMORY)
    image = open_photo(data, kind)
    spent = SECONDS * patience - signal.getitimer(signal.ITIMER_PROF)[0]
    pixels = image.width * image.height
    left = max(0.001, seconds_for(image.size) * patience - spent)
    signal.setitimer(signal.ITIMER_PROF, left)
    _limit_memory(max(MEMORY, MEMORY_A_PIXEL * pixels))
    _say(connection, {"size": image.size})
    rgb = decode_photo(image, data, None if side < 0 else side)
    del image
    if side > 0:
        # As JPEG's draft does: pixels that the resize would average take long to hand over.
        rgb = rgb.reduce(max(1, min(rgb.size) // (GAP * side)))
    descriptor = os.memfd_create("photo")
    with os.fdopen(descriptor, "wb") as file:
        for _, band in bands(rgb):
            file.write(band.tobytes())
        file.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(connection, {"size": rgb.size})
        socket.send_fds(connection, [b"\0"], [file.fileno()])


def _limit_memory(more: int | None) -> None:
    """Lets the address space grow by so many bytes; None: without a limit of ours."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if more is None:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    limit = used + more + UNTOUCHED
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _receive(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(2**20, length - len(parts)))
        if not part:
            break
        parts += part
    return bytes(parts)


def _refuse(connection: socket.socket, error: InvalidImage) -> None:
    _say(connection, {"error": type(error).__name__, "message": str(error)})


def _say(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")
