"""glibc's malloc, told to keep the memory that one layer frees for the next."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's numbers, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEPING = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1}
# Where glibc itself arrives after it has freed a block of 32 MiB, the largest that moves its thresholds.
ADAPTED = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets blocks of up to 1 GiB come from memory that stays with the process; returns whether it could.

    By default glibc takes activations of 32 MiB and more from the system and gives them back layer by layer, and every
    page that comes back is filled with zeros: a fifth of the time of the paper's network at 256 x 256. In exchange the
    process keeps up to 2 GiB that it has freed. It holds for the whole process, so the commands call it, and no model.

    Does nothing without glibc, and where MALLOC_MMAP_THRESHOLD_, MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ or
    GLIBC_TUNABLES say what is wanted.

    Args:
        keep: False for what glibc comes to by itself.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN):
        return False
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) for option in (KEEPING if keep else ADAPTED).items())
