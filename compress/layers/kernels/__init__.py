"""Triton kernels. They run on CUDA, and on the CPU in Triton's interpreter (`TRITON_INTERPRET=1` before the first import).

Triton is optional: no module outside of this package imports `rows`, `products` or `weights` before `available` has said yes.
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def available(device_type: str) -> bool:
    """Whether Triton is installed and compiles for, or interprets on, this type of device."""
    if device_type not in ("cuda", "cpu") or importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    # Triton wraps functions at their definition, for the compiler or for the interpreter; a process has one of the two.
    return bool(knobs.runtime.interpret) == (device_type == "cpu")


def failures() -> tuple[type[Exception], ...]:
    """Return what a kernel raises that this device or this version of Triton cannot run."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError, AttributeError)
    from triton.errors import TritonError

    return (RuntimeError, AttributeError, TritonError)
