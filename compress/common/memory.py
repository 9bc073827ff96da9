"""Memory of this machine and of this process: its anonymous resident pages, which are not backed by files, and their peak."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL_SECONDS = 0.002


def gigabytes(count: float) -> str:
    """Format a number of bytes: in MB (10^6) with one decimal below 1 GB, in GB (10^9) with two above."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Return the bytes that are available without swapping; all memory where the kernel does not report it."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else memory_bytes()


def anonymous_bytes() -> int | None:
    """Return the anonymous resident set of this process in bytes; None where the kernel does not report it (not Linux).

    Mapped files do not count: their pages are shared, and dropped when memory is needed.
    """
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.M)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def release_free_pages() -> None:
    """Return freed memory that the C allocator still holds to the kernel; does so only where the C library is glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: its free pages stay counted


class PeakAnonymous:
    """Tracks the peak of the anonymous resident set in a thread: `with PeakAnonymous() as peak: ...; peak.bytes`."""

    def __init__(self) -> None:
        self.bytes: int | None = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None and self.bytes is not None:
            self.bytes = max(self.bytes, now)

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
