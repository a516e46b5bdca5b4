"""What processes that train on CPUs have: cores, and memory that they keep."""

from __future__ import annotations

import os

KEPT_BYTES = 2**31 - 1
"""Blocks up to this size, and so many free bytes at the heap's end, stay: the largest that
``mallopt`` takes."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, as CUDA's caching allocator does; twice is once.

    glibc gives large freed blocks back to the system, which clears every page again when the
    next block is written. FSDP2 makes and frees its messages for every layer: of two processes
    that train a model of 35 MB, each faulted 17,800 pages in again in every step
    (``python benchmarks/kept_memory.py``).

    Returns:
        False where the C library has no such setting, or the user has set one of the variables
        that decide the same.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    import ctypes  # not on the way of `plan`

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    settings = (_TRIM_THRESHOLD, _MMAP_THRESHOLD)
    return all(mallopt(setting, KEPT_BYTES) == 1 for setting in settings)
