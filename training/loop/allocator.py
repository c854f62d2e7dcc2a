"""Memory that training gives back is kept for the next step.

glibc returns large blocks to the system at once and asks for them again at the next step, where
each page is faulted in and cleared anew: a quarter of a step's time on a CPU. A training process
needs the same blocks again and again, so it keeps them.
"""

import ctypes
import sys

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tells glibc, where there is one, never to use mappings of their own for large blocks, and
    never to give back the end of the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
