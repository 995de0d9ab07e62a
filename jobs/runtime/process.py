"""The current process: its CPUs and its memory allocator."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h


def local_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for reuse instead of returning it to the kernel, where the C library is glibc.

    Every layer allocates and frees activations of several megabytes. Returning them to the kernel, which zeroes the
    pages each time, costs a tenth of the encoding time on CPUs.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(option, value)
