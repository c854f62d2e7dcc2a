"""Packed weights that the processes of one machine share.

The first process that loads an export packs its weights into an anonymous file in memory (memfd);
others find it among the open files of the same user's processes and map it, so that the system has
the weights once. There is no path and nothing to clean up: the memory is free when the last of
these processes ends.

Weights are read fastest from large pages. Where the system has none for shared memory (see
SHARED_PAGES), each process keeps its own.
"""

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

# What the system does for shared memory is in brackets.
SHARED_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
LARGE = {"[always]", "[within_size]", "[advise]", "[force]"}
# Of <linux/fcntl.h>, because Python has not all of them: against shrinking, growing, and writing.
F_ADD_SEALS, F_GET_SEALS, SEALS = 1033, 1034, 0x02 | 0x04 | 0x10
PATIENCE = 30  # seconds
# On these depends what packed weights look like.
PACKING = [Path(__file__).with_name(name) for name in ("native_blocks.c", "native_blocks.py")]


def can_share() -> bool:
    """Whether the system has large pages for shared memory."""
    with suppress(OSError):
        return not LARGE.isdisjoint(SHARED_PAGES.read_text().split())
    return False


def name_of_weights(export: Path) -> str | None:
    """The name under which processes share the packed weights of an export's present files; None
    where they cannot."""
    if not can_share():
        return None
    try:
        content = b"\n".join(path.read_bytes() for path in PACKING)
        for name in ("config.json", "encoder.pt", "decoder.pt"):
            file = (export / name).stat()
            own = file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns
            content += repr(own).encode()
    except OSError:
        return None
    return f"captioner-{hashlib.sha256(content).hexdigest()}"


@contextmanager
def packing(export: Path, name: str | None) -> Iterator[str | None]:
    """While it packs the weights of an export that it has read as `name`, a process is alone, so
    that the next one finds them. Gives None instead of `name` if the files have changed since, or
    another process is at it for too long."""
    with ExitStack() as stack:
        is_alone = name is not None and _lock(export / "config.json", stack)
        yield name if is_alone and name == name_of_weights(export) else None


def _lock(path: Path, stack: ExitStack) -> bool:
    try:
        file = stack.enter_context(path.open())
    except OSError:
        return False
    for _ in range(10 * PATIENCE):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a file system without locks: two that start at once do not share
            return True
        else:
            # Not only closed: a process that was forked meanwhile has the file open, too.
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
            return True
    return False


class Arena:
    """Memory for weights. With a `name`, it is shared: `is_filled` if another process has sealed
    memory of this name and size."""

    def __init__(self, size: int, name: str | None = None) -> None:
        self.is_shared = self.is_filled = False
        self._file: FileIO | None = None
        if name and size:
            with suppress(OSError):  # a system without memfd, or /proc
                self.memory = self._shared(size, name)
                self.is_shared = True
                return
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")

    def _shared(self, size: int, name: str) -> Tensor:
        found = _find(name, size)
        self.is_filled = found is not None
        if found is not None:
            return found
        file = FileIO(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+")
        file.truncate(size)
        memory = _map(file.fileno(), size, mmap.MAP_SHARED)
        self._file = file
        return memory

    def seal(self) -> None:
        """The memory is filled: other processes can find it."""
        if self._file is not None:
            with suppress(OSError):  # an older system: it is not found
                fcntl.fcntl(self._file, F_ADD_SEALS, SEALS)
            self._file.close()  # the mapping has a descriptor of its own
            self._file = None


def _find(name: str, size: int) -> Tensor | None:
    """Sealed memory of this name and size of a process of the same user."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):  # another user's, or gone meanwhile
            if process.name.isdecimal() and process.stat().st_uid == os.geteuid():
                for link in (process / "fd").iterdir():
                    if _target(link) == f"/memfd:{name} (deleted)":
                        memory = _open(link, name, size)
                        if memory is not None:
                            return memory
    return None


def _target(link: Path) -> str:
    with suppress(OSError):  # closed meanwhile
        return os.readlink(link)
    return ""


def _open(link: Path, name: str, size: int) -> Tensor | None:
    with suppress(OSError), link.open("rb") as file:
        status = os.fstat(file.fileno())
        # What is open now may be another file, and a process may have one of another user's.
        same = _target(Path(f"/proc/self/fd/{file.fileno()}")) == f"/memfd:{name} (deleted)"
        own = status.st_uid == os.geteuid() and status.st_size == size
        if same and own and fcntl.fcntl(file, F_GET_SEALS) & SEALS == SEALS:
            # Private, although nobody writes to it: torch would warn of memory that is read-only.
            return _map(file.fileno(), size, mmap.MAP_PRIVATE)
    return None


def _map(file: int, size: int, flags: int) -> Tensor:
    # The mapping lives as long as the tensor.
    return torch.frombuffer(mmap.mmap(file, size, flags), dtype=torch.uint8)
