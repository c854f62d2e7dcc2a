"""Keeps freed memory for the next training step.

glibc returns large blocks to the system immediately and requests them again in the next step, in
which every page causes a fault and is cleared: a quarter of the time of a step on a CPU. A training
process needs the same blocks in every step, so it keeps them.
"""

import ctypes
import sys

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """On Linux, configures glibc not to allocate large blocks with mmap and not to return the end
    of the heap to the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
