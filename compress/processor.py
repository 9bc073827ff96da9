"""The processor: what it is called, and which instructions that products depend on it has."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

INFORMATION = Path("/proc/cpuinfo")
# Of bytes with bytes into 32 bits. Without one of these, x86 adds pairs of unsigned x signed products in 16 bits, which overflow.
BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def cpu_name() -> str:
    """Return the processor's name."""
    return _field("model name") or platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's instruction sets as Linux names them; empty where it does not tell."""
    return frozenset((_field("flags") or "").split())


def multiplies_bytes_exactly() -> bool:
    """Whether products of unsigned with signed bytes cannot overflow; taken for granted where the processor does not tell."""
    return not cpu_flags() or bool(cpu_flags().intersection(BYTE_PRODUCTS))


def _field(name: str) -> str | None:
    if not INFORMATION.exists():
        return None
    found = re.search(rf"^{name}\s*:\s*(.+)$", INFORMATION.read_text(encoding="utf-8"), re.M)
    return found.group(1) if found else None
