"""What decoding a photo takes: processor time and memory, of this process and its decoders."""

import contextlib
import ctypes
import os
import re
import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from handler import decode_process
from handler.errors import InvalidImage
from handler.image_preprocess import Patience, decode

INTERPRETER_MIB = 64
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """Seconds of processor time, MiB of memory, and the size of the picture, None where the photo
    was refused. Memory is what this process grew by, and all of a process that decodes:
    INTERPRETER_MIB before its first photo."""

    seconds: float
    mib: float
    size: tuple[int, int] | None


def cost_of(data: bytes, patience: Patience | None = None) -> Cost:
    """What a photo takes that is decoded now, the start of a process included where none waits.
    Must run in the main thread."""
    own = os.getpid()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are free would be used without growth
    for pid in (own, *forks()):
        reset_peak(pid)
    resident, before = memory(own, "VmRSS"), processor_seconds()
    largest, done, watching = [0.0], threading.Event(), [0.0]

    def measure() -> None:
        with contextlib.suppress(OSError, TypeError):  # it may end meanwhile
            now, peak = memory(own, "VmRSS") - resident, memory(own, "VmHWM") - resident
            together = now + sum(memory(pid, "VmRSS") for pid in forks())
            largest[0] = max(largest[0], together, peak, *(memory(p, "VmHWM") for p in forks()))

    def watch() -> None:
        while not done.wait(0.02):
            measure()
        watching[0] = time.thread_time()

    watcher = threading.Thread(target=watch)
    watcher.start()
    size = None
    try:
        image = decode(data, patience=patience)
        assert image.mode == "RGB"
        size = image.size
    except InvalidImage:
        pass
    finally:
        done.set()
        watcher.join()
    measure()
    return Cost(processor_seconds() - before - watching[0], largest[0], size)


def forget_processes() -> None:
    """Ends the processes that wait for photos; the next one starts its own."""
    decode_process._idle.end()
    decode_process._idle.clear()


def decoders() -> list[int]:
    """The processes that this one has started to decode photos."""
    found = []
    for child in children(os.getpid()):
        with contextlib.suppress(OSError):
            if b"decode_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def forks() -> list[int]:
    """Those in which they decode."""
    return [fork for decoder in decoders() for fork in children(decoder)]


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def processor_seconds() -> float:
    """Of this process, its decoders, and its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid, numbers in (*((pid, 4) for pid in decoders()), *((pid, 2) for pid in forks())):
        with contextlib.suppress(OSError):
            # User and system time, of the process and of its children that have ended.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(int(ticks) for ticks in fields[11 : 11 + numbers]) / TICKS
    return seconds


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory(pid: int, name: str) -> float:
    """VmRSS, resident now, or VmHWM, its peak, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024
