"""The C allocator's settings for inference on a CPU."""

from __future__ import annotations

import ctypes
import functools

# glibc's names and numbers (malloc.h), and what they are set to.
M_TRIM_THRESHOLD, TRIM_BYTES = -1, 128 * 2**20
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 32 * 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 128 MB of freed memory in the process rather than give it back at once; True where it listens.

    Every batch allocates and frees the same few megabytes. By default glibc hands blocks of that size back to the kernel, which
    clears them and maps them anew, page by page: 180,000 page faults and a quarter of the time for 1,000 short texts through a
    MiniLM. The setting holds for the whole process.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)) and bool(libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES))
    except (OSError, AttributeError):
        return False  # another C library, with its own ways
