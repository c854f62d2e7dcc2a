"""Keeps freed memory for the next training step.

glibc returns large blocks to the system immediately and requests them again in the next step, in
which every page causes a fault and is cleared: a quarter of the time of a step on a CPU. A training
process needs the same blocks in every step, so it keeps them.
"""

import ctypes
import sys
from typing import Any

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """On Linux, configures glibc not to allocate large blocks with mmap and not to return the end
    of the heap to the system."""
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Returns the kept memory once. A process that is forked afterwards would share it, and hold
    the old pages when this one writes to them: with one worker, an epoch took twice the memory."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
