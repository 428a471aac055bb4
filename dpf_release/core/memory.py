"""How the C library's allocator treats large blocks; the one place that sets it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


def return_large_blocks() -> None:
    """Lets this process give blocks of 1 MiB and more back to the system when they are freed, where it has glibc.

    By itself glibc keeps up to 32 MiB of each: batches that one thread makes and another frees leave gaps, and a
    process grows for as long as it runs.
    """
    global _returns_large_blocks
    _returns_large_blocks = True
    _keep_blocks_below(2**20)


@contextlib.contextmanager
def keeping_large_blocks() -> Iterator[None]:
    """Undoes `return_large_blocks` for as long as a training runs.

    It asks for the same blocks at every step, so it does not grow; to fetch them anew costs a third of its speed.
    """
    global _returns_large_blocks
    if not _returns_large_blocks:  # a process that never called it keeps the allocator it has
        yield
        return
    _returns_large_blocks = False
    _keep_blocks_below(2**30)
    try:
        yield
    finally:
        return_large_blocks()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


_returns_large_blocks = False


def _keep_blocks_below(size: int) -> None:
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(trim_threshold, size)
        ctypes.CDLL(None).mallopt(mmap_threshold, size)
