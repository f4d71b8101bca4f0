"""The memory of the process."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, in blocks of up to 1 GiB, for later use.

    A training step on a CPU takes and frees the same large maps again and again. glibc gives such
    blocks back to the kernel at once, which then clears every page anew: a sixth of a step. Other
    C libraries, which have no `mallopt` or ignore it, are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: on Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
